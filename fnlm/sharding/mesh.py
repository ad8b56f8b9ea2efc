"""A mesh: ranks in a grid with named axes, as one of them sees it.

The first axis is the slowest: in `data=2,tensor=4` ranks 0 to 3 share a data index. Any set of axes is an axis too:
`mesh.axis("replica", "shard")` runs over the ranks that differ in these coordinates only.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from itertools import combinations, product
from math import prod

import torch.distributed as dist

from fnlm.collectives import Axis, Dist, Wire
from fnlm.config import did_you_mean
from fnlm.sharding.wires import Book, Counted, Nobody

NAMES = ("replica", "shard", "data", "context", "tensor")
"""What an axis can be for: copies of shards, shards, rows of the batch, positions, heads and columns."""

Shape = dict[str, int]
Names = tuple[str, ...]


def parse_mesh(text: str, world: int | None = None) -> Shape:
    """`"data=8,tensor=2"` as {"data": 8, "tensor": 2}; "" is one rank, {}.

    ValueError for an unknown or repeated axis, a size below 1, and sizes that do not multiply to `world`.
    """
    shape: Shape = {}
    for part in filter(None, (p.strip() for p in text.split(","))):
        name, _, size = (x.strip() for x in part.partition("="))
        if name not in NAMES:
            raise ValueError(f"mesh axis {name!r} is unknown{did_you_mean(name, NAMES)}")
        if name in shape:
            raise ValueError(f"mesh {text!r} names {name} twice; give each axis once")
        if not size.isdecimal() or int(size) < 1:
            raise ValueError(f"mesh {text!r} gives {name} the size {size!r}; write e.g. {name}=2")
        shape[name] = int(size)
    return check_world(shape, world)


def check_world(shape: Shape, world: int | None) -> Shape:
    """The shape itself. ValueError unless its sizes multiply to `world` (None: not known yet)."""
    if world is not None and prod(shape.values()) != world:
        sizes = " x ".join(str(n) for n in shape.values()) or "1"
        raise ValueError(
            f"mesh {describe(shape)} is {sizes} = {prod(shape.values())} ranks, but {world} run; "
            f"start {prod(shape.values())}, or choose sizes that multiply to {world}"
        )
    return shape


def describe(shape: Mapping[str, int]) -> str:
    """The text that `parse_mesh` reads, or "of one rank"."""
    return ",".join(f"{name}={n}" for name, n in shape.items()) or "of one rank"


@dataclass(frozen=True)
class Mesh:
    """One rank's view: `shape` by name in order, its own number, and an Axis for every set of axes longer than 1."""

    shape: Shape
    rank: int
    axes: dict[Names, Axis] = field(compare=False, repr=False)

    @property
    def world(self) -> int:
        """The number of ranks."""
        return prod(self.shape.values())

    @property
    def coordinates(self) -> dict[str, int]:
        """This rank's index along each axis."""
        return coordinates(self.shape, self.rank)

    def axis(self, *names: str) -> Axis | None:
        """The axis over these names together; None where nobody else lies along it."""
        return self.axes.get(_long(self.shape, names))

    def size(self, *names: str) -> int:
        """How many ranks lie along these axes together; an axis that is not in the mesh has one."""
        return prod(self.shape.get(n, 1) for n in names)

    def index(self, *names: str) -> int:
        """This rank's number along these axes together, in the order of the mesh."""
        axis = self.axis(*names)
        return axis.index if axis else 0

    def at(self, rank: int) -> Mesh:
        """The same mesh as another rank sees it, without wires: for asking who holds what."""
        return planned(self.shape, rank)

    def counted(self, book: Book) -> Mesh:
        """The same mesh, writing into `book` what is sent."""
        return self.rewired(lambda axis: Counted(axis.wire, axis.name, axis.size, book))

    def rewired(self, wire: Callable[[Axis], Wire]) -> Mesh:
        """The same mesh with other wires."""
        axes = {names: Axis(a.name, a.size, a.index, wire(a)) for names, a in self.axes.items()}
        return Mesh(self.shape, self.rank, axes)

    def __str__(self) -> str:
        return describe(self.shape)


def coordinates(shape: Mapping[str, int], rank: int) -> dict[str, int]:
    """The index of a rank along each axis."""
    out: dict[str, int] = {}
    for name in reversed(list(shape)):
        rank, out[name] = divmod(rank, shape[name])
    return {name: out[name] for name in shape}


def members(shape: Mapping[str, int], names: Sequence[str], rank: int) -> list[int]:
    """The ranks that differ from `rank` along `names` only, in the order of their indices."""
    here = coordinates(shape, rank)
    found = []
    for moved in product(*(range(shape[n]) for n in shape if n in names)):
        at = here | dict(zip((n for n in shape if n in names), moved, strict=True))
        number = 0
        for name, size in shape.items():
            number = number * size + at[name]
        found.append(number)
    return found


def build(shape: Shape, rank: int, wire: Callable[[Names, list[int]], Wire]) -> Mesh:
    """A mesh whose axes have the wires that `wire(names, ranks)` gives; asked for in the same order on every rank."""
    if not 0 <= rank < prod(shape.values()):
        raise ValueError(f"rank {rank} is not in mesh {describe(shape)}; choose 0 to {prod(shape.values()) - 1}")
    axes = {}
    for names in subsets(shape):
        ranks = members(shape, names, rank)
        axes[names] = Axis("+".join(names), len(ranks), ranks.index(rank), wire(names, ranks))
    return Mesh(shape, rank, axes)


def subsets(shape: Mapping[str, int]) -> list[Names]:
    """Every set of axes longer than 1, as names in the order of the mesh."""
    long = _long(shape, tuple(shape))
    return [names for n in range(1, len(long) + 1) for names in combinations(long, n)]


def _long(shape: Mapping[str, int], names: Sequence[str]) -> Names:
    return tuple(n for n in shape if n in names and shape[n] > 1)


def single() -> Mesh:
    """The mesh of one rank."""
    return planned({})


def planned(shape: Shape, rank: int = 0) -> Mesh:
    """A mesh of any size with nobody at the other end: shapes and counts are right, values are not."""
    return build(shape, rank, lambda names, ranks: Nobody(len(ranks), ranks.index(rank)))


def connect(shape: Shape, timeout: float | None = None) -> Mesh:
    """The mesh of the processes that torch.distributed has joined; every rank calls it, with the same shape.

    `timeout` in seconds bounds each wait. ValueError where the sizes do not multiply to the number of processes.
    """
    world, rank = dist.get_world_size(), dist.get_rank()
    check_world(shape, world)
    limit = None if timeout is None else timedelta(seconds=timeout)

    def wire(names: Names, ranks: list[int]) -> Wire:
        mine: Wire | None = None
        for group in sorted({tuple(members(shape, names, r)) for r in range(world)}):
            made = dist.new_group(list(group), timeout=limit)
            if rank in group:
                mine = Dist(made)
        assert mine is not None
        return mine

    return build(shape, rank, wire)
