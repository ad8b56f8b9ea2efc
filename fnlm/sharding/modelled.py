"""A wire whose collectives take time on a line of their own: how much of them a schedule hides is then measured.

Between a collective's start and its wait the line works alone, as a network card does, and computing goes on. Time is
what this thread works and waits, or is counted from the operations of a step, on tensors without storage too.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from fnlm.collectives import Axis, Wire, Work
from fnlm.sharding.mesh import Mesh
from fnlm.sharding.wires import Call


class Clock(Protocol):
    """Seconds, and how to let some pass."""

    def now(self) -> float: ...
    def wait_until(self, then: float) -> None: ...


class Worked:
    """The processor time of this thread, so that other programs do not disturb it; a wait is added to it."""

    def __init__(self) -> None:
        self.waited = 0.0

    def now(self) -> float:
        return time.thread_time() + self.waited

    def wait_until(self, then: float) -> None:
        self.waited += max(0.0, then - self.now())


class Counting(TorchDispatchMode):
    """A clock that goes on by what is computed within it: products at `flops` a second, the rest at `bytes` a second.

    Every operation reads and writes its tensors once; views, and tensors made without content, take no time.
    """

    def __init__(self, flops: float = 4e14, nbytes: float = 2e12) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.flops, self.nbytes, self.time = flops, nbytes, 0.0

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        kind: Any = func
        if kind.overloadpacket in flop_registry:
            self.time += flop_registry[kind.overloadpacket](*args, **(kwargs or {}), out_val=out) / self.flops
        elif not kind.is_view and not kind.overloadpacket.__name__.startswith(("empty", "new_empty")):
            read = sum(t.nbytes for t in tree_leaves((args, kwargs, out)) if isinstance(t, Tensor))
            self.time += read / self.nbytes
        return out

    def now(self) -> float:
        return self.time

    def wait_until(self, then: float) -> None:
        self.time = max(self.time, then)


class Line:
    """One rank's way to all others: collectives go one after the other, each for latency + bytes sent / bandwidth."""

    def __init__(self, clock: Clock, bandwidth: float, latency: float = 0.0) -> None:
        self.clock, self.bandwidth, self.latency = clock, bandwidth, latency
        self.free = self.busy = 0.0

    def begin(self, nbytes: float) -> float:
        """Start a collective now, or once the line is free; when it ends."""
        takes = self.latency + nbytes / self.bandwidth
        self.free = max(self.free, self.clock.now()) + takes
        self.busy += takes
        return self.free


class Arriving(NamedTuple):
    """A collective that is over at a time."""

    work: Work
    clock: Clock
    end: float

    def wait(self) -> None:
        self.clock.wait_until(self.end)
        self.work.wait()


@dataclass(frozen=True)
class Modelled:
    """A wire that takes a line's time for what it sends."""

    axis: Axis
    line: Line

    def _over(self, op: str, x: Tensor, start: Callable[[Wire], Work]) -> Work:
        work = start(self.axis.wire)  # what it computes here is no part of the way
        return Arriving(work, self.line.clock, self.line.begin(Call(op, "", self.axis.size, x.nbytes).sent))

    def all_reduce(self, x: Tensor, op: str) -> Work:
        return self._over("all_reduce", x, lambda wire: wire.all_reduce(x, op))

    def all_gather(self, out: Tensor, x: Tensor) -> Work:
        return self._over("all_gather", out, lambda wire: wire.all_gather(out, x))

    def reduce_scatter(self, out: Tensor, x: Tensor) -> Work:
        return self._over("reduce_scatter", x, lambda wire: wire.reduce_scatter(out, x))


def modelled(mesh: Mesh, line: Line) -> Mesh:
    """The same mesh over a line that all its axes share."""
    return mesh.rewired(lambda axis: Modelled(axis, line))
