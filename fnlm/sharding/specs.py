"""Specs: which mesh axes split which dimension of a parameter, chosen by its name."""

from __future__ import annotations

import re
from collections.abc import Sequence

from torch import Tensor

from fnlm.sharding.mesh import Mesh, coordinates

Shape = tuple[int, ...]


class P(tuple[tuple[str, ...], ...]):
    """One entry per dimension: None, an axis, or a tuple of axes, the major first; P() is a copy on every rank.

    `unit`: the first axis of the first entry cuts between whole units, such as heads, never inside one.
    """

    unit: int
    unit_dim: int

    def __new__(cls, *dims: str | tuple[str, ...] | None, unit: int = 1, unit_dim: int | None = None) -> P:
        new = super().__new__(cls, [((d,) if isinstance(d, str) else tuple(d or ())) for d in dims])
        new.unit = unit
        new.unit_dim = next((i for i, d in enumerate(new) if d), 0) if unit_dim is None else unit_dim
        return new

    @property
    def axes(self) -> tuple[str, ...]:
        """Every axis that splits something."""
        return tuple(a for dim in self for a in dim)

    def of(self, dim: int) -> tuple[str, ...]:
        """The axes that split a dimension."""
        return self[dim] if dim < len(self) else ()

    def within(self, mesh: Mesh) -> P:
        """Without the axes along which nobody else lies."""
        kept = [tuple(a for a in dim if mesh.size(a) > 1) for dim in self]
        return P(*kept, unit=self.unit if any(kept) else 1, unit_dim=self.unit_dim)

    def further(self, dim: int, axis: str) -> P:
        """This spec with a dimension split once more, inside each part."""
        dims = [*self, *[()] * (dim + 1 - len(self))]
        dims[dim] = (*dims[dim], axis)
        return P(*dims, unit=self.unit, unit_dim=self.unit_dim)

    def without(self, axis: str | None) -> P:
        """This spec with one axis taken out."""
        return P(*(tuple(a for a in dim if a != axis) for dim in self), unit=self.unit, unit_dim=self.unit_dim)

    def __repr__(self) -> str:
        words = ["None" if not d else repr(d[0]) if len(d) == 1 else repr(d) for d in self]
        return f"P({', '.join(words + ([f'unit={self.unit}'] if self.unit > 1 else []))})"


Rules = Sequence[tuple[str, P]]
"""Ordered: the first pattern that matches a whole name decides; no match is P()."""


def spec_of(rules: Rules, name: str) -> P:
    """The spec that the rules give to a name."""
    return next((spec for pattern, spec in rules if re.fullmatch(pattern, name)), P())


def span(n: int, parts: int, i: int) -> tuple[int, int]:
    """Part i of n as [start, stop): parts of ceil(n / parts), the last ones short or empty, as torch.chunk."""
    size = -(-n // parts)
    return min(i * size, n), min((i + 1) * size, n)


def slices(shape: Shape, spec: P, mesh: Mesh, rank: int | None = None) -> tuple[slice, ...]:
    """The box of the whole tensor that a rank (None: this one) holds."""
    at = coordinates(mesh.shape, mesh.rank if rank is None else rank)
    out = []
    for dim, n in enumerate(shape):
        low, high, unit = 0, n, spec.unit if dim == spec.unit_dim else 1
        for axis in spec.of(dim):
            if mesh.size(axis) > 1:
                start, stop = span(-(-(high - low) // unit), mesh.size(axis), at[axis])
                low, high = low + start * unit, min(low + stop * unit, high)
                unit = 1
        out.append(slice(low, max(low, high)))
    return tuple(out)


def local_shape(shape: Shape, spec: P, mesh: Mesh, rank: int | None = None) -> Shape:
    """The shape of what a rank holds."""
    return tuple(s.stop - s.start for s in slices(shape, spec, mesh, rank))


def part(x: Tensor, spec: P, mesh: Mesh, rank: int | None = None) -> Tensor:
    """The part of a whole tensor that a rank holds: a copy, made without communication."""
    return x.detach()[slices(tuple(x.shape), spec, mesh, rank)].clone()
