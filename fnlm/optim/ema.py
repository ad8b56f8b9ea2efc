"""The average of the parameters over time, kept in the optimizer state."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from fnlm.optim.base import Needs, apply_updates, check, transform, zero_count
from fnlm.types import Params, Transform


class EmaState(NamedTuple):
    """`average`: the averaged parameters."""

    count: Tensor  # type: ignore[assignment]  # the paper's word; hides tuple.count
    average: Params


@dataclass(frozen=True)
class EmaParams:
    """See `ema_params`."""

    decay: float
    warmup: bool = False
    needs: ClassVar[Needs] = "element"

    def init(self, params: Params) -> EmaState:
        # float32 at least: in bfloat16 a decay of 0.999 would be rounded away
        average = {k: p.detach().to(torch.promote_types(p.dtype, torch.float32), copy=True) for k, p in params.items()}
        return EmaState(zero_count(), average)

    def weight(self, count: Tensor) -> Tensor:
        """The weight of the new parameters, 0-d float64."""
        t = count.double()
        decay = ((1 + t) / (10 + t)).clamp(max=self.decay) if self.warmup else torch.full_like(t, self.decay)
        return 1 - decay

    def update(self, grads: Params, state: EmaState, params: Params) -> tuple[Params, EmaState]:
        weight, new = self.weight(state.count), apply_updates(params, grads)
        average = {k: (a + (new[k].to(a.dtype) - a) * weight).to(a.dtype) for k, a in state.average.items()}
        return grads, EmaState(state.count + 1, average)


def ema_params(decay: float, warmup: bool = False) -> Transform:
    """As the last link: average <- decay * average + (1 - decay) * updated parameters (Polyak & Juditsky 1992).

    The average starts at the initial parameters; with `warmup` the decay is min(decay, (1 + t) / (10 + t)) after t
    updates, which forgets them quickly. Updates pass unchanged. Raises ValueError unless 0 <= decay < 1.
    """
    check(0 <= decay < 1, f"decay={decay} is outside [0, 1); choose e.g. 0.999")
    return transform(EmaParams(decay, warmup))
