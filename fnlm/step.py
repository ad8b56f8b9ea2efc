"""The training step: one text for every precision and every strategy.

Differentiation is `torch.autograd.grad` on leaves made once a step; `torch.func.grad` would keep the graph of the
backward pass alive (a quarter more memory) and is for analysis.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge

from fnlm import optim, random, tree
from fnlm.config import Precision, did_you_mean
from fnlm.forward import Use, identity
from fnlm.links import Here, Link, Ranks
from fnlm.machine import keep_freed_memory
from fnlm.types import Batch, Key, Params, TrainState, Transform, Tree

DTYPES: dict[str, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
Metrics = dict[str, Tensor]


class Loss(Protocol):
    """What is minimised: loss(params, batch, key, use) -> 0-d mean over the batch's weighted tokens.

    `key` is (2,), or (B, 2), one per row, where the batch is cut into micro-batches: `forward` takes both.
    """

    def __call__(self, params: Params, batch: Batch, key: Key | None, use: Use, /) -> Tensor: ...


@dataclass(frozen=True)
class Plan:
    """How a step is carried out: the dtype parameters compute in, the pieces a batch is cut into, and donation.

    Parameters rest in their own dtype (float32); they are cast once a step, and the loss is computed in float32.
    `keep_memory`: on a CPU, the first step calls `fnlm.machine.keep_freed_memory`, which holds for the whole process.
    `fp16` scales the loss; an overflow halves the scale and skips the step, `scale_every` good steps double it.
    `ranks`: who else takes part in the step (None: nobody); then the batch that is given is that of all.
    """

    precision: Precision = "fp32"
    micro_batches: int = 1
    donate: bool = True
    keep_memory: bool = True
    use: Use = identity
    scale_every: int = 2000
    ranks: Ranks | None = None

    def __post_init__(self) -> None:
        if self.precision not in DTYPES:
            raise ValueError(f"precision={self.precision!r} is unknown{did_you_mean(self.precision, list(DTYPES))}")
        if self.micro_batches < 1:
            raise ValueError(f"micro_batches={self.micro_batches} must be at least 1")


class LossScale(NamedTuple):
    """The state of fp16 training: the factor, the good steps since it changed, and the optimizer's own state."""

    scale: Tensor
    good: Tensor
    inner: Tree


def init_state(params: Params, optimizer: Transform, plan: Plan = Plan(), key: Key | None = None) -> TrainState:
    """The state before the first step; it holds copies, so donating it later leaves `params` as they are."""
    own = {name: p.detach().clone() for name, p in params.items()}
    opt_state = optimizer.init(own)
    if plan.precision == "fp16":
        device = next(iter(own.values())).device
        opt_state = LossScale(torch.tensor(2.0**16, device=device), torch.tensor(0, device=device), opt_state)
    return TrainState(torch.tensor(0), own, opt_state, random.key(0) if key is None else key)


def value_and_grad(loss: Loss, plan: Plan = Plan()) -> Callable[..., tuple[Tensor, Params]]:
    """The loss and its gradients over micro-batches: (params, batch, key=None, scale=None) -> (loss, grads).

    `batch` is a Batch, cut into `plan.micro_batches` pieces by rows, or a list of Batches. Each piece counts by its
    weights, so ragged and masked pieces give what one big batch gives. Gradients are in the dtype computed in, for one
    piece, or float32 sums for several, and multiplied by `scale` where given. Inputs are not changed.
    """

    def run(
        params: Params, batch: Batch | Sequence[Batch], key: Key | None = None, scale: Tensor | None = None
    ) -> tuple[Tensor, Params]:
        pieces = _pieces(batch, plan.micro_batches)
        ranks, one = plan.ranks, plan.ranks is None and len(pieces) == 1
        keys = _sample_keys(key, pieces, one)
        link: Link = Here(plan.use) if ranks is None else ranks.link(params)
        shared = _live(params, plan.precision)
        if one:
            return _one(loss, shared, pieces[0], keys[0], link, scale)
        if ranks is not None:
            pieces, keys = map(list, zip(*map(ranks.mine, pieces, keys), strict=True))
        shares = _shares(pieces, ranks)
        grads: Params = {}
        value = torch.zeros((), dtype=max((_wide(p.dtype) for p in params.values()), key=lambda d: d.itemsize))
        for i, (piece, k, share) in enumerate(zip(pieces, keys, shares.to(value.dtype), strict=True)):
            factor, last = share if scale is None else share * scale, i == len(pieces) - 1
            part, part_grads = _one(loss, dict(shared), piece, k, link, factor, last)
            value = value + part * share
            _add_grads(grads, part_grads)
        return value if ranks is None else ranks.total(value), grads

    return run


