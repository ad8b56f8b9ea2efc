"""The loss: the plain formula against loops; the fused one, its gradients and its refusals against the plain one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import fnlm
from fnlm.losses import cross_entropy, fused_cross_entropy
from fnlm.params import shapes
from tests import reference
from tests.reference import BASE, CASES, random_params, random_tokens

# torch.func.jvp itself imports scripts of torch.jit, once a process
JVP = pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")

Gradients = tuple[Tensor, dict[str, Tensor]]


def close(a: Tensor, b: Tensor, atol: float = 1e-10) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=atol)


def case(name: str, **more: Any) -> fnlm.ModelConfig:
    return fnlm.ModelConfig(**{**BASE, **CASES[name], **more})


def a_batch(vocab_size: int, b: int, t: int, weights: str = "mask", seed: int = 0) -> fnlm.Batch:
    g = torch.Generator().manual_seed(seed)
    w = {
        "ones": torch.ones(b, t),
        "mask": (torch.rand(b, t, generator=g) < 0.6).float(),
        "real": torch.rand(b, t, generator=g),
        "none": torch.zeros(b, t),
    }[weights]
    return fnlm.Batch(random_tokens(vocab_size, b, t, seed), random_tokens(vocab_size, b, t, seed + 1), w)


def grads_of(loss: Tensor, params: dict[str, Tensor]) -> dict[str, Tensor]:
    found = torch.autograd.grad(loss, list(params.values()), materialize_grads=True)
    return dict(zip(params, found, strict=True))


def lm(params: dict[str, Tensor], batch: fnlm.Batch, cfg: fnlm.ModelConfig, **compute: Any) -> Gradients:
    live = {k: v.detach().requires_grad_() for k, v in params.items()}
    loss = fnlm.lm_loss(live, batch, cfg, compute=fnlm.Compute(**compute))
    return loss.detach(), grads_of(loss, live)


@pytest.mark.parametrize("weights", ["ones", "mask", "real", "none"])
@pytest.mark.parametrize("name", ["plain", "softcap", "mup-all"])
@pytest.mark.parametrize("kernels", ["auto", "plain", "sdpa"])
def test_loss_is_that_of_the_reference(name: str, weights: str, kernels: str) -> None:
    cfg, batch = case(name), a_batch(11, 2, 5, weights)
    params = random_params(shapes(cfg))
    got = fnlm.lm_loss(params, batch, cfg, compute=fnlm.Compute(kernels=kernels))
    assert got.shape == ()
    assert got.dtype == torch.float64
    want = reference.loss(reference.logits(params, batch.tokens, cfg), batch.targets, batch.weights)
    close(got, want)


@pytest.mark.parametrize("name", ["plain", "softcap", "mup", "mup-all", "untied", "ngrams", "llama"])
@pytest.mark.parametrize("chunks", [None, 1, 2, 3, 7, 20, 100])
def test_fused_equals_plain_in_float64(name: str, chunks: int | None) -> None:
    cfg, batch = case(name), a_batch(11, 4, 5)
    params = random_params(shapes(cfg))
    value, grads = lm(params, batch, cfg, kernels="plain")
    got, got_grads = lm(params, batch, cfg, loss_chunks=chunks)
    close(got, value)
    assert any(g.abs().max() > 1e-3 for g in grads.values())
    for key, g in grads.items():
        close(got_grads[key], g)


@settings(max_examples=80)
@given(
    st.integers(1, 3), st.integers(1, 6), st.integers(2, 9), st.integers(1, 25),
    st.sampled_from(["ones", "mask", "real", "none"]), st.sampled_from([None, 0.5, 30.0]),
    st.sampled_from(["gpt2", "mup"]),
    st.floats(-3, 3),
)  # fmt: skip
def test_fused_kernel_equals_plain(
    b: int, t: int, v: int, chunks: int, weights: str, cap: float | None, init: Any, ahead: float
) -> None:
    cfg = case("plain", vocab_size=v, logit_softcap=cap, init=init, mup_base=5, d_model=8)
    g = torch.Generator().manual_seed(b * 7 + t)
    x, w = (torch.randn(*s, 8, generator=g, dtype=torch.float64).requires_grad_() for s in ((b, t), (v,)))
    batch = a_batch(v, b, t, weights, seed=t)
    raw = x @ w.T * (5 / 8 if init == "mup" else 1)
    want = cross_entropy(raw if cap is None else cap * (raw / cap).tanh(), batch.targets, batch.weights)
    got = fused_cross_entropy(x, w, batch.targets, batch.weights, cfg, chunks)
    close(got, want)
    for a, b_ in zip(torch.autograd.grad(got * ahead, (x, w)), torch.autograd.grad(want * ahead, (x, w)), strict=True):
        close(a, b_)


def test_rows_beyond_one_cache_piece_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    from fnlm import losses

    cfg, batch = case("softcap"), a_batch(11, 4, 5)
    params = random_params(shapes(cfg))
    value, grads = lm(params, batch, cfg, kernels="plain")
    for size in (1, 100, 4 * 11 * 3):
        monkeypatch.setattr(losses, "CACHE_BYTES", size)
        monkeypatch.setattr(losses, "CHUNK_BYTES", size)
        monkeypatch.setattr(losses, "MIN_CHUNK", 1)
        got, got_grads = lm(params, batch, cfg)
        close(got, value)
        for key, g in grads.items():
            close(got_grads[key], g)


@pytest.mark.parametrize("name", ["plain", "softcap", "mup-all"])
def test_bfloat16_fused_is_as_near_to_the_truth_as_plain(name: str) -> None:
    """Measured against float64 on the same rounded numbers: relative errors of a few bfloat16 ulps (2**-8)."""
    cfg = case(name, vocab_size=300)
    batch, g = a_batch(300, 4, 13), torch.Generator().manual_seed(0)
    x = torch.randn(4, 13, 16, generator=g).bfloat16()
    w = torch.randn(300, 16, generator=g).bfloat16()

    def both(dtype: torch.dtype, fused: bool, chunks: int | None = None) -> list[Tensor]:
        a, b = x.to(dtype).requires_grad_(), w.to(dtype).requires_grad_()
        if fused:
            loss = fused_cross_entropy(a, b, batch.targets, batch.weights, cfg, chunks)
        else:
            loss = cross_entropy(fnlm.losses.unembed(a, b, cfg), batch.targets, batch.weights)
        return [loss.detach().double(), *(d.double() for d in torch.autograd.grad(loss, (a, b)))]

    truth = both(torch.float64, False)
    for chunks in (1, 4):
        for got, want in zip(both(torch.bfloat16, True, chunks), truth, strict=True):
            assert float((got - want).norm() / want.norm()) < 0.012
    loss = both(torch.bfloat16, True)[0]
    close(loss, both(torch.bfloat16, False)[0], 1e-3 * float(loss))


def test_all_masked_gives_zero_and_zero_gradients() -> None:
    cfg, batch = case("plain"), a_batch(11, 3, 5, "none")
    for kernels in ("auto", "plain", "sdpa"):
        for dtype in (torch.float64, torch.float32, torch.bfloat16):
            value, grads = lm(random_params(shapes(cfg), dtype=dtype), batch, cfg, kernels=kernels)
            assert float(value) == 0
            assert all(bool((g == 0).all()) for g in grads.values())


def test_what_is_masked_does_not_count() -> None:
    cfg, batch = case("llama"), a_batch(11, 3, 5)
    params = random_params(shapes(cfg))
    other = batch._replace(targets=torch.where(batch.weights > 0, batch.targets, (batch.targets + 3) % 11))
    for kernels in ("auto", "plain"):
        (a, da), (b, db) = lm(params, batch, cfg, kernels=kernels), lm(params, other, cfg, kernels=kernels)
        close(a, b, 1e-13)
        assert all(torch.allclose(da[k], db[k], atol=1e-13) for k in da)


def test_weights_count_as_repetitions_do() -> None:
    cfg, batch = case("plain"), a_batch(11, 2, 5, "ones")
    params = random_params(shapes(cfg))
    twice = fnlm.Batch(*(torch.cat([x, x[:1]]) for x in batch))
    heavy = batch._replace(weights=torch.tensor([[2.0], [1.0]]).expand(2, 5))
    close(fnlm.lm_loss(params, twice, cfg), fnlm.lm_loss(params, heavy, cfg), 1e-13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", [1e4, -1e4])
def test_extreme_logits_stay_finite(dtype: torch.dtype, scale: float) -> None:
    cfg = case("plain", d_model=4, vocab_size=5)
    x = torch.eye(4)[None].to(dtype).requires_grad_()
    w = (torch.randn(5, 4, generator=torch.Generator().manual_seed(0)) * scale).to(dtype).requires_grad_()
    targets, weights = torch.tensor([[0, 1, 2, 4]]), torch.ones(1, 4)
    for chunks in (1, 4):
        loss = fused_cross_entropy(x, w, targets, weights, cfg, chunks)
        want = cross_entropy(x @ w.T, targets, weights)
        assert loss.isfinite()
        assert float(loss.detach()) == pytest.approx(float(want.detach()), rel=1e-2, abs=1e-3)
        if dtype != torch.float16:  # there a gradient of 1e4, kept multiplied by a loss scale, may overflow
            for g in torch.autograd.grad(loss, (x, w)):
                assert g.isfinite().all()


def test_two_words() -> None:
    cfg, batch = case("plain", vocab_size=2), a_batch(2, 2, 5)
    params = random_params(shapes(cfg))
    (a, da), (b, db) = lm(params, batch, cfg), lm(params, batch, cfg, kernels="plain")
    close(a, b)
    assert all(torch.allclose(da[k], db[k], rtol=0, atol=1e-10) for k in da)


def test_uniform_logits_cost_the_logarithm_of_the_vocabulary() -> None:
    assert float(cross_entropy(torch.zeros(2, 3, 50), torch.zeros(2, 3, dtype=torch.long))) == pytest.approx(3.912023)


@JVP
def test_second_derivatives() -> None:
    """Autograd's own double backward: refused by the fused kernels, right with plain ones; torch.func agrees."""
    cfg, batch = case("rope-half", n_layers=1), a_batch(11, 2, 4)
    params = random_params(shapes(cfg))
    direction = random_params(shapes(cfg), seed=9)

    def hvp(kernels: Any) -> dict[str, Tensor]:
        live = {k: v.clone().requires_grad_() for k, v in params.items()}
        loss = fnlm.lm_loss(live, batch, cfg, compute=fnlm.Compute(kernels=kernels))
        grads = torch.autograd.grad(loss, list(live.values()), create_graph=True)
        along = sum((g * d).sum() for g, d in zip(grads, direction.values(), strict=True))
        return dict(zip(live, torch.autograd.grad(along, list(live.values())), strict=True))

    with pytest.raises(RuntimeError, match="once"):
        hvp("auto")
    want = hvp("plain")
    gradient = torch.func.grad(lambda p: fnlm.lm_loss(p, batch, cfg))
    _, got = torch.func.jvp(gradient, (params,), (direction,))
    for key, g in want.items():
        close(got[key], g)


