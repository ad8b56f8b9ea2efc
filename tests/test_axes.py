"""The tensor axis: ranks as threads of one process, each with its part of the weights, together equal one process."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, TypeVar

import pytest
import torch
from torch import Tensor

import fnlm
from fnlm.collectives import Axes, Axis, gather, pmax, psum, pvary, scatter
from fnlm.losses import cross_entropy
from fnlm.params import shapes
from tests.reference import BASE, CASES, random_params, random_tokens

R = TypeVar("R")


class Landing:
    """Nothing has arrived before `wait`: until then the result is nan, so that a forgotten wait shows."""

    def __init__(self, out: Tensor, arrive: Callable[[], Tensor]) -> None:
        self.out, self.arrive = out, arrive
        out.fill_(float("nan"))

    def wait(self) -> None:
        self.out.copy_(self.arrive())


class Meeting:
    """Where `size` threads lay down one tensor each, and each takes them all."""

    def __init__(self, size: int) -> None:
        self.desk: dict[int, Tensor] = {}
        self.barrier = threading.Barrier(size, timeout=20)

    def exchange(self, rank: int, mine: Tensor) -> Tensor:
        self.desk[rank] = mine
        self.barrier.wait()
        everyones = torch.stack([self.desk[r] for r in sorted(self.desk)])
        self.barrier.wait()
        return everyones


class Threads:
    """The wire of one rank."""

    def __init__(self, meeting: Meeting, rank: int) -> None:
        self.meeting, self.rank = meeting, rank

    def all_reduce(self, x: Tensor, op: str) -> Landing:
        mine = x.clone()
        fold = {"sum": lambda t: t.sum(0), "max": lambda t: t.amax(0)}[op]
        return Landing(x, lambda: fold(self.meeting.exchange(self.rank, mine)))

    def all_gather(self, out: Tensor, x: Tensor) -> Landing:
        return Landing(out, lambda: self.meeting.exchange(self.rank, x).flatten())

    def reduce_scatter(self, out: Tensor, x: Tensor) -> Landing:
        def mine() -> Tensor:
            return self.meeting.exchange(self.rank, x).sum(0).view(self.meeting.barrier.parties, -1)[self.rank]

        return Landing(out, mine)


def on_ranks(size: int, fn: Callable[[Axis], R]) -> list[R]:
    """fn(axis) on every rank, in rank order; the first error that is no consequence of another wins."""
    meeting, results, errors = Meeting(size), {}, []

    def body(rank: int) -> None:
        try:
            with torch.autograd.set_multithreading_enabled(False):  # a backward pass stays in its rank's thread
                results[rank] = fn(Axis("tensor", size, rank, Threads(meeting, rank)))
        except BaseException as error:  # noqa: BLE001 (raised again in the main thread)
            errors.append(error)
            meeting.barrier.abort()

    threads = [threading.Thread(target=body, args=(r,), daemon=True) for r in range(size)]
    [t.start() for t in threads]
    [t.join(60) for t in threads]
    first = [e for e in errors if not isinstance(e, threading.BrokenBarrierError)] or errors
    if first:
        raise first[0]
    return [results[r] for r in range(size)]


ROWS = ("attn.q.", "attn.k.", "attn.v.", "mlp.up.", "mlp.gate.")
COLUMNS = ("attn.out.weight", "mlp.down.weight")
VOCABULARY = ("embed.tokens.weight", "head.weight")


def split_dim(name: str) -> int | None:
    if name in VOCABULARY or any(part in name for part in ROWS):
        return 0
    return 1 if name.endswith(COLUMNS) else None


def bounds(name: str, n: int, axis_size: int) -> list[tuple[int, int]]:
    """Heads and the MLP's width divide; the vocabulary goes in parts of ceil(V / ranks)."""
    step = -(-n // axis_size)
    assert name in VOCABULARY or n % axis_size == 0, f"{name}: {n}"
    return [(min(r * step, n), min((r + 1) * step, n)) for r in range(axis_size)]


def part_of(params: fnlm.Params, axis: Axis) -> fnlm.Params:
    out = {}
    for name, p in params.items():
        dim = split_dim(name)
        if dim is not None:
            lo, hi = bounds(name, p.shape[dim], axis.size)[axis.index]
            p = p.narrow(dim, lo, hi - lo)
        out[name] = p.detach().clone()
    return out


def joined(parts: list[fnlm.Params]) -> fnlm.Params:
    """The whole of what ranks hold; what is not split must be the same everywhere."""
    out = {}
    for name in parts[0]:
        dim, values = split_dim(name), [p[name] for p in parts]
        if dim is None:
            for v in values[1:]:
                torch.testing.assert_close(v, values[0], rtol=0, atol=1e-10, msg=lambda m, name=name: f"{name}: {m}")
        out[name] = values[0] if dim is None else torch.cat(values, dim)
    return out


# 6 heads and an MLP of 24 divide by 2 and by 3; a vocabulary of 11 does by neither.
SIZES: dict[str, Any] = {**BASE, "n_heads": 6, "d_model": 12, "d_ff": 24}
ON_AXES: dict[str, dict[str, Any]] = {
    "gpt2": {"bias": True, "mlp": "gelu-tanh"},
    "untied": {"tied": False, "positions": "rope"},
    "llama": {**CASES["llama"], "d_ff": 24, "n_kv_heads": 6},
    "gqa": {"n_heads": 12, "d_model": 24, "n_kv_heads": 6, "positions": "rope", "window": 3},
    "parallel": {"parallel_residual": True, "bias": True, "positions": "none"},
    "softcap-mup": {"logit_softcap": 2.0, "init": "mup", "mup_base": 8},
    "ngrams": {"ngrams": ((2, 144), (3, 9)), "embed_norm": True},
    "qk-norm": {"qk_norm": True, "positions": "rope"},
    "qk-layernorm": {"qk_norm": True, "bias": True},
    "alibi": {"positions": "alibi"},
    "window": {"window": 2},
}
KERNELS = ("auto", "plain", "sdpa")


def config(name: str, **more: Any) -> fnlm.ModelConfig:
    return fnlm.ModelConfig(**{**SIZES, **ON_AXES[name], **more})


def a_batch(vocab: int = 11) -> fnlm.Batch:
    weights = (torch.arange(7) < torch.tensor([[4], [7]])).double()
    return fnlm.Batch(random_tokens(vocab, 2, 7), random_tokens(vocab, 2, 7, 1), weights)


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("name", ON_AXES)
def test_logits_loss_and_gradients_equal_one_process(name: str, size: int, kernels: Any) -> None:
    cfg, compute = config(name), fnlm.Compute(kernels=kernels)
    params, batch = random_params(shapes(cfg)), a_batch()

    def rank(axis: Axis) -> tuple[Tensor, Tensor, fnlm.Params]:
        mine = part_of(params, axis)
        axes = Axes(tensor=axis)
        logits = fnlm.forward(mine, batch.tokens, cfg, axes=axes, compute=compute)
        loss, grads = fnlm.value_and_grad(fnlm.make_lm_loss(cfg, compute, axes))(mine, batch)
        return logits, loss, grads

    logits, losses, grads = zip(*on_ranks(size, rank), strict=True)
    want, want_grads = fnlm.value_and_grad(fnlm.make_lm_loss(cfg, compute))(params, batch)
    torch.testing.assert_close(
        torch.cat(logits, -1), fnlm.forward(params, batch.tokens, cfg, compute=compute), rtol=0, atol=1e-10
    )
    for loss in losses:
        torch.testing.assert_close(loss, want, rtol=0, atol=1e-10)
    for key, g in joined(list(grads)).items():
        torch.testing.assert_close(g, want_grads[key], rtol=0, atol=1e-10, msg=lambda m, key=key: f"{key}: {m}")


@pytest.mark.parametrize(("vocab", "size"), [(11, 2), (11, 3), (10, 3), (4, 3), (2, 3), (5, 4)])
@pytest.mark.parametrize("tied", [True, False])
def test_any_vocabulary_on_any_number_of_ranks(vocab: int, size: int, tied: bool) -> None:
    """Parts may be short, and with 4 words on 3 ranks (2, 2, 0) empty."""
    cfg = fnlm.ModelConfig(**{**SIZES, "vocab_size": vocab, "tied": tied, "n_heads": 12, "d_model": 12})
    params, batch = random_params(shapes(cfg)), a_batch(vocab)

    def rank(axis: Axis) -> tuple[Tensor, fnlm.Params]:
        loss = fnlm.make_lm_loss(cfg, axes=Axes(tensor=axis))
        return fnlm.value_and_grad(loss)(part_of(params, axis), batch)

    losses, grads = zip(*on_ranks(size, rank), strict=True)
    want, want_grads = fnlm.value_and_grad(fnlm.make_lm_loss(cfg))(params, batch)
    assert all(abs(float(loss - want)) < 1e-10 for loss in losses)
    for key, g in joined(list(grads)).items():
        torch.testing.assert_close(g, want_grads[key], rtol=0, atol=1e-10)


@pytest.mark.parametrize("site", ["dropout_embed", "dropout_residual", "dropout_ngram", "dropout_attn"])
def test_dropout_is_the_same_on_any_number_of_ranks(site: str) -> None:
    cfg = config("ngrams", **{site: 0.4})
    params, tokens = random_params(shapes(cfg)), a_batch().tokens
    want = fnlm.forward(params, tokens, cfg, key=fnlm.key(2))
    for size in (2, 3):
        parts = on_ranks(
            size, lambda a: fnlm.forward(part_of(params, a), tokens, cfg, key=fnlm.key(2), axes=Axes(tensor=a))
        )
        torch.testing.assert_close(torch.cat(parts, -1), want, rtol=0, atol=1e-10)


def test_remat_on_ranks() -> None:
    cfg = config("llama", dropout_residual=0.2)
    params, batch, results = random_params(shapes(cfg)), a_batch(), []
    for remat in ("none", "block"):
        compute = fnlm.Compute(remat=remat)

        def rank(axis: Axis, compute: fnlm.Compute = compute) -> tuple[Tensor, fnlm.Params]:
            loss = fnlm.make_lm_loss(cfg, compute, Axes(tensor=axis))
            return fnlm.value_and_grad(loss)(part_of(params, axis), batch, fnlm.key(1))

        results.append(on_ranks(2, rank))
    for (a, da), (b, db) in zip(*results, strict=True):
        assert float(a) == float(b)
        assert all(torch.allclose(da[k], db[k], rtol=0, atol=1e-12) for k in da)


@pytest.mark.parametrize("size", [2, 3])
def test_split_cross_entropy_with_huge_logits(size: int) -> None:
    logits = torch.randn(2, 5, 11, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 1e4
    targets, weights = random_tokens(11, 2, 5), torch.rand(2, 5, generator=torch.Generator().manual_seed(1)).double()
    want = cross_entropy(logits, targets, weights)

    def rank(axis: Axis) -> Tensor:
        lo, hi = bounds("head.weight", 11, size)[axis.index]
        return cross_entropy(logits[..., lo:hi], targets, weights, axes=Axes(tensor=axis), vocab_size=11)

    for got in on_ranks(size, rank):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=0)


def test_all_masked_on_ranks() -> None:
    cfg = config("gpt2")
    params, batch = random_params(shapes(cfg)), a_batch()._replace(weights=torch.zeros(2, 7))
    for loss, grads in on_ranks(
        2, lambda a: fnlm.value_and_grad(fnlm.make_lm_loss(cfg, axes=Axes(tensor=a)))(part_of(params, a), batch)
    ):
        assert float(loss) == 0
        assert all(not g.any() for g in grads.values())


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("dim", [0, 1, -1])
def test_collectives_and_their_transposes(size: int, dim: int) -> None:
    """Each is linear, and its gradient is its transpose: <f(x), y> = <x, f'(y)>, summed over the ranks."""
    g = torch.Generator().manual_seed(0)
    shape = [2, 6, 6]
    xs = [torch.randn(shape, generator=g, dtype=torch.float64) for _ in range(size)]
    shape[dim] *= size
    wide = [torch.randn(shape, generator=g, dtype=torch.float64) for _ in range(size)]
    assert torch.equal(on_ranks(size, lambda a: gather(xs[a.index], a, dim))[0], torch.cat(xs, dim))
    for r, got in enumerate(on_ranks(size, lambda a: scatter(wide[a.index], a, dim))):
        torch.testing.assert_close(got, sum(wide).chunk(size, dim)[r], rtol=0, atol=1e-12)
    for got in on_ranks(size, lambda a: pmax(xs[a.index], a)):
        assert torch.equal(got, torch.stack(xs).amax(0))

    def transpose(axis: Axis, f: Callable[..., Tensor], x: list[Tensor], y: list[Tensor]) -> tuple[Tensor, Tensor]:
        mine = x[axis.index].clone().requires_grad_()
        out = f(mine, axis, dim)
        (back,) = torch.autograd.grad(out, mine, y[axis.index])
        return (out * y[axis.index]).sum().detach(), (back * x[axis.index]).sum()

    for f, x, y in ((gather, xs, wide), (scatter, wide, xs)):
        pairs = on_ranks(size, lambda a, f=f, x=x, y=y: transpose(a, f, x, y))
        torch.testing.assert_close(sum(p for p, _ in pairs), sum(q for _, q in pairs), rtol=1e-12, atol=0)


def test_psum_and_pvary() -> None:
    xs = [torch.arange(3.0) + r for r in range(3)]

    def rank(axis: Axis) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        x, y = (xs[axis.index].clone().requires_grad_() for _ in range(2))
        summed, varied = psum(x, axis), pvary(y, axis)
        ones = torch.ones(3)
        return summed, torch.autograd.grad(summed, x, ones)[0], varied, torch.autograd.grad(varied, y, ones)[0]

    for r, (summed, d_summed, varied, d_varied) in enumerate(on_ranks(3, rank)):
        assert torch.equal(summed, sum(xs))
        assert torch.equal(d_summed, torch.ones(3))
        assert torch.equal(varied, xs[r])
        assert torch.equal(d_varied, torch.full((3,), 3.0))


def test_without_an_axis_nothing_is_copied() -> None:
    x = torch.ones(2)
    assert psum(x, None) is pvary(x, None) is gather(x, None, 0) is scatter(x, None, 0) is x
    assert torch.equal(pmax(x, None), x)


def test_an_indivisible_scatter_is_refused() -> None:
    with pytest.raises(ValueError, match="dimension 1 of size 5 is not divisible by tensor=2"):
        on_ranks(2, lambda a: scatter(torch.ones(2, 5), a, 1))


def test_ranks_that_disagree_fail_and_do_not_hang() -> None:
    def rank(axis: Axis) -> Tensor:
        if axis.index == 1:
            raise RuntimeError("this rank fails")
        return psum(torch.ones(1), axis)

    with pytest.raises(RuntimeError, match="this rank fails"):
        on_ranks(2, rank)


def test_every_split_covers_the_whole() -> None:
    params = random_params(shapes(config("gpt2")))
    for size in (1, 2, 3):
        axes = [Axis("tensor", size, r, Threads(Meeting(size), r)) for r in range(size)]
        whole = joined([part_of(params, a) for a in axes])
        assert all(torch.equal(whole[k], params[k]) for k in params)
