"""Elementwise functions with gradients by hand, and when such kernels may run: not under transforms, never twice."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

R = TypeVar("R")


def needs_plain(compiling_too: bool = True) -> bool:
    """Whether a torch.func transform is active (or a graph is being traced), under which hand-written kernels fail."""
    return (compiling_too and torch.compiler.is_compiling()) or torch._C._functorch.maybe_current_level() is not None


def once_differentiable(backward: Callable[..., R]) -> Callable[..., R]:
    """The backward of an autograd.Function that refuses to be differentiated itself, with RuntimeError.

    torch's own decorator refuses only where the incoming gradient has a graph, and `create_graph=True` on a loss then
    gives second derivatives that silently lack this function's part.
    """

    @wraps(backward)
    def guarded(*args: Any) -> R:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "this kernel is differentiable once; for second derivatives use torch.func, or Compute(kernels='plain')"
            )
        return backward(*args)

    return guarded


class _SquaredRelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        r = x.relu()
        ctx.save_for_backward(r)
        return r * r

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> Tensor:
        (r,) = ctx.saved_tensors
        out: Tensor = (g * r).mul_(2)
        return out


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return rotated(x, cos, sin)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return rotated(g, cos, -sin), None, None  # a rotation's transpose turns the other way


class _JoinedLinear(torch.autograd.Function):
    """The joined weight is gone after the forward pass: kept, it would be a second copy of its parts."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, *weights: Tensor) -> Tensor:
        ctx.save_for_backward(x, *weights)
        return F.linear(x, torch.cat(weights), bias)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, *weights = ctx.saved_tensors
        rows, sizes = g.flatten(0, -2), [len(w) for w in weights]
        parts = rows.split(sizes, 1)
        d_x = parts[0] @ weights[0]
        for part, w in zip(parts[1:], weights[1:], strict=True):
            d_x = torch.addmm(d_x, part, w)
        d_bias = rows.sum(0) if ctx.needs_input_grad[1] else None
        return d_x.view_as(x), d_bias, *(rows.T @ x.flatten(0, -2)).split(sizes)


def joined_linear(x: Tensor, weights: Sequence[Tensor], bias: Tensor | None, by_hand: bool) -> Tensor:
    """F.linear with weights laid one below the other: one product, as several narrow ones read the input as often."""
    if by_hand:
        out: Tensor = _JoinedLinear.apply(x, bias, *weights)  # type: ignore[no-untyped-call]
        return out
    return F.linear(x, torch.cat(list(weights)), bias)


def squared_relu(x: Tensor, by_hand: bool) -> Tensor:
    """max(x, 0)^2 (So et al. 2021); by hand in four passes forth and back, where autograd takes seven."""
    if by_hand:
        out: Tensor = _SquaredRelu.apply(x)  # type: ignore[no-untyped-call]
        return out
    return x.relu().square()


def rotate(x: Tensor, cos: Tensor, sin: Tensor, by_hand: bool) -> Tensor:
    """The first R of the last dimension turned by each position's angle (Su et al. 2021, 3.4.2; halves, not pairs)."""
    if by_hand:
        out: Tensor = _Rotate.apply(x, cos, sin)  # type: ignore[no-untyped-call]
        return out
    return rotated(x, cos, sin)


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The rotation itself; `sin` is negative in its first half."""
    r = cos.shape[-1]
    first, second, rest = x[..., : r // 2], x[..., r // 2 : r], x[..., r:]
    turned = (x if not rest.shape[-1] else x[..., :r]) * cos + torch.cat([second, first], -1) * sin
    return torch.cat([turned, rest], -1) if rest.shape[-1] else turned
