"""What a training step under a strategy will hold and send, before any rank exists.

The step itself runs, as one rank of the mesh, on tensors without storage and with nobody at the other end. What it
makes and what it sends is counted, so there is no second description of a strategy that could differ from the first.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from dataclasses import replace
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from fnlm import tree
from fnlm.config import Compute, ModelConfig, TrainConfig
from fnlm.forward import Use
from fnlm.losses import make_lm_loss
from fnlm.optim.base import needs, rewrite
from fnlm.presets import optimizer_of, trained_model
from fnlm.sharded import axes_of, layout_of, lowered, with_resting
from fnlm.sharded_optim import shard_optimizer
from fnlm.sharding import Book, Layout, Ranks, Strategy, mesh_for, planned, strategy
from fnlm.sharding.memory import Peak
from fnlm.sharding.shapes import Remembered
from fnlm.sharding.traffic import sent
from fnlm.step import Loss, Plan, value_and_grad
from fnlm.trainable import subset_of
from fnlm.types import Batch, Key, Params, Transform, Tree

FEWEST = 3  # micro-batches after which each further one does what the one before the last did


class Forecast(NamedTuple):
    """One rank's training step, in bytes.

    `parameters`, `gradients` (of what is trained) and `optimizer_state` are what rests here; `activations` what one
    micro-batch's forward keeps for its backward; `peak` the most that is alive at once during the forward and backward
    pass, state included. `sent` is what leaves this rank in a step, by axis, where each collective goes around a ring;
    `collectives` their number.
    """

    strategy: str
    rank: int
    parameters: int
    gradients: int
    optimizer_state: int
    activations: int
    peak: int
    sent: dict[str, float]
    collectives: int


def forecast(
    cfg: ModelConfig,
    train: TrainConfig,
    how: str | Strategy,
    shape: dict[str, int],
    rank: int = 0,
    seq_len: int | None = None,
    shapes: Remembered | None = None,
) -> Forecast:
    """What one rank of a mesh will hold and send; `train.batch_size` rows are each rank's own in a micro-batch.

    `shapes`, given to several forecasts, keeps what one finds out for the next.

    Of `train` are used batch_size, micro_batches, precision, dropout, the optimizer, and what is trained. PyTorch's own
    reducer is counted as ours in buckets. ValueError for a mesh that the strategy or the model cannot have.
    """
    row, book = strategy(how), Book()
    mesh = planned(mesh_for(row, prod(shape.values()), shape), rank)
    cfg = trained_model(cfg, train)
    subset = subset_of(cfg, train)
    layout = layout_of(cfg, replace(row, reducer="own"), mesh.counted(book), subset)
    params, resting = subset.parted({k: torch.empty(layout.local_shape(k), device="meta") for k in layout.shapes})
    plan = Plan(train.precision, min(train.micro_batches, FEWEST))
    low = lowered(resting, plan, layout)
    tokens = torch.zeros(train.batch_size, seq_len or cfg.seq_len, dtype=torch.long, device="meta")
    pieces = [Batch(tokens, tokens, torch.ones_like(tokens, dtype=torch.float32))] * min(train.micro_batches, FEWEST)
    with Peak([*params.values(), *low.values(), *pieces[0]], shapes or Remembered()) as seen:
        inner = with_resting(make_lm_loss(cfg, Compute(), axes_of(layout)), low, layout)
        loss = _Watched(inner, seen, book, cfg.has_dropout, low)
        run = value_and_grad(loss, replace(plan, ranks=Ranks(layout, local=True, resting=low)))
        _, grads = run(params, pieces)
    if more := train.micro_batches - len(pieces):
        _, begin, end = loss.marks
        book[end:end] = book[begin:end] * more
    state = _update(optimizer_of(train, cfg), layout, params, grads)
    copies = (x for k, x in low.items() if x is not resting[k])
    held = bytes_of([*params.values(), *resting.values(), *copies])
    rest = held, bytes_of(grads.values()), bytes_of(tree.flatten(state).values())
    return Forecast(row.name, rank, *rest, loss.kept, rest[0] + rest[2] + seen.peak, sent(book), len(book))


def bytes_of(tensors: Iterable[Tensor]) -> int:
    """What tensors hold, whether or not they have storage."""
    return sum(t.numel() * t.element_size() for t in tensors)


def checkpoint_bytes(cfg: ModelConfig, train: TrainConfig) -> int:
    """A whole checkpoint, of all ranks together: parameters and the optimizer's state."""
    subset = subset_of(cfg, train)
    params = {name: torch.empty(shape, device="meta") for name, shape in subset.sizes.items()}
    state = optimizer_of(train, cfg).init(subset.parted(params)[0])
    return bytes_of(params.values()) + bytes_of(tree.flatten(state).values())


class _Watched:
    """A loss that notes where in the book each micro-batch begins, and what the first forward keeps."""

    def __init__(self, loss: Loss, seen: Peak, book: Book, dropout: bool, resting: Params) -> None:
        self.loss, self.seen, self.book, self.dropout, self.resting = loss, seen, book, dropout, resting
        self.marks: list[int] = []
        self.kept = 0

    def __call__(self, params: Params, batch: Batch, _: Key | None, use: Use) -> Tensor:
        self.marks.append(len(self.book))
        rows = batch.tokens.shape[0]
        key = torch.empty(rows, 2, dtype=torch.long, device="meta") if self.dropout else None
        before, gathered = self.seen.now, Gathered(use, [*params.values(), *self.resting.values()])
        value = self.loss(params, batch, key, gathered)
        if len(self.marks) == 1:
            self.kept = self.seen.now - before - gathered.alive()
        return value


class Gathered:
    """A `use` that remembers the storages which it made."""

    def __init__(self, use: Use, given: Iterable[Tensor]) -> None:
        self.use, self.given = use, {t.untyped_storage()._cdata for t in given}
        self.made: list[weakref.ref[torch.UntypedStorage]] = []

    def __call__(self, group: str, params: Params) -> Params:
        out = self.use(group, params)
        for storage in (t.untyped_storage() for t in out.values()):
            if storage._cdata not in self.given:
                self.made.append(weakref.ref(storage))
        return out

    def alive(self) -> int:
        """The bytes of those that are still there."""
        found = [ref() for ref in self.made]
        return sum({s._cdata: s.nbytes() for s in found if s is not None}.values())


def same(
    cfg: ModelConfig,
    how: str | Strategy,
    shape: dict[str, int],
    ranks: tuple[int, int],
    train: TrainConfig | None = None,
) -> bool:
    """Whether two ranks hold and send the same, by their shapes alone; `train` may have adapters."""
    subset = None if train is None else subset_of(cfg, train)
    one, two = (layout_of(cfg, how, planned(shape, rank), subset) for rank in ranks)
    slots = [[s for pack in x.groups.values() for s in pack.slots] for x in (one, two)]
    return one.mesh.size("context") == 1 and slots[0] == slots[1]


def _update(optimizer: Transform, layout: Layout, params: Params, grads: Params) -> Tree:
    """The optimizer's state; its exchanges are counted on the way.

    Where no link wants whole matrices, what is sent is at most the norm: one parameter asks for it as all do.
    """
    own, kinds = shard_optimizer(optimizer, layout), set[str]()

    def noted(link: Transform) -> Transform:
        kinds.add(needs(link))
        return link

    rewrite(noted, optimizer)
    state = own.init(params)
    if "matrix" not in kinds:
        name = next(iter(params))
        params, grads = {name: params[name]}, {name: grads[name]}
    wide = {name: grads[name].to(p.dtype) for name, p in params.items()}
    own.update(wide, own.init(params), params)
    return state
