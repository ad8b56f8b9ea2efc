"""Links that bound the gradients."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from fnlm.optim.base import Needs, check, transform
from fnlm.types import Params, Transform, Tree


def _norm_dtype(tree: Params) -> torch.dtype:
    first = next(iter(tree.values()), None)
    return torch.float32 if first is None else torch.promote_types(first.dtype, torch.float32)


def global_norm(tree: Params) -> Tensor:
    """The L2 norm of all tensors together: 0-d, summed in float32 or better; 0 for an empty tree."""
    dtype = _norm_dtype(tree)
    if not tree:
        return torch.zeros((), dtype=dtype)
    norms = [torch.linalg.vector_norm(t, dtype=dtype) for t in tree.values()]
    norm: Tensor = torch.linalg.vector_norm(torch.stack(norms))
    return norm


class ClipState(NamedTuple):
    """`norm`: the global norm of the last gradients, before clipping."""

    norm: Tensor


@dataclass(frozen=True)
class ClipByGlobalNorm:
    """See `clip_by_global_norm`."""

    max_norm: float
    norm: Callable[[Params], Tensor] = global_norm

    @property
    def needs(self) -> Needs:
        return "tree" if self.norm is global_norm else "element"

    def init(self, params: Params) -> ClipState:
        first = next(iter(params.values()), None)
        device = None if first is None else first.device
        return ClipState(torch.zeros((), dtype=_norm_dtype(params), device=device))

    def update(self, grads: Params, state: ClipState, params: Params) -> tuple[Params, ClipState]:
        norm = self.norm(grads).to(state.norm.dtype)
        divisor, dtypes = self.divisor(norm), {k: p.dtype for k, p in params.items()}
        return {k: (g.to(dtypes[k]) / divisor).to(dtypes[k]) for k, g in grads.items()}, ClipState(norm)

    def divisor(self, norm: Tensor) -> Tensor:
        """What the gradients are divided by: 1 where the norm is small enough, so that a norm of 0 is harmless."""
        return (norm / self.max_norm).clamp(min=1.0)


def clip_by_global_norm(max_norm: float, norm: Callable[[Params], Tensor] = global_norm) -> Transform:
    """Scale all gradients so that their common L2 norm is at most `max_norm` (Pascanu et al. 2013, algorithm 1).

    The state keeps the norm before clipping, 0-d, for the metrics. On a mesh, `norm` is given by the caller: each rank
    sees shards. Raises ValueError unless max_norm > 0.
    """
    check(max_norm > 0, f"max_norm={max_norm} would stop all learning; give a number > 0, or leave the link out")
    return transform(ClipByGlobalNorm(max_norm, norm))


@dataclass(frozen=True)
class ClipByValue:
    """See `clip_by_value`."""

    limit: float
    needs: ClassVar[Needs] = "element"

    def init(self, params: Params) -> Tree:
        return ()

    def update(self, grads: Params, state: Tree, params: Params) -> tuple[Params, Tree]:
        return {name: g.clamp(-self.limit, self.limit) for name, g in grads.items()}, state


def clip_by_value(limit: float) -> Transform:
    """Clamp every element of the gradients to [-limit, limit]. Raises ValueError unless limit > 0."""
    check(limit > 0, f"limit={limit} would stop all learning; give a number > 0, or leave the link out")
    return transform(ClipByValue(limit))
