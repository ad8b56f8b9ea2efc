"""Where each parameter lies, at rest and in each flat buffer. Decided once, from shapes and specs; holds no tensors."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod

from torch import Tensor

from fnlm.collectives import Axis
from fnlm.sharding.mesh import Mesh
from fnlm.sharding.specs import P, Rules, Shape, local_shape, slices, spec_of
from fnlm.sharding.strategy import MOST, Strategy, batch_axes, check_axes
from fnlm.types import Params

Made = Callable[[Params], Params]


@dataclass(frozen=True)
class Slot:
    """One parameter: `whole` while it computes here, `mine` at rest here, cut along `dim` in pieces of `chunk`."""

    name: str
    whole: Shape
    mine: Shape
    dim: int
    chunk: int
    parts: int

    @property
    def rest(self) -> Shape:
        """The other dimensions."""
        return self.whole[: self.dim] + self.whole[self.dim + 1 :]

    @property
    def width(self) -> int:
        """How many elements one rank's piece has in a buffer, padding included."""
        return self.chunk * prod(self.rest)

    @property
    def even(self) -> bool:
        """Whether the pieces fill the whole exactly."""
        return self.chunk * self.parts == self.whole[self.dim] if self.whole else True

    @property
    def flat(self) -> bool:
        """Whether a contiguous whole is its buffer, element for element."""
        return bool(self.whole) and self.even and self.dim == 0

    def pairs(self, x: Tensor, rows: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Views of a whole parameter and of its place in a buffer, (parts, chunk, *rest): the same elements."""
        x = x.movedim(self.dim, 0) if self.whole else x.view(1)
        n = x.shape[0] // self.chunk if self.chunk else 0
        if n:
            yield x[: n * self.chunk].unflatten(0, (n, self.chunk)), rows[:n]
        if left := x.shape[0] - n * self.chunk:
            yield x[n * self.chunk :], rows[n, :left]

    def piece(self, row: Tensor) -> Tensor:
        """This rank's parameter at rest as a view of one row of a buffer, (chunk, *rest)."""
        return row[: self.mine[self.dim]].movedim(0, self.dim) if self.whole else row.view(())


@dataclass(frozen=True, eq=False)
class Pack:
    """Slots side by side in one flat buffer: row r holds rank r's piece of each. A pack is itself, not its content."""

    slots: tuple[Slot, ...]
    parts: int

    @property
    def width(self) -> int:
        """The elements of one row."""
        return sum(s.width for s in self.slots)

    @property
    def even(self) -> bool:
        """Whether there is no padding anywhere."""
        return all(s.even for s in self.slots)

    def views(self, flat: Tensor, parts: int) -> dict[str, Tensor]:
        """Each parameter's place in a buffer of so many rows, (parts, chunk, *rest)."""
        columns = flat.view(parts, self.width).split([s.width for s in self.slots], 1)
        return {s.name: c.view(parts, s.chunk, *s.rest) for s, c in zip(self.slots, columns, strict=True)}


class Layout:
    """Specs, groups and buckets of a model under a strategy on a mesh, as one rank sees them.

    `shapes` are in forward order. `groups`: the units of communication in forward order; the first is in use from the
    first to the last moment.
    `rules`: what the tensor axis splits. `trained`: what gradients are reduced of (None: all); the rest is constant.
    `made`: what the parameters of a group, by full name, become just before it computes; called again where they are
    gathered again. ValueError for a parameter in no group or in two, and for a wrong mesh.
    """

    def __init__(
        self,
        strategy: Strategy,
        mesh: Mesh,
        shapes: Mapping[str, Shape],
        groups: Mapping[str, Sequence[str]],
        rules: Rules = (),
        trained: Container[str] | None = None,
        made: Made | None = None,
    ) -> None:
        check_axes(strategy, mesh.shape)
        _check_groups(shapes, groups)
        self.strategy, self.mesh, self.shapes = strategy, mesh, {k: tuple(s) for k, s in shapes.items()}
        self.specs = {k: self._at_rest(spec_of(rules, k), s) for k, s in self.shapes.items()}
        self.state: Axis | None = mesh.axis(strategy.state) if strategy.state else None
        self.copies: Axis | None = mesh.axis(*(name for name in batch_axes(mesh) if name != strategy.state))
        self.group_names = list(groups)
        n = self.state.size if self.state else 1
        self.groups = {g: Pack(tuple(self._slot(k) for k in names), n) for g, names in groups.items()}
        self.group_of = {s.name: g for g, pack in self.groups.items() for s in pack.slots}
        self.slot_of = {s.name: s for pack in self.groups.values() for s in pack.slots}
        self.trained = dict.fromkeys(k for k in self.shapes if trained is None or k in trained)
        self.partly = {g for g, pack in self.groups.items() if any(s.name not in self.trained for s in pack.slots)}
        self.lowest = self._lowest()
        self.made = made
        self.typical = self._typical()
        self.buckets = list(self._buckets(n))
        self.bucket_of = {s.name: b for b in self.buckets for s in b.slots}

    def _at_rest(self, spec: P, shape: Shape) -> P:
        """The spec in use, split further over the state axis along the dimension that wastes least."""
        spec = spec.within(self.mesh)
        axis, n = self.strategy.state, self.mesh.size(self.strategy.state or "")
        here = local_shape(shape, spec, self.mesh, 0)  # as rank 0 sees it, so that all ranks agree
        if axis is None or n == 1 or not here:
            return spec
        return spec.further(min(range(len(here)), key=lambda d: (-(-here[d] // n) * n / here[d], d)), axis)

    def in_use(self, name: str) -> P:
        """The spec of a parameter while it computes."""
        return self.specs[name].without(self.strategy.state)

    def _slot(self, name: str) -> Slot:
        spec, axis = self.specs[name], self.strategy.state
        whole = local_shape(self.shapes[name], self.in_use(name), self.mesh)
        dim = next((d for d, axes in enumerate(spec) if axis in axes), 0)
        parts = self.state.size if self.state and axis in spec.axes else 1
        chunk = -(-whole[dim] // parts) if whole else 1
        return Slot(name, whole, local_shape(self.shapes[name], spec, self.mesh), dim, chunk, parts)

    def _lowest(self) -> int:
        """Where the backward pass ends: the number of the first group of which something is trained.

        Of the group that is always in use, only what stands before all others is used before them.
        """
        names, always = list(self.shapes), self.group_names[0]
        begin = next((i for i, k in enumerate(names) if self.group_of[k] != always), len(names))
        own = [self.group_of[k] for k in self.trained]
        early = any(k in self.trained for k in names[:begin])
        found = [self.group_names.index(g) for g in own if early or g != always]
        return min(found, default=len(self.group_names))

    def _typical(self) -> int:
        """The elements of the largest group but the first, which is always here: what one more group costs."""
        packs = list(self.groups.values())
        return max((pack.parts * pack.width for pack in packs[1:] or packs), default=0)

    def _buckets(self, n: int, itemsize: int = 4) -> Iterator[Pack]:
        """The slots in the order of the backward pass, as many together as `bucket_bytes` allows; larger ones alone."""
        asked = self.strategy.bucket_bytes
        most = min(MOST, itemsize * self.typical // 4) if asked == "auto" else asked or 0
        few: list[Slot] = []
        size = 0
        slots = (s for g in reversed(self.group_names) for s in reversed(self.groups[g].slots))
        for slot in (s for s in slots if s.name in self.trained):
            nbytes = itemsize * n * slot.width
            if nbytes > most:
                yield Pack((slot,), n)
                continue
            if few and size + nbytes > most:
                yield Pack(tuple(few), n)
                few, size = [], 0
            few.append(slot)
            size += nbytes
        if few:
            yield Pack(tuple(few), n)

    def regathers(self, group: str) -> bool:
        """Whether a group is dropped after its forward pass and gathered again for its backward pass.

        The first is in use from the first to the last moment, and the last is used again at once.
        """
        ends = (self.group_names[0], self.group_names[-1])
        return self.state is not None and self.strategy.regather and group not in ends

    @property
    def split_axes(self) -> tuple[str, ...]:
        """The mesh axes that split at least one parameter at rest."""
        used = {a for spec in self.specs.values() for a in spec.axes}
        return tuple(n for n in self.mesh.shape if n in used)

    def slices(self, name: str, rank: int | None = None) -> tuple[slice, ...]:
        """The box of a whole parameter that a rank (None: this one) holds."""
        return slices(self.shapes[name], self.specs[name], self.mesh, rank)

    def local_shape(self, name: str, rank: int | None = None) -> Shape:
        """The shape of a parameter at rest."""
        return local_shape(self.shapes[name], self.specs[name], self.mesh, rank)

    def owns(self, name: str) -> bool:
        """Whether this rank is the first of those that hold the same part."""
        held = set(self.specs[name].axes)
        return all(i == 0 for axis, i in self.mesh.coordinates.items() if axis not in held)

    def rows(self) -> list[tuple[str, str, str, str, str, str]]:
        """For each parameter: name, whole shape, spec, local shape, group, bucket; as text, to be printed."""
        numbers = {id(b): str(i) for i, b in enumerate(self.buckets)}
        return [
            (k, _times(s), repr(self.specs[k]), _times(self.local_shape(k)), self.group_of[k],
             numbers[id(self.bucket_of[k])] if k in self.trained else "")
            for k, s in self.shapes.items()
        ]  # fmt: skip

    def __str__(self) -> str:
        table = [("parameter", "shape", "spec", "here", "group", "bucket"), *self.rows()]
        widths = [max(len(row[i]) for row in table) for i in range(6)]
        return "\n".join("  ".join(x.ljust(w) for x, w in zip(row, widths, strict=True)).rstrip() for row in table)


def _times(shape: Shape) -> str:
    return "x".join(str(n) for n in shape) or "1"


def _check_groups(shapes: Mapping[str, Shape], groups: Mapping[str, Sequence[str]]) -> None:
    seen: dict[str, str] = {}
    for group, names in groups.items():
        for name in names:
            if name not in shapes:
                raise ValueError(f"group {group!r} has {name!r}, which is no parameter")
            if name in seen:
                raise ValueError(f"{name!r} is in the groups {seen[name]!r} and {group!r}; a parameter travels in one")
            seen[name] = group
    if missing := [name for name in shapes if name not in seen]:
        raise ValueError(f"{len(missing)} parameters are in no group, first {missing[0]!r}; give each to one group")