@pytest.mark.parametrize("kernels", ["auto", "plain"])
def test_make_lm_loss_is_lm_loss(kernels: str) -> None:
    cfg, batch = case("llama", dropout_residual=0.2), a_batch(11, 2, 5)
    params, compute = random_params(shapes(cfg)), fnlm.Compute(kernels=kernels)
    loss = fnlm.make_lm_loss(cfg, compute)
    assert torch.equal(loss(params, batch), fnlm.lm_loss(params, batch, cfg, compute=compute))
    assert torch.equal(loss(params, batch, None), fnlm.lm_loss(params, batch, cfg, compute=compute))
    with_key = fnlm.lm_loss(params, batch, cfg, key=fnlm.key(2), compute=compute)
    assert torch.equal(loss(params, batch, fnlm.key(2)), with_key)
    seen = []

    def use(group: str, mine: fnlm.Params) -> fnlm.Params:
        seen.append(group)
        return mine

    loss(params, batch, None, use)
    assert seen == ["root", "blocks.0", "blocks.1"]


def test_a_float32_model_reports_float32_and_a_bfloat16_one_too() -> None:
    cfg, batch = case("plain"), a_batch(11, 2, 5)
    for dtype in (torch.float32, torch.bfloat16):
        for kernels in ("auto", "plain"):
            params = random_params(shapes(cfg), dtype=dtype)
            assert fnlm.lm_loss(params, batch, cfg, compute=fnlm.Compute(kernels=kernels)).dtype == torch.float32


@pytest.mark.parametrize("kernels", ["auto", "plain"])
def test_a_kept_graph_gives_the_same_gradients_again(kernels: Any) -> None:
    """Sums into what the first backward pass handed out must not reach what the next one reads."""
    cfg, batch = case("untied"), a_batch(11, 2, 5)
    live = {k: v.requires_grad_() for k, v in random_params(shapes(cfg)).items()}
    _, want = lm(live, batch, cfg, kernels=kernels)
    loss = fnlm.lm_loss(live, batch, cfg, compute=fnlm.Compute(kernels=kernels))
    for _ in range(3):
        loss.backward(retain_graph=True)
    for key, p in live.items():
        assert p.grad is not None
        close(p.grad, 3 * want[key])
