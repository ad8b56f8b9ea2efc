"""Momentum."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from fnlm.optim.base import Needs, check, transform, zero_count
from fnlm.types import Params, Transform


class TraceState(NamedTuple):
    """`trace` is the momentum buffer."""

    count: Tensor  # type: ignore[assignment]  # the paper's word; hides tuple.count
    trace: Params


@dataclass(frozen=True)
class Trace:
    """See `trace`."""

    momentum: float
    nesterov: bool = False
    dampening: float = 0.0
    needs: ClassVar[Needs] = "element"

    def init(self, params: Params) -> TraceState:
        return TraceState(zero_count(), {k: torch.zeros_like(p) for k, p in params.items()})

    def update(self, grads: Params, state: TraceState, params: Params) -> tuple[Params, TraceState]:
        grads = {k: g.to(state.trace[k].dtype) for k, g in grads.items()}
        # the first gradient enters undamped, as in torch.optim.SGD
        weight = 1.0 - self.dampening * (state.count > 0).double()
        trace = {k: (state.trace[k] * self.momentum + g * weight).to(g.dtype) for k, g in grads.items()}
        updates = {k: g + self.momentum * trace[k] for k, g in grads.items()} if self.nesterov else trace
        return dict(updates), TraceState(state.count + 1, trace)

    def update_(self, names: Sequence[str], grads: list[Tensor], state: TraceState) -> list[Tensor]:
        traces = [state.trace[k] for k in names]
        torch._foreach_mul_(traces, self.momentum)
        torch._foreach_add_(traces, grads, alpha=1.0 if int(state.count) == 0 else 1.0 - self.dampening)
        if not self.nesterov:
            return traces
        torch._foreach_add_(grads, traces, alpha=self.momentum)
        return grads


def trace(momentum: float, nesterov: bool = False, dampening: float = 0.0) -> Transform:
    """The sum of past gradients, each weighted by momentum**age (Sutskever et al. 2013, section 2; as torch.optim.SGD).

    Raises ValueError unless 0 <= momentum < 1, 0 <= dampening <= 1, and dampening = 0 under nesterov.
    """
    check(0 <= momentum < 1, f"momentum={momentum} is outside [0, 1); choose e.g. 0.9")
    check(0 <= dampening <= 1, f"dampening={dampening} is outside [0, 1]; 0 is usual")
    check(not (nesterov and dampening), f"nesterov with dampening={dampening} is not defined; set dampening=0")
    return transform(Trace(momentum, nesterov, dampening))
