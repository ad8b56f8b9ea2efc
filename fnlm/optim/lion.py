"""Lion's direction."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from fnlm.optim.base import Needs, check, transform
from fnlm.types import Params, Transform


class LionState(NamedTuple):
    """`mu`: the running mean of the gradient."""

    mu: Params


@dataclass(frozen=True)
class ScaleByLion:
    """See `scale_by_lion`."""

    b1: float = 0.9
    b2: float = 0.99
    needs: ClassVar[Needs] = "element"

    def init(self, params: Params) -> LionState:
        return LionState({k: torch.zeros_like(p) for k, p in params.items()})

    def update(self, grads: Params, state: LionState, params: Params) -> tuple[Params, LionState]:
        grads = {k: g.to(state.mu[k].dtype) for k, g in grads.items()}
        updates = {k: state.mu[k].lerp(g, 1 - self.b1).sign() for k, g in grads.items()}
        return updates, LionState({k: state.mu[k].lerp(g, 1 - self.b2) for k, g in grads.items()})

    def update_(self, names: Sequence[str], grads: list[Tensor], state: LionState) -> list[Tensor]:
        mu = [state.mu[k] for k in names]
        updates = torch._foreach_lerp(mu, grads, 1 - self.b1)
        torch._foreach_lerp_(mu, grads, 1 - self.b2)
        torch._foreach_sign_(updates)
        return list(updates)


def scale_by_lion(b1: float = 0.9, b2: float = 0.99) -> Transform:
    """sign(b1 mu + (1 - b1) g), then mu <- b2 mu + (1 - b2) g (Chen et al. 2023, algorithm 2).

    Raises ValueError for b1 or b2 outside [0, 1).
    """
    check(0 <= b1 < 1, f"b1={b1} is outside [0, 1); choose e.g. 0.9")
    check(0 <= b2 < 1, f"b2={b2} is outside [0, 1); choose e.g. 0.99")
    return transform(ScaleByLion(b1, b2))
