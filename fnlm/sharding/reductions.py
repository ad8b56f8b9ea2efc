"""Numbers about a whole model that no rank has: norms, totals, agreement; and a check that copies are copies."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from fnlm.collectives import Axis
from fnlm.sharding.layout import Layout
from fnlm.sharding.mesh import Mesh
from fnlm.types import Params


def total(x: Tensor, axis: Axis | None) -> Tensor:
    """The sum of every rank's x along an axis; x itself where there is none."""
    if axis is None:
        return x
    out = x.detach().clone()
    axis.wire.all_reduce(out.view(-1), "sum").wait()
    return out


def largest(x: Tensor, axis: Axis | None) -> Tensor:
    """The largest of every rank's x along an axis, elementwise."""
    if axis is None:
        return x
    out = x.detach().clone()
    axis.wire.all_reduce(out.view(-1), "max").wait()
    return out


def everywhere(ok: Tensor, mesh: Mesh) -> bool:
    """Whether all ranks say so; `ok` is a 0-d bool on the device of the parameters."""
    return not bool(largest((~ok).float(), mesh.axis(*mesh.shape)))


def global_norm(tree: Params, layout: Layout) -> Tensor:
    """The L2 norm of all parameters (or gradients) together, 0-d, the same on every rank: exact for any mixture.

    A part that several ranks hold counts once: each adds its share, and one number travels.
    """
    axes = layout.split_axes
    dtype = torch.promote_types(next(iter(tree.values())).dtype, torch.float32) if tree else torch.float32
    device = next(iter(tree.values())).device if tree else None
    square = torch.zeros((), dtype=torch.float64 if dtype == torch.float64 else torch.float32, device=device)
    everyone = layout.mesh.size(*axes)
    for name, g in tree.items():
        share = layout.mesh.size(*layout.specs[name].axes) / everyone
        square = square + torch.linalg.vector_norm(g, dtype=dtype).square() * share
    return total(square, layout.mesh.axis(*axes)).sqrt()


def check_copies(tree: Mapping[str, Tensor], layout: Layout, tolerance: float = 0.0) -> None:
    """Every rank calls it. ValueError where ranks that should hold the same part hold different numbers."""
    for name, x in tree.items():
        held = layout.specs[name].axes
        axis = layout.mesh.axis(*(n for n in layout.mesh.shape if n not in held))
        if axis is None or not x.numel():
            continue
        both = torch.cat([x.detach().flatten(), -x.detach().flatten()])
        top, low = largest(both, axis).chunk(2)
        gap = float((top + low).abs().max())
        if not gap <= tolerance:
            raise ValueError(f"{name} differs by {gap:.2e} along {axis.name}, where its ranks hold copies")
