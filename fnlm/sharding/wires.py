"""Wires beside that of torch.distributed: ranks as threads, nobody at all, and one that counts.

A wire has three verbs on flat, contiguous tensors, and each returns at once (see `fnlm.collectives.Wire`).
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from fnlm.collectives import Wire, Work


class Abandoned(RuntimeError):
    """Another rank failed, or never came."""


@dataclass
class Room:
    """Where `size` threads meet: the n-th call of each belongs to the n-th call of the others."""

    size: int
    timeout: float = 60.0
    gone: str | None = None
    posts: dict[int, dict[int, tuple[str, Tensor]]] = field(default_factory=dict)
    results: dict[int, Tensor] = field(default_factory=dict)
    takers: dict[int, int] = field(default_factory=dict)
    changed: threading.Condition = field(default_factory=threading.Condition)

    def post(self, call: int, rank: int, kind: str, x: Tensor) -> None:
        """Lay down this rank's tensor; the last to come makes the result."""
        with self.changed:
            row = self.posts.setdefault(call, {})
            row[rank] = (kind, x)
            if len(row) < self.size:
                return
            said = [(kind, tuple(x.shape), x.dtype) for kind, x in (row[r] for r in range(self.size))]
            if len(set(said)) > 1:
                self.gone = f"ranks disagree about collective {call}: {said}"
            else:
                self.results[call] = _fold(kind, [row[r][1] for r in range(self.size)])
                self.takers[call] = self.size
            del self.posts[call]
            self.changed.notify_all()

    def take(self, call: int) -> Tensor:
        """The result, once all have come. Abandoned when somebody failed, or did not come in time."""
        with self.changed:
            came = self.changed.wait_for(lambda: call in self.results or self.gone is not None, self.timeout)
            if call not in self.results:
                missing = sorted(set(range(self.size)) - self.posts.get(call, {}).keys())
                late = f"ranks {missing} of the axis did not come to collective {call} within {self.timeout} s"
                raise Abandoned(self.gone if came and self.gone else late)
            result = self.results[call]
            self.takers[call] -= 1
            if not self.takers[call]:
                del self.results[call], self.takers[call]
            return result

    def leave(self, why: str) -> None:
        """Let nobody wait any longer."""
        with self.changed:
            self.gone = self.gone or why
            self.changed.notify_all()


def _fold(kind: str, xs: list[Tensor]) -> Tensor:
    with torch.no_grad():
        if kind == "all_gather":
            return torch.cat([x.flatten() for x in xs])
        return torch.stack(xs).amax(0) if kind == "max" else torch.stack(xs).sum(0)


class Landing:
    """Nothing has arrived before `wait`: until then the result is poison, so that a forgotten wait shows."""

    def __init__(self, room: Room, call: int, out: Tensor, part: slice) -> None:
        self.room, self.call, self.out, self.part, self.landed = room, call, out, part, False
        if out.is_floating_point():
            out.detach().fill_(float("nan"))

    def wait(self) -> None:
        if not self.landed:
            self.out.detach().copy_(self.room.take(self.call).flatten()[self.part].view_as(self.out))
            self.landed = True


class Threads:
    """One rank's wire in a room of threads."""

    def __init__(self, room: Room, rank: int) -> None:
        self.room, self.rank, self.calls = room, rank, 0

    def _launch(self, kind: str, x: Tensor, out: Tensor, part: slice) -> Work:
        self.calls += 1
        self.room.post(self.calls, self.rank, kind, x.detach())
        return Landing(self.room, self.calls, out, part)

    def all_reduce(self, x: Tensor, op: str) -> Work:
        return self._launch(op, x.detach().clone(), x, slice(None))

    def all_gather(self, out: Tensor, x: Tensor) -> Work:
        return self._launch("all_gather", x.detach().clone(), out, slice(None))  # x may be a part of out

    def reduce_scatter(self, out: Tensor, x: Tensor) -> Work:
        n = out.numel()
        return self._launch("sum", x, out, slice(self.rank * n, (self.rank + 1) * n))


class Held(NamedTuple):
    """Work that nobody ever does; it keeps its tensors, as real work does."""

    tensors: tuple[Tensor, ...]

    def wait(self) -> None: ...


@dataclass(frozen=True)
class Nobody:
    """A wire with no one at the other end, for planning; what is received is what this rank sends."""

    size: int
    index: int

    def all_reduce(self, x: Tensor, op: str) -> Work:
        return Held((x,))

    def all_gather(self, out: Tensor, x: Tensor) -> Work:
        for row in () if out.is_meta else out.view(self.size, -1):
            if row.data_ptr() != x.data_ptr():  # x may be a part of out
                row.copy_(x.flatten())
        return Held((out, x))

    def reduce_scatter(self, out: Tensor, x: Tensor) -> Work:
        out.copy_(x.view(self.size, -1)[self.index].view_as(out))
        return Held((out, x))


class Call(NamedTuple):
    """One collective: its name, its axis and that axis' size, the bytes of its larger side."""

    op: str
    axis: str
    size: int
    nbytes: int

    @property
    def sent(self) -> float:
        """The bytes that leave one rank in a ring: each of `size` parts travels size - 1 times, all-reduce twice."""
        return (2 if self.op == "all_reduce" else 1) * self.nbytes * (self.size - 1) / self.size


Book = list[Call]


@dataclass(frozen=True)
class Counted:
    """A wire that writes down every call."""

    wire: Wire
    axis: str
    size: int
    book: Book

    def note(self, op: str, x: Tensor) -> None:
        """Write down a call."""
        self.book.append(Call(op, self.axis, self.size, x.numel() * x.element_size()))

    def all_reduce(self, x: Tensor, op: str) -> Work:
        self.note("all_reduce", x)
        return self.wire.all_reduce(x, op)

    def all_gather(self, out: Tensor, x: Tensor) -> Work:
        self.note("all_gather", out)
        return self.wire.all_gather(out, x)

    def reduce_scatter(self, out: Tensor, x: Tensor) -> Work:
        self.note("reduce_scatter", x)
        return self.wire.reduce_scatter(out, x)
