"""From partial sums to gradients at rest: buckets that are filled during the backward pass and sent when full."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from fnlm.collectives import Axis, Work
from fnlm.sharding.layout import Layout, Pack, Slot
from fnlm.sharding.strategy import DTYPES
from fnlm.types import Params

Stage: TypeAlias = Callable[[], Work]


class Trip:
    """A bucket on its way by one or two stages: a reduction that holds all of it, and one of this rank's part."""

    def __init__(self, stages: list[Stage]) -> None:
        self.work: Work | None = stages[0]()
        self.later = stages[1:]
        self.landed = False

    def land(self) -> None:
        """Wait for the first stage, and start the second."""
        if not self.landed and self.work is not None:
            self.work.wait()
            self.landed, self.work = True, self.later[0]() if self.later else None

    def end(self) -> None:
        """Wait for all stages."""
        self.land()
        if self.work is not None:
            self.work.wait()
            self.work = None


class Reducing:
    """The buckets of one step. `dtype` is what gradients are summed in, unless the strategy says otherwise.

    Under accumulate="local" micro-batches add up in the buckets, which are sent once; under "reduced" each is sent.
    """

    def __init__(self, layout: Layout, dtype: torch.dtype) -> None:
        s = layout.strategy
        self.layout, self.dtype = layout, DTYPES[s.reduce_dtype] if s.reduce_dtype else dtype
        self.buffers: dict[Pack, Tensor] = {}
        self.filled: dict[Pack, set[str]] = {}
        self.missing: dict[Pack, set[str]] = {}
        self.trips: list[Trip] = []
        self.grads: Params = {}
        self.sends = True

    def begin(self, last: bool) -> None:
        """A micro-batch begins; the last one, or each, is followed by sending."""
        self.sends = last or self.layout.strategy.accumulate == "reduced"
        self.missing = {b: {s.name for s in b.slots} for b in self.layout.buckets}

    def arrive(self, group: str, grads: Sequence[Tensor]) -> None:
        """Put a group's gradients into their buckets, and send each that is full."""
        by_bucket: dict[Pack, list[tuple[Slot, Tensor]]] = {}
        for slot, grad in zip(self.layout.groups[group].slots, grads, strict=True):
            by_bucket.setdefault(self.layout.bucket_of[slot.name], []).append((slot, grad))
        for bucket, found in by_bucket.items():
            self._fill(bucket, found)
            if self.sends and not self.missing[bucket]:
                self._send(bucket)

    def _fill(self, bucket: Pack, found: list[tuple[Slot, Tensor]]) -> None:
        """Copy gradients to their places, or add them to those of earlier micro-batches."""
        new: list[tuple[Tensor, Tensor]] = []
        more: list[tuple[Tensor, Tensor]] = []
        places = bucket.views(self._buffer(bucket, found[0][1].device), bucket.parts)
        filled = self.filled.setdefault(bucket, set())
        for slot, grad in found:
            if slot.name not in self.missing[bucket]:
                raise ValueError(f"gradients of {slot.name!r} arrive twice; a group is used once in a forward pass")
            (more if slot.name in filled else new).extend((rows, x) for x, rows in slot.pairs(grad, places[slot.name]))
            self.missing[bucket].discard(slot.name)
            filled.add(slot.name)
        if new:
            torch._foreach_copy_([rows for rows, _ in new], [x for _, x in new])
        if more:
            torch._foreach_add_([rows for rows, _ in more], [x.to(self.dtype) for _, x in more])

    def _buffer(self, bucket: Pack, device: torch.device) -> Tensor:
        if bucket not in self.buffers:
            self._drain()
            new = torch.empty if bucket.even else torch.zeros  # zeros: padding is summed too
            self.buffers[bucket] = new(bucket.parts * bucket.width, dtype=self.dtype, device=device)
        return self.buffers[bucket]

    def _send(self, bucket: Pack) -> None:
        layout, flat = self.layout, self.buffers.pop(bucket)
        self.filled.pop(bucket, None)
        stages: list[Stage] = []
        if layout.state is not None:
            mine = flat.new_empty(bucket.width)
            stages.append(_reduce_scatter(layout.state, mine, flat))
            flat = mine
        if layout.copies is not None:
            stages.append(_all_reduce(layout.copies, flat))
        trip = Trip(stages)
        views = bucket.views(flat, 1)
        self.grads |= {s.name: s.piece(views[s.name][0]) for s in bucket.slots}  # views: not here yet
        self.trips.append(trip)
        if not self.layout.strategy.overlap:
            trip.end()

    def _drain(self) -> None:
        """Before a new buffer: bound what is in flight, as work holds its input. All ranks do so in the same order."""
        if self.layout.state is not None:
            for trip in self.trips[: len(self.trips) - max(1, self.layout.strategy.prefetch) + 1]:
                trip.land()

    def finish(self, device: torch.device) -> Params:
        """The gradients at rest, once all have come; {} while micro-batches still add up here."""
        if not self.sends:
            return {}
        for bucket in self.layout.buckets:
            if self.missing[bucket]:  # a group did not run, or has other parameters in this bucket
                views = bucket.views(self._buffer(bucket, device), bucket.parts)
                for name in self.missing[bucket] - self.filled.get(bucket, set()):
                    views[name].zero_()
                self._send(bucket)
        for trip in self.trips:
            trip.end()
        grads, self.grads, self.trips, self.missing = self.grads, {}, [], {}
        return {name: grads[name].contiguous() for name in self.layout.shapes}


def _reduce_scatter(axis: Axis, out: Tensor, x: Tensor) -> Stage:
    return lambda: axis.wire.reduce_scatter(out, x)


def _all_reduce(axis: Axis, x: Tensor) -> Stage:
    return lambda: axis.wire.all_reduce(x, "sum")
