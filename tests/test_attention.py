"""Attention by hand: the blocked kernel and its gradient against dense formulas, for every way to cut the queries."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import fnlm
from fnlm import blocked
from fnlm.attention import alibi_slopes, attention
from fnlm.collectives import LOCAL
from fnlm.kernels import rotate
from fnlm.params import shapes
from fnlm.places import places_of
from tests import reference
from tests.reference import BASE, CASES, random_params, random_tokens, small_blocks


def run(qkv: Tensor, n_q: int, n_kv: int, cfg: fnlm.ModelConfig, kernels: Any, key: Tensor | None = None) -> Tensor:
    """Rotation and attention: "auto" by hand in blocks of queries, as long sequences have it on a CPU."""
    places = places_of(qkv.shape[1], cfg, qkv, fnlm.Compute(kernels=kernels), LOCAL, dropped=True)  # no library
    qk, v = qkv.split([n_q + n_kv, n_kv], 2)
    if places.rotation is not None:
        qk = rotate(qk, *(x[:, None] for x in places.rotation), by_hand=kernels == "auto")
    if kernels == "auto" and key is None:
        return Blocked.apply(torch.cat([qk, v], 2), (n_q, n_kv), cfg, places)
    return attention(*qk.split([n_q, n_kv], 2), v, cfg, places, kernels, key)


class Blocked(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, qkv: Tensor, n: tuple[int, int], cfg: fnlm.ModelConfig, places: Any) -> Tensor:
        heads = blocked.to_heads(qkv.flatten(2).flatten(0, 1), qkv.shape[0], qkv.shape[3])
        y, kept = blocked.attend(heads, n, cfg, places)
        ctx.save_for_backward(heads, *kept)
        ctx.rest = n, cfg, places, qkv.shape
        return y.view(*qkv.shape[:2], -1)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        heads, *kept = ctx.saved_tensors
        n, cfg, places, shape = ctx.rest
        d_heads = blocked.attend_backward(g.flatten(0, 1), heads, kept, n, cfg, places)
        return blocked.to_rows(d_heads).view(shape), None, None, None


def dense(qkv: Tensor, n_q: int, n_kv: int, cfg: fnlm.ModelConfig) -> Tensor:
    """(B, T, A, K) -> (B, T, H K), one head at a time with a full score matrix."""
    b, t, _, K = qkv.shape
    distance = torch.arange(t)[:, None] - torch.arange(t)
    seen = (distance >= 0) & (distance < (cfg.window or t))
    scale = 8 / K if cfg.init == "mup" else K**-0.5
    out = []
    for h in range(n_q):
        q, k, v = qkv[:, :, h], qkv[:, :, n_q + h * n_kv // n_q], qkv[:, :, n_q + n_kv + h * n_kv // n_q]
        if cfg.positions == "rope":
            q, k = (torch.stack([torch.stack([reference.rotated(x[i, s], s, cfg) for s in range(t)]) for i in range(b)])
                    for x in (q, k))  # fmt: skip
        scores = torch.einsum("btk,bsk->bts", q, k) * scale
        if cfg.positions == "alibi":
            scores = scores - reference.alibi(n_q)[h] * distance.double()
        weights = scores.exp() * seen
        out.append(weights / weights.sum(-1, keepdim=True) @ v)
    return torch.cat(out, -1)


@st.composite
def problems(draw: st.DrawFn) -> tuple[fnlm.ModelConfig, int, int, int]:
    groups, n_kv = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    t, d_head = draw(st.integers(1, 11)), draw(st.sampled_from([2, 4, 6]))
    options: dict[str, Any] = {"positions": draw(st.sampled_from(["none", "rope", "alibi"]))}
    if options["positions"] == "rope":
        options["rope_fraction"] = draw(st.sampled_from([r / d_head for r in range(2, d_head + 1, 2)]))
    options["window"] = draw(st.none() | st.integers(1, t + 2))
    options["init"] = draw(st.sampled_from(["gpt2", "mup"]))
    sizes = {"n_heads": groups * n_kv, "n_kv_heads": n_kv, "d_head": d_head, "d_model": 4, "seq_len": 16}
    cfg = fnlm.ModelConfig(vocab_size=3, n_layers=1, **sizes, **options)
    return cfg, draw(st.integers(1, 3)), t, draw(st.integers(1, 12))


@settings(max_examples=150)
@given(problems())
def test_values_and_gradients_are_those_of_the_dense_formula(problem: tuple[fnlm.ModelConfig, int, int, int]) -> None:
    cfg, b, t, block = problem
    n_q, n_kv, g = cfg.n_heads, cfg.kv_heads, torch.Generator().manual_seed(t)
    qkv = torch.randn(b, t, n_q + 2 * n_kv, cfg.head_dim, generator=g, dtype=torch.float64).requires_grad_()
    ahead = torch.randn(b, t, n_q * cfg.head_dim, generator=g, dtype=torch.float64)
    want = dense(qkv, n_q, n_kv, cfg)
    (d_want,) = torch.autograd.grad(want, qkv, ahead)
    before = qkv.detach().clone()
    with pytest.MonkeyPatch.context() as patch:
        small_blocks(patch, block)
        for kernels in ("auto", "plain", "sdpa"):
            got = run(qkv, n_q, n_kv, cfg, kernels)
            torch.testing.assert_close(got, want, rtol=0, atol=1e-10)
            (d_got,) = torch.autograd.grad(got, qkv, ahead)
            torch.testing.assert_close(d_got, d_want, rtol=0, atol=1e-10)
            assert torch.equal(qkv.detach(), before)


@pytest.mark.parametrize("block", [4, 5, 13, 256])
@pytest.mark.parametrize("name", CASES)
def test_gradients_of_auto_are_those_of_plain(name: str, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    small_blocks(monkeypatch, block)
    cfg = fnlm.ModelConfig(**{**BASE, **CASES[name]})
    tokens, grads = random_tokens(11, 2, 13), []
    ahead = torch.randn(2, 13, 11, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for kernels in ("auto", "plain"):
        params = {k: v.requires_grad_() for k, v in random_params(shapes(cfg)).items()}
        out = fnlm.forward(params, tokens, cfg, compute=fnlm.Compute(kernels=kernels))
        grads.append(torch.autograd.grad((out * ahead).sum(), list(params.values()), materialize_grads=True))
    for key, a, b in zip(params, *grads, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10, msg=lambda m, key=key: f"{key}: {m}")


def test_hand_written_gradients_agree_with_finite_differences(monkeypatch: pytest.MonkeyPatch) -> None:
    small_blocks(monkeypatch, 3)
    cfg = fnlm.ModelConfig(vocab_size=3, n_layers=1, n_heads=2, n_kv_heads=1, d_head=4, d_model=4, seq_len=8,
                           positions="rope", rope_fraction=0.5, window=4)  # fmt: skip
    qkv = torch.randn(2, 7, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: run(x, 2, 1, cfg, "auto"), qkv)


@pytest.mark.parametrize("kernels", ["auto", "plain", "sdpa"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_huge_scores_stay_finite(kernels: str, dtype: torch.dtype) -> None:
    cfg = fnlm.ModelConfig(vocab_size=3, n_layers=1, n_heads=2, d_head=4, d_model=4, seq_len=8, positions="alibi")
    qkv = (torch.randn(2, 8, 6, 4, generator=torch.Generator().manual_seed(0)) * 1e4).to(dtype).requires_grad_()
    out = run(qkv, 2, 2, cfg, kernels)
    (grad,) = torch.autograd.grad(out.float().sum(), qkv)
    assert out.isfinite().all()
    assert grad.isfinite().all()


@pytest.mark.parametrize("n", [1, 2, 3, 5, 6, 8, 12, 20, 24, 40, 112])
def test_alibi_slopes(n: int) -> None:
    got = alibi_slopes(n, torch.device("cpu")).tolist()
    assert got == pytest.approx(reference.alibi(n), rel=1e-6)
    assert len(set(got)) == n


def test_alibi_slopes_of_the_paper() -> None:
    assert alibi_slopes(8, torch.device("cpu")).tolist() == [2.0**-i for i in range(1, 9)]


def test_attention_dropout_has_mean_one_and_is_each_samples_own() -> None:
    """Values of 1: each output is the sum of its dropped probabilities."""
    cfg = fnlm.ModelConfig(vocab_size=3, n_layers=1, n_heads=3, d_head=2, d_model=6, seq_len=32, dropout_attn=0.4)
    qkv = torch.cat([torch.zeros(64, 32, 6, 2), torch.ones(64, 32, 3, 2)], 2)
    keys = fnlm.fold_in(fnlm.key(0), torch.arange(64))
    for kernels in ("auto", "plain", "sdpa"):
        sums = run(qkv, 3, 3, cfg, kernels, keys)[..., ::2]  # (B, T, H)
        assert abs(float(sums.mean()) - 1) < 0.02
        first = sums[:, 0]  # one probability of 1: now 0 or 1 / 0.6
        assert abs(float((first == 0).double().mean()) - 0.4) < 0.12
        torch.testing.assert_close(first[first != 0], torch.full_like(first[first != 0], 1 / 0.6), rtol=1e-4, atol=0)
        last = sums[:, -1]  # 32 probabilities of 1/32, each kept with 0.6
        assert abs(float(last.std()) - math.sqrt(0.4 / 0.6 / 32)) < 0.03
        flat = torch.cat([last, sums[:, -2]], 1) - 1  # heads and neighbours draw on their own
        assert (torch.corrcoef(flat.T) - torch.eye(6)).abs().max() < 0.5


def test_attention_dropout_of_other_kernels_is_the_same() -> None:
    cfg = fnlm.ModelConfig(**BASE, dropout_attn=0.5, window=4, positions="alibi", n_kv_heads=2)
    params, tokens = random_params(shapes(cfg)), random_tokens(11, 2, 9)
    outs = [
        fnlm.forward(params, tokens, cfg, key=fnlm.key(1), compute=fnlm.Compute(kernels=k))
        for k in ("auto", "plain", "sdpa")
    ]
    torch.testing.assert_close(outs[0], outs[1], rtol=0, atol=1e-12)
    torch.testing.assert_close(outs[2], outs[1], rtol=0, atol=1e-12)
