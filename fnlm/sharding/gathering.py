"""From rest to use: a group's parameters are gathered ahead of their use, and may be dropped and gathered again.

Where they are gathered again, autograd keeps notes in place of them. A note is made by storage, not by address, as
addresses are reused; every gathered parameter has storage of its own, so that it can be freed.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from fnlm.collectives import Work
from fnlm.sharding.layout import Layout
from fnlm.sharding.strategy import DTYPES
from fnlm.types import Params


class Note(NamedTuple):
    """What autograd keeps in place of a gathered parameter, or of what was `made` of some."""

    group: str
    name: str
    made: bool
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int


class Flight(NamedTuple):
    """A gather on its way; this rank's row of `out` is what it gives."""

    out: Tensor
    work: Work


class Gathering:
    """The gathers of one step; `layout.state` is the axis along which parameters are split at rest."""

    def __init__(self, layout: Layout) -> None:
        assert layout.state is not None
        self.layout, self.state, self.regather = layout, layout.state, layout.strategy.regather
        self.dtype = DTYPES[layout.strategy.gather_dtype] if layout.strategy.gather_dtype else None
        self.rest: dict[str, Params] = {}
        self.flying: dict[str, Flight] = {}
        self.here: dict[str, Params] = {}
        self.made: dict[str, Params] = {}
        self.home: dict[StorageWeakRef, tuple[str, str, bool]] = {}
        self.ahead, self.last = 1, True

    @contextmanager
    def forward(self, params: Params, last: bool) -> Iterator[None]:
        """The forward pass of a micro-batch; what follows it is the backward pass."""
        if len({p.dtype for p in params.values()}) > 1:
            kinds = ", ".join(sorted({str(p.dtype) for p in params.values()}))
            raise ValueError(f"parameters of {kinds} would travel in one buffer; give them all one dtype")
        self.rest = {g: {s.name: params[s.name].detach() for s in p.slots} for g, p in self.layout.groups.items()}
        self.ahead, self.last = 1, last
        if self.regather:
            with torch.autograd.graph.saved_tensors_hooks(self._note, self._fetch):
                yield
        else:
            yield
        self.ahead = -1
        if self.regather and torch.is_grad_enabled():
            self._send_for(self.layout.group_names[-1])

    def lift(self, group: str) -> Params:
        """The whole parameters of a group; from here on only the model holds them, where they are gathered again."""
        whole = self.gathered(group)
        if self.layout.regathers(group):
            self._know(group, whole, False)
            del self.here[group]
        return whole

    def remember(self, group: str, made: Params) -> None:
        """What `layout.made` has made of a group: it is made again where the group is gathered again."""
        if self.layout.regathers(group):
            self._know(group, made, True)

    def _know(self, group: str, tensors: Params, made: bool) -> None:
        self.home |= {StorageWeakRef(t.untyped_storage()): (group, name, made) for name, t in tensors.items()}

    def used(self, group: str) -> None:
        """The backward pass of a group is over. The first group is in use from the first to the last moment."""
        if self.last or (self.regather and group != self.layout.group_names[0]):
            self.here.pop(group, None)
            self.made.pop(group, None)

    def end(self) -> None:
        """The backward pass of all groups is over, of those too whose gradients nobody asked for."""
        for group in list(self.here):
            self.used(group)
        for group in list(self.flying) if self.last else ():
            self.flying.pop(group).work.wait()  # the backward pass ended before it

    def gathered(self, group: str) -> Params:
        """The whole parameters of a group; the next groups are sent for once its buffer is free."""
        if group not in self.here:
            self._leave(group)
            self._launch(group)
            self.here[group] = self._land(group)
            self._send_for(group)
        return self.here[group]

    def _leave(self, group: str) -> None:
        """The backward pass of the groups after one is over. Of those in which something rests no gradient says so."""
        order = self.layout.group_names
        for other in order[order.index(group) + 1 :] if self.ahead < 0 else ():
            if other in self.layout.partly:
                self.used(other)

    def _send_for(self, group: str) -> None:
        """Send for those that come after a group; the backward pass ends at the lowest that is trained in part."""
        order, i = self.layout.group_names, self.layout.group_names.index(group)
        first = self.layout.lowest if self.ahead < 0 else 0
        for j in range(1, self.layout.strategy.prefetch + 1):
            if first <= i + j * self.ahead < len(order):
                self._launch(order[i + j * self.ahead])

    def _launch(self, group: str) -> None:
        if group in self.flying or group in self.here:
            return
        pack, params = self.layout.groups[group], self.rest[group]
        one = params[pack.slots[0].name]
        new = one.new_empty if pack.even else one.new_zeros
        out = new(pack.parts * pack.width, dtype=self.dtype or one.dtype)
        row = out[self.state.index * pack.width :][: pack.width]
        views = pack.views(row, 1)
        torch._foreach_copy_([s.piece(views[s.name][0]) for s in pack.slots], [params[s.name] for s in pack.slots])
        self.flying[group] = Flight(out, self.state.wire.all_gather(out, row))

    def _land(self, group: str) -> Params:
        flight, pack = self.flying.pop(group), self.layout.groups[group]
        flight.work.wait()
        views = pack.views(flight.out, pack.parts)
        like = self.rest[group]
        whole = {s.name: like[s.name].new_empty(s.whole) for s in pack.slots}
        pairs = [pair for s in pack.slots for pair in s.pairs(whole[s.name], views[s.name])]
        torch._foreach_copy_([x for x, _ in pairs], [rows for _, rows in pairs])
        return whole

    def _note(self, t: Tensor) -> Tensor | Note:
        where = self.home.get(StorageWeakRef(t.untyped_storage()))
        return t if where is None else Note(*where, tuple(t.shape), t.stride(), int(t.storage_offset()))

    def _fetch(self, kept: Tensor | Note) -> Tensor:
        if isinstance(kept, Tensor):
            return kept
        there = self._finished(kept.group) if kept.made else self.gathered(kept.group)
        return there[kept.name].as_strided(kept.size, kept.stride, kept.offset)

    def _finished(self, group: str) -> Params:
        """What is made of a group, again."""
        if group not in self.made:
            assert self.layout.made is not None
            self.made[group] = self.layout.made(self.gathered(group))
        return self.made[group]