def _shares(pieces: list[Batch], ranks: Ranks | None) -> Tensor:
    """What each piece counts for: its part of all weights, of all ranks, float64."""
    parts = torch.stack([p.weights.sum(dtype=torch.float64) for p in pieces])
    whole = parts.sum() if ranks is None else ranks.total(parts.sum())
    return parts / torch.where(whole > 0, whole, 1)


def _add_grads(sums: Params, grads: Params) -> None:
    """Add to the sums, float32 at least, and use up `grads`; what autograd gave may be shared: it is not written to."""
    for name in list(grads):
        g = grads.pop(name)
        sums[name] = sums[name] + g if name in sums else g.to(_wide(g.dtype))


def _one(
    loss: Loss, live: Params, batch: Batch, key: Key | None, link: Link, scale: Tensor | None, last: bool = True
) -> tuple[Tensor, Params]:
    """The loss and gradients of one piece; `live` is emptied, so that the backward pass frees copies as it goes."""
    with link.forward(live, last):
        value = loss(live, batch, key, link.use)
    if value.ndim:
        raise ValueError(f"a loss is one number, this one has shape {tuple(value.shape)}; take its mean")
    edges = {k: get_gradient_edge(x) for k, x in live.items()}
    live.clear()
    target = value if scale is None else value * scale
    found = torch.autograd.grad(target, list(edges.values()), allow_unused=True)
    return value.detach(), link.finish(dict(zip(edges, found, strict=True)))


def _live(params: Params, precision: Precision) -> Params:
    """What autograd differentiates: the parameters themselves, or one low-precision copy of them all.

    A copy is no leaf, as a leaf would live to the end of the backward pass.
    """
    dtype = DTYPES[precision]
    own = {k: v.detach().requires_grad_() for k, v in params.items()}  # float64 parameters stay float64, for proofs
    return own if dtype == torch.float32 else {k: v.to(dtype) for k, v in own.items()}


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _pieces(batch: Batch | Sequence[Batch], n: int) -> list[Batch]:
    if not isinstance(batch, Batch):
        if not batch:
            raise ValueError("a list of micro-batches is empty; give at least one Batch")
        return list(batch)
    rows = batch.tokens.shape[0]
    if rows % n:
        raise ValueError(f"a batch of {rows} rows is not divisible into {n} micro-batches; choose a divisor of {rows}")
    return [batch] if n == 1 else [Batch(*parts) for parts in zip(*(x.chunk(n) for x in batch), strict=True)]


def _sample_keys(key: Key | None, pieces: list[Batch], one: bool) -> list[Key | None]:
    """One key per row of the whole batch, so that a row's dropout does not depend on how the batch is cut."""
    if key is None or one:
        return [key] * len(pieces)  # the forward makes the same keys where it needs them
    sizes = [p.tokens.shape[0] for p in pieces]
    return list(random.fold_in(key, torch.arange(sum(sizes), device=key.device)).split(sizes))


class Judge(Protocol):
    """Whether an update is made: judge(loss, global norm of the gradients, gradients, parameters) -> bool.

    It is asked between the gradients and the optimizer, and must change nothing.
    """

    def __call__(self, value: Tensor, norm: Tensor, grads: Params, params: Params, /) -> bool: ...


