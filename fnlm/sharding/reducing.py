"""From partial sums to gradients at rest: buckets that are filled during the backward pass and sent when full."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from fnlm.collectives import Axis, Work
from fnlm.sharding.layout import Layout, Pack, Slot
from fnlm.sharding.strategy import DTYPES
from fnlm.types import Params

Stage: TypeAlias = Callable[[], Work]


@dataclass
class Trip:
    """A bucket on its way by one or two stages: a reduction that holds all of it, and one of this rank's part."""

    bucket: Pack
    part: Tensor
    nbytes: int  # that are held until the first stage has landed
    work: Work | None
    later: list[Stage]
    landed: bool = False

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


class Buffer:
    """A bucket while it is filled: each parameter's place, and which of them hold something."""

    def __init__(self, bucket: Pack, dtype: torch.dtype, device: torch.device) -> None:
        new = torch.empty if bucket.even else torch.zeros  # zeros: padding is summed too
        self.flat = new(bucket.parts * bucket.width, dtype=dtype, device=device)
        self.places = bucket.views(self.flat, bucket.parts)
        self.filled: set[str] = set()


class Reducing:
    """The buckets of one step. `dtype` is what gradients are summed in, unless the strategy says otherwise.

    Under accumulate="local" micro-batches add up in the buckets, which are sent once; under "reduced" each is sent, and
    what arrives is added up.
    """

    def __init__(self, layout: Layout, dtype: torch.dtype) -> None:
        s = layout.strategy
        self.layout, self.dtype = layout, DTYPES[s.reduce_dtype] if s.reduce_dtype else dtype
        self.wide = torch.promote_types(self.dtype, torch.float32)
        self.buffers: dict[Pack, Buffer] = {}
        self.missing: dict[Pack, set[str]] = {}
        self.trips: list[Trip] = []
        self.sums: dict[Pack, Tensor] = {}
        self.last, self.only = True, True

    @property
    def sends(self) -> bool:
        """Whether this micro-batch is followed by sending: the last one, or each."""
        return self.last or self.layout.strategy.accumulate == "reduced"

    def begin(self, last: bool) -> None:
        """A micro-batch begins."""
        self.only, self.last = last and not self.missing, last
        self.missing = {b: {s.name for s in b.slots} for b in self.layout.buckets}

    def arrive(self, name: str, grad: Tensor) -> None:
        """Put a gradient into its bucket, and send it if it is full."""
        bucket, slot = self.layout.bucket_of[name], self.layout.slot_of[name]
        if name not in self.missing[bucket]:
            raise ValueError(f"gradients of {name!r} arrive twice; a group is used once in a forward pass")
        self.missing[bucket].discard(name)
        if self._is_bucket(bucket, slot, grad):
            self._send(bucket, grad.view(-1))
            return
        self._fill(bucket, slot, grad)
        if self.sends and not self.missing[bucket]:
            self._send(bucket, self.buffers.pop(bucket).flat)

    def _is_bucket(self, bucket: Pack, slot: Slot, grad: Tensor) -> bool:
        """Whether a gradient can be sent as it is: a reduce-scatter only reads it."""
        alone = len(bucket.slots) == 1 and slot.flat and bucket not in self.buffers
        as_it = grad.dtype == self.dtype and grad.is_contiguous()
        return alone and as_it and self.sends and self.layout.state is not None

    def _fill(self, bucket: Pack, slot: Slot, grad: Tensor) -> None:
        """Copy a gradient to its place, or add it to those of earlier micro-batches."""
        buffer = self._buffer(bucket, grad.device)
        for x, rows in slot.pairs(grad, buffer.places[slot.name]):
            if slot.name in buffer.filled:
                rows += x
            else:
                rows.copy_(x)
        buffer.filled.add(slot.name)

    def _buffer(self, bucket: Pack, device: torch.device) -> Buffer:
        if bucket not in self.buffers:
            self._drain(bucket.parts * bucket.width * self.dtype.itemsize)
            self.buffers[bucket] = Buffer(bucket, self.dtype, device)
        return self.buffers[bucket]

    def _send(self, bucket: Pack, flat: Tensor) -> None:
        layout, nbytes = self.layout, flat.nbytes
        self._drain(nbytes)
        stages: list[Stage] = []
        if layout.state is not None:
            mine = flat.new_empty(bucket.width)
            stages.append(_reduce_scatter(layout.state, mine, flat))
            flat = mine
        if layout.copies is not None:
            stages.append(_all_reduce(layout.copies, flat))
        trip = Trip(bucket, flat, nbytes, stages[0](), stages[1:])
        self.trips.append(trip)
        if not layout.strategy.overlap:
            trip.end()

    def _drain(self, more: int) -> None:
        """Bound what is in flight, as work holds its input: 3/4 of `prefetch` groups; all ranks in the same order."""
        if self.layout.state is None:
            return
        room = max(1, self.layout.strategy.prefetch) * self.layout.typical * self.dtype.itemsize * 3 // 4 - more
        for trip in [t for t in self.trips if t.landed]:
            self._keep(trip)
        held = sum(t.nbytes for t in self.trips)
        for trip in list(self.trips):
            if held > room:
                trip.land()
                held -= trip.nbytes

    def _keep(self, trip: Trip) -> None:
        """The end of a trip: its part is a sum of this step's gradients."""
        trip.end()
        self.trips.remove(trip)
        if trip.bucket in self.sums:
            self.sums[trip.bucket] += trip.part
        else:
            self.sums[trip.bucket] = trip.part if self.only else trip.part.to(self.wide)

    def finish(self, device: torch.device) -> Params:
        """The gradients at rest, once all have come; {} while more are to come."""
        if self.sends:
            self._send_rest(device)
        if not self.last:
            return {}
        for trip in list(self.trips):
            self._keep(trip)
        grads: Params = {}
        for bucket, part in self.sums.items():
            views = bucket.views(part, 1)
            grads |= {s.name: s.piece(views[s.name][0]) for s in bucket.slots}
        self.sums, self.missing = {}, {}
        return {name: grads[name].contiguous() for name in self.layout.trained}

    def _send_rest(self, device: torch.device) -> None:
        """Send what is not full: a group did not run, or the loss does not depend on it. What is missing is 0."""
        for bucket in self.layout.buckets:
            if self.missing[bucket]:
                buffer = self._buffer(bucket, device)
                for name in self.missing[bucket] - buffer.filled:
                    buffer.places[name].zero_()
                self._send(bucket, self.buffers.pop(bucket).flat)


def _reduce_scatter(axis: Axis, out: Tensor, x: Tensor) -> Stage:
    return lambda: axis.wire.reduce_scatter(out, x)


def _all_reduce(axis: Axis, x: Tensor) -> Stage:
    return lambda: axis.wire.all_reduce(x, "sum")
