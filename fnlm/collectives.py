"""Linear collectives and their transposes, and the axes they run along: the only file that speaks to others in a step.

    pvary  : identity     <->  psum    : all-reduce       (Megatron's f and g; JAX's pvary and psum)
    gather : all-gather   <->  scatter : reduce-scatter
    split  : own slice    <->            all-gather       (of what is equal on all ranks)

Each is the identity where the axis is None, so a model written with them is also the single-device model.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch import Tensor


class Work(Protocol):
    """Something on its way; the tensors it writes are valid after `wait()`."""

    def wait(self) -> Any: ...


class Wire(Protocol):
    """Three verbs along one axis; flat, contiguous tensors; each returns at once with a `Work`."""

    def all_reduce(self, x: Tensor, op: str) -> Work: ...
    def all_gather(self, out: Tensor, x: Tensor) -> Work: ...
    def reduce_scatter(self, out: Tensor, x: Tensor) -> Work: ...


# torch 2.13 has new names for these two, and warns at one of the old ones.
_all_gather_single = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
_reduce_scatter_single = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)


class Dist:
    """The wire of torch.distributed: one process group."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group

    def all_reduce(self, x: Tensor, op: str) -> Work:
        """Reduce `x` in place with op "sum" or "max"."""
        work: Work = dist.all_reduce(x, getattr(dist.ReduceOp, op.upper()), group=self.group, async_op=True)
        return work

    def all_gather(self, out: Tensor, x: Tensor) -> Work:
        """Fill `out` (size * n) with every rank's `x` (n)."""
        work: Work = _all_gather_single(out, x, group=self.group, async_op=True)
        return work

    def reduce_scatter(self, out: Tensor, x: Tensor) -> Work:
        """Fill `out` (n) with this rank's part of the sum of every rank's `x` (size * n)."""
        work: Work = _reduce_scatter_single(out, x, group=self.group, async_op=True)
        return work


@dataclass(frozen=True)
class Axis:
    """A named mesh axis as one rank sees it: how many ranks lie along it, which one this is, and the wire."""

    name: str
    size: int
    index: int
    wire: Wire = field(compare=False)


class Axes(NamedTuple):
    """The mesh axes a forward may be split over; None: nobody to talk to.

    `tensor` splits heads and columns, `context` positions. `sequence_parallel`: outside the tensor-parallel regions
    each rank of `tensor` has some positions only (Korthikanti et al. 2022, 4.2.2).
    """

    data: Axis | None = None
    tensor: Axis | None = None
    context: Axis | None = None
    sequence_parallel: bool = False

    @property
    def sequence(self) -> Axis | None:
        """The axis that splits positions between tensor-parallel regions."""
        return self.tensor if self.sequence_parallel else None


LOCAL = Axes()


def _all_reduce(x: Tensor, axis: Axis, op: str = "sum") -> Tensor:
    out = x.clone(memory_format=torch.contiguous_format)
    axis.wire.all_reduce(out, op).wait()
    return out


def _all_gather(x: Tensor, axis: Axis, dim: int) -> Tensor:
    rows = x.movedim(dim, 0).contiguous()
    out = rows.new_empty(axis.size * rows.numel())
    axis.wire.all_gather(out, rows.view(-1)).wait()
    return out.view(axis.size * rows.shape[0], *rows.shape[1:]).movedim(0, dim)


def _reduce_scatter(x: Tensor, axis: Axis, dim: int) -> Tensor:
    rows = x.movedim(dim, 0).contiguous()
    if rows.shape[0] % axis.size:
        raise ValueError(f"dimension {dim} of size {rows.shape[0]} is not divisible by {axis.name}={axis.size}")
    out = rows.new_empty(rows.numel() // axis.size)
    axis.wire.reduce_scatter(out, rows.view(-1)).wait()
    return out.view(rows.shape[0] // axis.size, *rows.shape[1:]).movedim(0, dim)


class _PVary(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis) -> Tensor:
        ctx.axis = axis
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        return _all_reduce(g, ctx.axis), None


class _PSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis) -> Tensor:
        return _all_reduce(x, axis)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        return g, None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis, dim: int) -> Tensor:
        ctx.axis, ctx.dim = axis, dim
        return _all_gather(x, axis, dim)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, None]:
        return _reduce_scatter(g, ctx.axis, ctx.dim), None, None


class _Scatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis, dim: int) -> Tensor:
        ctx.axis, ctx.dim = axis, dim
        return _reduce_scatter(x, axis, dim)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, None]:
        return _all_gather(g, ctx.axis, ctx.dim), None, None


class _Split(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis, dim: int) -> Tensor:
        ctx.axis, ctx.dim = axis, dim
        if x.shape[dim] % axis.size:
            raise ValueError(f"dimension {dim} of size {x.shape[dim]} is not divisible by {axis.name}={axis.size}")
        return x.chunk(axis.size, dim)[axis.index].clone()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, None]:
        return _all_gather(g, ctx.axis, ctx.dim), None, None


def _apply(fn: type[torch.autograd.Function], *args: Any) -> Tensor:
    out: Tensor = fn.apply(*args)
    return out


def pvary(x: Tensor, axis: Axis | None) -> Tensor:
    """The identity from a value equal on all ranks to one that may differ; its gradient is summed over the axis."""
    return x if axis is None else _apply(_PVary, x, axis)


def psum(x: Tensor, axis: Axis | None) -> Tensor:
    """The sum over the axis of every rank's `x`; its gradient is the identity."""
    return x if axis is None else _apply(_PSum, x, axis)


def gather(x: Tensor, axis: Axis | None, dim: int) -> Tensor:
    """Every rank's `x` laid end to end along `dim`; its gradient is `scatter`."""
    return x if axis is None else _apply(_Gather, x, axis, dim)


def scatter(x: Tensor, axis: Axis | None, dim: int) -> Tensor:
    """This rank's slice along `dim` of the sum over the axis; its gradient is `gather`."""
    return x if axis is None else _apply(_Scatter, x, axis, dim)


def split(x: Tensor, axis: Axis | None, dim: int) -> Tensor:
    """This rank's slice along `dim` of what is equal on all ranks; its gradient is every rank's, laid end to end."""
    return x if axis is None else _apply(_Split, x, axis, dim)


def enter(x: Tensor, axes: Axes) -> Tensor:
    """Into a tensor-parallel region, (B, T, D): all positions, of a value equal on all ranks."""
    return gather(x, axes.tensor, 1) if axes.sequence_parallel else pvary(x, axes.tensor)


def leave(x: Tensor, axes: Axes) -> Tensor:
    """Out of a tensor-parallel region, (B, T, D): the sum over its ranks, of all positions or of this rank's."""
    return scatter(x, axes.tensor, 1) if axes.sequence_parallel else psum(x, axes.tensor)


def pmax(x: Tensor, axis: Axis | None) -> Tensor:
    """The largest over the axis, elementwise; a constant to autograd."""
    return x.detach() if axis is None else _all_reduce(x.detach(), axis, "max")