def make_step(
    loss: Loss, optimizer: Transform, plan: Plan = Plan(), judge: Judge | None = None
) -> Callable[[TrainState, Batch | Sequence[Batch]], tuple[TrainState, Metrics]]:
    """step(state, batch) -> (state, metrics): gradients, then the optimizer.

    With `plan.donate` (the default) the given state is dead afterwards: its tensors are updated in place and belong to
    the new state. Metrics are 0-d tensors, read them when you need them: train/loss, and train/grad_norm where the
    optimizer has a link called `clip`; fp16 adds train/loss_scale and train/skipped. With a `judge` there are always
    train/grad_norm and train/skipped; where it says False, only the count of steps goes on.
    """
    gradients = value_and_grad(loss, plan)
    norm = optim.global_norm if plan.ranks is None else plan.ranks.norm
    apply = _donated(optimizer, norm) if plan.donate else _pure(optimizer, norm)

    unkept = plan.keep_memory

    def step(state: TrainState, batch: Batch | Sequence[Batch]) -> tuple[TrainState, Metrics]:
        nonlocal unkept
        if unkept and all(p.device.type == "cpu" for p in state.params.values()):
            keep_freed_memory()
        unkept = False
        key = random.fold_in(state.key, state.step)
        if isinstance(state.opt_state, LossScale):
            return _scaled_step(state, batch, key)
        value, grads = gradients(state.params, batch, key)
        seen = _Seen(judge, value, state.params) if judge else None
        with torch.no_grad():
            params, opt_state = apply(grads, state.opt_state, state.params, seen)
        metrics = {"train/loss": value, **(seen.metrics() if seen else _norm(opt_state))}
        return TrainState(state.step + 1, params, opt_state, state.key), metrics

    def _scaled_step(state: TrainState, batch: Batch | Sequence[Batch], key: Key) -> tuple[TrainState, Metrics]:
        scale, good, inner = state.opt_state
        value, grads = gradients(state.params, batch, key, scale)
        with torch.no_grad():
            grads = {k: g.to(_wide(state.params[k].dtype)) / scale for k, g in grads.items()}
            ok = torch.stack([g.isfinite().all() for g in grads.values()]).all()
            finite = bool(ok) if plan.ranks is None else plan.ranks.everywhere(ok)
            seen = _Seen(judge, value, state.params) if judge and finite else None
            params, inner = apply(grads, inner, state.params, seen) if finite else (state.params, inner)
            grown = finite and int(good) + 1 >= plan.scale_every
            scale = scale * 2 if grown else scale if finite else scale / 2
            good = torch.zeros_like(good) if grown or not finite else good + 1
        metrics = {"train/loss": value, "train/loss_scale": scale, "train/skipped": torch.tensor(int(not finite))}
        state = TrainState(state.step + 1, params, LossScale(scale, good, inner), state.key)
        return state, metrics | (seen.metrics() if seen else _norm(inner))

    return step


class _Seen:
    """A judge, asked at most once, and what it saw and said."""

    def __init__(self, judge: Judge, value: Tensor, params: Params) -> None:
        self._judge, self._value, self._params = judge, value, params
        self._norm, self._yes = value, True

    def __call__(self, norm: Tensor, grads: Params) -> bool:
        self._norm, self._yes = norm, self._judge(self._value, norm, grads, self._params)
        return self._yes

    def metrics(self) -> Metrics:
        return {"train/grad_norm": self._norm.clone(), "train/skipped": torch.tensor(int(not self._yes))}


Apply = Callable[[Params, Tree, Params, "_Seen | None"], tuple[Params, Tree]]


def _donated(optimizer: Transform, norm: Callable[[Params], Tensor]) -> Apply:
    update_ = optim.in_place(optimizer, norm=norm)

    def apply(grads: Params, opt_state: Tree, params: Params, seen: _Seen | None) -> tuple[Params, Tree]:
        after = update_(grads, opt_state, params, seen)
        return params, opt_state if after is None else after

    return apply


def _pure(optimizer: Transform, norm: Callable[[Params], Tensor]) -> Apply:
    def apply(grads: Params, opt_state: Tree, params: Params, seen: _Seen | None) -> tuple[Params, Tree]:
        if seen is not None and not seen(norm(grads), grads):
            return params, opt_state
        wide = {k: g.to(params[k].dtype) for k, g in grads.items()}
        updates, opt_state = optimizer.update(wide, opt_state, params)
        return optim.apply_updates(params, updates), opt_state

    return apply


def _norm(opt_state: Tree) -> Metrics:
    clip = opt_state.get("clip") if isinstance(opt_state, dict) else None
    norm = tree.flatten(clip).get("norm") if clip is not None else None
    return {} if norm is None else {"train/grad_norm": norm.clone()}
