"""Attention, norms and activations of a training step by the C libraries, beside the dense formulas in float64."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fnlm
from fnlm import attended, clib
from fnlm.clib import build
from fnlm.clib.attend import WIDEST
from fnlm.clib.rows import ACTIVATIONS
from fnlm.random import fold_in, key, normal

pytestmark = pytest.mark.skipif(clib.library("attend").library is None, reason=clib.library("attend").says)
TYPES = [torch.float32, torch.bfloat16]


def drawn(number: int, *shape: int) -> Tensor:
    return normal(fold_in(key(17), number), shape)


def rotation(t: int, r: int) -> tuple[Tensor, Tensor]:
    angle = torch.outer(torch.arange(t), 100.0 ** (-torch.arange(0, r, 2) / r))
    return torch.cat([angle.cos(), angle.cos()], -1), torch.cat([-angle.sin(), angle.sin()], -1)


def how_of(h: int, g: int, k: int, norm: str = "none", t: int = 0, r: int = 0, **more: Any) -> clib.How:
    words = {"scale": k**-0.5, "eps": 1e-5, "rotation": rotation(t, r) if r else None, "first": None, "window": 0}
    return clib.How(heads=h, kv_heads=g, k=k, norm=norm, **words | more)


def dense(qkv: Tensor, how: clib.How) -> Tensor:
    """The formula itself, in the type of qkv."""
    b, t, _ = qkv.shape
    q, k, v = qkv.view(b, t, -1, how.k).transpose(1, 2).split([how.heads, how.kv_heads, how.kv_heads], 1)

    def turned(x: Tensor) -> Tensor:
        if how.norm != "none":
            far = x - x.mean(-1, keepdim=True) if how.norm == "layernorm" else x
            x = far * (far.square().mean(-1, keepdim=True) + how.eps).rsqrt()
        if how.rotation is None:
            return x
        cos, sin = (table.to(x.dtype) for table in how.rotation)
        first, second, rest = x.tensor_split([cos.shape[1] // 2, cos.shape[1]], -1)
        return torch.cat([torch.cat([first, second], -1) * cos + torch.cat([second, first], -1) * sin, rest], -1)

    k, v = (x.repeat_interleave(how.heads // how.kv_heads, 1) for x in (turned(k), v))
    at = torch.arange(t)
    distance = at[:, None] - at
    hidden = (distance < 0) | ((distance >= how.window) if how.window else False)
    hidden = hidden.expand(b, t, t)
    if how.first is not None:
        hidden = hidden | (at < how.first[..., None])
    scores = (turned(q) @ k.mT * how.scale).masked_fill(hidden[:, None], -torch.inf)
    return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)


FIRST = torch.tensor([[0, 0, 0, 3, 3, 3, 6, 7, 7], [0, 1, 1, 1, 1, 1, 1, 1, 8]]).repeat_interleave(5, 1)
CASES = {
    "heads of 32": (2, 64, how_of(4, 4, 32)),
    "shared keys, odd sizes": (3, 37, how_of(4, 2, 20, "layernorm", 37, 8)),
    "one key head": (1, 33, how_of(3, 1, 16, "rmsnorm", 33, 16)),
    "heads of 64": (2, 100, how_of(2, 2, 64, "layernorm", 100, 64)),
    "a window": (1, 130, how_of(2, 2, 48, t=130, r=48, window=17)),
    "documents": (2, 45, how_of(2, 1, 8, first=FIRST)),
    "documents and a window": (2, 45, how_of(1, 1, 8, first=FIRST, window=3)),
    "one token": (2, 1, how_of(2, 2, 8)),
    "the widest": (1, 40, how_of(1, 1, WIDEST)),
}


def compared(b: int, t: int, how: clib.How, dtype: torch.dtype) -> list[Tensor]:
    """What the library and the formula make of it: y, dy, and the largest differences relative to the largest value."""
    qkv = drawn(1, b, t, (how.heads + 2 * how.kv_heads) * how.k).to(dtype)
    g = drawn(2, b, t, how.heads * how.k).to(dtype)
    y, tops = clib.attend(qkv, how)
    d_qkv = clib.attend_backward(g, qkv, y, tops, how)
    exact = qkv.double().requires_grad_()
    want = dense(exact, how)
    (d_want,) = torch.autograd.grad(want, exact, g.double())
    assert y.dtype == d_qkv.dtype == dtype
    return [(a - b).abs().max() / b.abs().max() for a, b in ((y, want.detach()), (d_qkv, d_want))]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", TYPES)
def test_attention_and_its_gradient(case: str, dtype: torch.dtype) -> None:
    for error in compared(*CASES[case], dtype):
        assert error < (2e-6 if dtype == torch.float32 else 0.012)


@pytest.mark.parametrize("case", ["heads of 32", "shared keys, odd sizes", "one key head", "a window"])
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("pieces", [1, 2, 3])
def test_attention_behind_a_cache_is_that_of_the_whole_text(case: str, dtype: torch.dtype, pieces: int) -> None:
    """Texts of several lengths, in pieces that end at different places; the cache holds more than they need."""
    b, t, how = CASES[case]
    qkv = drawn(1, b, t, (how.heads + 2 * how.kv_heads) * how.k).to(dtype)
    want, _ = clib.attend(qkv, how)
    k, v = (torch.full((b, how.kv_heads, t + 9, how.k), torch.nan, dtype=dtype) for _ in range(2))
    lengths, past = [t - 5 * row for row in range(b)], [0] * b
    for piece in range(pieces):
        ends = [length * (piece + 1) // pieces for length in lengths]
        counts = [end - start for end, start in zip(ends, past, strict=True)]
        new = torch.full((b, max(counts), qkv.shape[2]), torch.nan, dtype=dtype)
        for row in range(b):
            new[row, : counts[row]] = qkv[row, past[row] : ends[row]]
        before = [x.clone() for x in (k, v)]
        got = clib.attend_cached(new, k, v, past, counts, how)
        one = clib.attend_cached(new, *before, past, counts, how, last=True)
        for row in range(b):
            close = {"rtol": 2e-5, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 2**-5, "atol": 0.02}
            torch.testing.assert_close(got[row, : counts[row]], want[row, past[row] : ends[row]], **close)
            assert torch.equal(one[row, counts[row] - 1], got[row, counts[row] - 1])
        past = ends
    for row, length in enumerate(lengths):
        assert k[row, :, :length].isfinite().all()
        assert k[row, :, length:].isnan().all()
        value = qkv[row, :length, (how.heads + how.kv_heads) * how.k :].unflatten(-1, (-1, how.k)).transpose(0, 1)
        assert torch.equal(v[row, :, :length], value)


def test_a_row_that_rests_keeps_its_cache() -> None:
    qkv, how = drawn(1, 2, 4, 24), how_of(1, 1, 8)
    k, v = drawn(2, 2, 1, 10, 8), drawn(3, 2, 1, 10, 8)
    before = k[1].clone(), v[1].clone()
    y = clib.attend_cached(qkv, k, v, [3, 5], [4, 0], how)
    assert y[0].isfinite().all()
    assert torch.equal(k[1], before[0])
    assert torch.equal(v[1], before[1])


def test_attention_does_not_depend_on_the_threads() -> None:
    b, t, how = CASES["shared keys, odd sizes"]
    qkv, g, out = drawn(1, b, t, 160).bfloat16(), drawn(2, b, t, 80).bfloat16(), []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        y, tops = clib.attend(qkv, how)
        out.append((y, clib.attend_backward(g, qkv, y, tops, how)))
    torch.set_num_threads(1)
    assert all(torch.equal(a, b) for a, b in zip(*out, strict=True))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_what_is_not_finite_is_seen_by_those_who_see_it_alone(bad: float) -> None:
    qkv, how = drawn(1, 1, 40, 24), how_of(1, 1, 8)
    qkv[0, 20, :16] = bad
    y, _ = clib.attend(qkv, how)
    assert y[0, :20].isfinite().all()
    assert not y[0, 20].isfinite().any()


NORMAL = {"gelu": F.gelu, "gelu-tanh": lambda x: F.gelu(x, approximate="tanh"), "relu": F.relu,
          "relu2": lambda x: F.relu(x).square(), "swiglu": F.silu}  # fmt: skip


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("kind", ACTIVATIONS)
def test_activations_and_their_gradients(kind: str, dtype: torch.dtype) -> None:
    a, g = (3 * drawn(3, 70, 64)).to(dtype), drawn(4, 70, 64).to(dtype)
    a[0] = torch.linspace(-50, 50, 64).to(dtype)
    inner = [a, drawn(5, 70, 64).to(dtype)] if kind == "swiglu" else [a]
    exact = [x.double().requires_grad_() for x in inner]
    want = NORMAL[kind](exact[0]) * (exact[1] if kind == "swiglu" else 1)
    d_want = torch.autograd.grad(want, exact, g.double())
    y, factors = clib.activated_with_factors(kind, *inner)
    again, grads = clib.activate_backward(kind, g, *inner)
    assert torch.equal(y, again)
    assert torch.equal(y, clib.activated(kind, *inner))
    close = {"rtol": 2e-6, "atol": 6e-6} if dtype == torch.float32 else {"rtol": 2**-8, "atol": 1e-5}
    loose = {"rtol": 2**-6, "atol": 1e-5} if dtype == torch.bfloat16 else close  # two roundings
    torch.testing.assert_close(y.double(), want.detach(), **close)
    for d, factor, d_exact in zip(grads, factors, d_want, strict=True):
        torch.testing.assert_close(d.double(), d_exact, **close)
        torch.testing.assert_close((g * factor).double(), d_exact, **loose)


@pytest.mark.parametrize("kind", ACTIVATIONS)
def test_activations_keep_what_is_no_number(kind: str) -> None:
    a = torch.full((64,), torch.nan)
    assert clib.activated(kind, a, *([torch.ones(64)] if kind == "swiglu" else [])).isnan().all()


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("kind", ["layernorm", "rmsnorm"])
@pytest.mark.parametrize("weights", [0, 1, 2])
@pytest.mark.parametrize("rows", [1, 64, 150])
def test_norms_and_their_gradients(kind: str, weights: int, rows: int, dtype: torch.dtype) -> None:
    x, g, more = (drawn(i, rows, 96).to(dtype) + 0.5 for i in range(3))
    weight, bias = (drawn(9 + i, 96).to(dtype) if i < weights else None for i in range(2))
    exact = [v.double().requires_grad_() for v in (x, weight, bias) if v is not None]
    norm = F.layer_norm if kind == "layernorm" else F.rms_norm
    want = norm(exact[0], (96,), eps=1e-5)
    want = want * (exact[1] if weights else 1) + (exact[2] if weights > 1 else 0)
    d_x, *d_weights = torch.autograd.grad(want, exact, g.double())
    y, stats = clib.normed(x, weight, bias, kind, 1e-5)
    grads = clib.norm_backward(g.clone(), x, stats, weight, bias, kind, more)
    close = {"rtol": 1e-5, "atol": 3e-5} if dtype == torch.float32 else {"rtol": 2**-7, "atol": 0.02}
    torch.testing.assert_close(y.double(), want.detach(), **close)
    for got, expected in zip(grads, [d_x + more, *d_weights], strict=False):
        assert got is not None
        torch.testing.assert_close(got.double(), expected, **close)
    assert sum(x is not None for x in grads) == 1 + weights


def test_rows_of_other_kinds_are_left_to_torch() -> None:
    x = torch.ones(4, 64)
    assert clib.has_rows(x, None, torch.ones(64))
    others = [x.double(), x.half(), x[:, :5], x.T, torch.ones(4, 65)]
    assert not any(clib.has_rows(other) for other in others)
    assert not clib.has_rows(x, torch.ones(64).bfloat16())
    assert not clib.can_attend(x.double(), 32)
    assert not clib.can_attend(x, WIDEST + 1)


def test_compiled_blocks_are_left_to_the_compiler() -> None:
    cfg, x = fnlm.PRESETS["shakespeare-char-cpu"], torch.ones(1)
    assert attended.suits(x, cfg, fnlm.Compute())
    assert not attended.suits(x, cfg, fnlm.Compute(compile="block"))
    assert not attended.suits(x, cfg, fnlm.Compute(kernels="plain"))


SMALL = {"vocab_size": 61, "n_layers": 2, "n_heads": 4, "d_model": 64, "seq_len": 48, "norm_eps": 1e-3}
MODELS = [
    {},
    {"bias": True, "mlp": "gelu-tanh"},
    {"norm": "rmsnorm", "mlp": "swiglu", "positions": "rope", "n_kv_heads": 2},
    {"norm_affine": False, "embed_norm": True, "qk_norm": True, "mlp": "relu2", "positions": "rope", "tied": False},
    {"qk_norm": True, "norm": "rmsnorm", "mlp": "relu"},  # its norm has weights: attention is torch's
    {"parallel_residual": True, "positions": "rope", "rope_fraction": 0.5, "window": 7},
    {"positions": "alibi"},
    {"init": "mup", "mup_base": 32},
    {"d_model": 36, "d_ff": 50, "bias": True},  # rows of no whole vectors
]


@pytest.mark.parametrize("changes", MODELS)
@pytest.mark.parametrize("documents", [False, True])
def test_a_model_and_its_gradients_are_those_of_plain_operations(changes: dict[str, Any], documents: bool) -> None:
    cfg = fnlm.ModelConfig(**SMALL | changes)
    params = {
        n: p + 0.1 * normal(fold_in(key(5), i), p.shape)
        for i, (n, p) in enumerate(fnlm.init_params(cfg, key(0)).items())
    }
    tokens = (drawn(8, 3, 49) * 1000).long() % 61
    batch = fnlm.Batch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous(), torch.ones(3, 48))
    got, want = (
        fnlm.value_and_grad(
            fnlm.make_lm_loss(cfg, fnlm.Compute(kernels=kernels, document_end=7 if documents else None))
        )(params, batch)
        for kernels in ("auto", "plain")
    )
    torch.testing.assert_close(got[0], want[0], rtol=1e-5, atol=0)
    for name, grad in want[1].items():
        torch.testing.assert_close(got[1][name], grad, rtol=1e-3, atol=2e-5 * float(grad.abs().max()) + 1e-7, msg=name)


def test_attention_by_the_library_refuses_a_second_derivative() -> None:
    qkv = drawn(1, 1, 8, 24).requires_grad_()
    (d,) = torch.autograd.grad(attended.attended(qkv, how_of(1, 1, 8)).sum(), qkv)
    assert d.shape == qkv.shape
    with pytest.raises(RuntimeError, match="differentiable once"):
        torch.autograd.grad(attended.attended(qkv, how_of(1, 1, 8)).sum(), qkv, create_graph=True)


SCRIPT = """
import sys, torch
from fnlm.clib import build
compiled = build.built
build.built = lambda name, compiler, *rest: compiled(name, compiler, options=["-DFNLM_PORTABLE"])
build._openmp = lambda: (None, None)
torch.set_num_threads(2)
from tests.test_clib_train import CASES, TYPES, compared, test_norms_and_their_gradients as norms
from tests.test_clib_train import ACTIVATIONS, test_activations_and_their_gradients as activations
for dtype in TYPES:
    for case in CASES.values():
        assert max(map(float, compared(*case, dtype))) < (2e-6 if dtype == torch.float32 else 0.012)
    for kind in ACTIVATIONS:
        activations(kind, dtype)
    norms("layernorm", 2, 150, dtype)
"""


@pytest.mark.slow
def test_without_the_processors_vectors_and_with_threads_of_its_own() -> None:
    assert shutil.which("cc") or shutil.which("gcc")
    done = subprocess.run([sys.executable, "-c", SCRIPT], env=os.environ, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert build.library("attend").library is not None
