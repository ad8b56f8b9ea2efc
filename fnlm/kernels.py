"""When hand-written kernels may run: not under transforms, and never differentiated twice."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar

import torch

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
