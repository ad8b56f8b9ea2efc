"""Whole tensors from what ranks hold, and back: for optimizers that need matrices, for comparisons, for files."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from math import prod

import torch
from torch import Tensor

from fnlm import tree
from fnlm.collectives import Axis
from fnlm.sharding.layout import Layout
from fnlm.sharding.mesh import members
from fnlm.sharding.specs import P, Shape, part
from fnlm.types import Params, Tree


def shard(params: Params, layout: Layout, rank: int | None = None) -> Params:
    """The parts of whole parameters that a rank (None: this one) holds: copies, made without communication."""
    return {k: part(v, layout.specs[k], layout.mesh, rank) for k, v in params.items()}


def unshard(params: Params, layout: Layout) -> Params:
    """The whole of parameters, or of anything laid out as they are, on every rank. Every rank calls it."""
    out = dict(params)
    for axis, names in by_axis(params, layout):
        out |= gather_whole({k: params[k] for k in names}, layout, axis)
    return {k: v.clone() if v is params[k] else v for k, v in out.items()}


def specs_of(state: Tree, layout: Layout) -> dict[str, P]:
    """The spec of every tensor in a tree by path: that of the parameter it is named after where it lies as that does.

    `adam/mu/embed.weight` lies as `embed.weight`; counts, norms and factored moments are copies on every rank.
    """
    out = {}
    for path, x in tree.leaves(state):
        name = path.rpartition("/")[2]
        as_it = name in layout.specs and tuple(x.shape) == layout.local_shape(name)
        out[path] = layout.specs[name] if as_it else P()
    return out


def by_axis(names: Iterable[str], layout: Layout) -> list[tuple[Axis, list[str]]]:
    """The split parameters together with those that are split along the same axes."""
    found: dict[tuple[str, ...], list[str]] = {}
    for name in names:
        axes = tuple(n for n in layout.mesh.shape if n in layout.specs[name].axes)
        if axes:
            found.setdefault(axes, []).append(name)
    out = []
    for axes, group in found.items():
        axis = layout.mesh.axis(*axes)
        assert axis is not None
        out.append((axis, group))
    return out


def _boxes(name: str, layout: Layout, axis: Axis) -> list[tuple[slice, ...]]:
    """What each rank along an axis holds of a parameter."""
    mesh = layout.mesh
    return [layout.slices(name, rank) for rank in members(mesh.shape, axis.name.split("+"), mesh.rank)]


def _shape(box: tuple[slice, ...]) -> Shape:
    return tuple(s.stop - s.start for s in box)


def _widths(names: Sequence[str], layout: Layout, axis: Axis) -> list[int]:
    """The elements that the largest part of each parameter has."""
    return [max(prod(_shape(box)) for box in _boxes(name, layout, axis)) for name in names]


def gather_whole(parts: Params, layout: Layout, axis: Axis) -> Params:
    """The whole of parameters that are split along one axis, by one all-gather."""
    names = list(parts)
    widths = _widths(names, layout, axis)
    one = parts[names[0]]
    row = torch.zeros(sum(widths), dtype=one.dtype, device=one.device)
    for place, name in zip(row.split(widths), names, strict=True):
        place[: parts[name].numel()] = parts[name].detach().flatten()
    out = row.new_empty(axis.size * len(row))
    axis.wire.all_gather(out, row).wait()
    whole = {}
    for name, columns in zip(names, out.view(axis.size, -1).split(widths, 1), strict=True):
        whole[name] = parts[name].new_zeros(layout.shapes[name])
        for box, column in zip(_boxes(name, layout, axis), columns, strict=True):
            whole[name][box] = column[: prod(_shape(box))].view(_shape(box))
    return whole


def scatter_whole(results: Params, names: Sequence[str], layout: Layout, axis: Axis, like: Tensor) -> Params:
    """The parts of `names` that this rank holds, by one reduce-scatter, where each whole result is on one rank only.

    Adding zeros to a result does not change it: what arrives has the bits of what was sent.
    """
    widths = _widths(names, layout, axis)
    rows = torch.zeros(axis.size, sum(widths), dtype=like.dtype, device=like.device)
    for name, columns in zip(names, rows.split(widths, 1), strict=True):
        if name in results:
            for box, column in zip(_boxes(name, layout, axis), columns, strict=True):
                column[: prod(_shape(box))] = results[name][box].flatten()
    mine = rows.new_empty(rows.shape[1])
    axis.wire.reduce_scatter(mine, rows.flatten()).wait()
    shapes = [layout.local_shape(name) for name in names]
    return {k: x[: prod(s)].view(s) for k, s, x in zip(names, shapes, mine.split(widths), strict=True)}
