"""Adafactor's direction: Adam's second moment from its row and column means, in sublinear memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from fnlm.optim.base import Needs, check, transform, zero_count
from fnlm.types import Params, Transform


class AdafactorState(NamedTuple):
    """Means of g^2: of rows (..., n, 1) and columns (..., 1, m) for matrices, of elements (`full`) for vectors."""

    count: Tensor  # type: ignore[assignment]  # the paper's word; hides tuple.count
    row: Params
    column: Params
    full: Params


@dataclass(frozen=True)
class ScaleByAdafactor:
    """See `scale_by_adafactor`."""

    beta2_decay: float = -0.8
    eps1: float | None = None
    eps2: float = 1e-3
    clip: float = 1.0
    needs: ClassVar[Needs] = "matrix"

    def init(self, params: Params) -> AdafactorState:
        matrices = {k: p for k, p in params.items() if p.ndim > 1}
        row = {k: torch.zeros_like(p[..., :1]) for k, p in matrices.items()}
        column = {k: torch.zeros_like(p[..., :1, :]) for k, p in matrices.items()}
        full = {k: torch.zeros_like(p) for k, p in params.items() if k not in matrices}
        return AdafactorState(zero_count(), row, column, full)

    def update(self, grads: Params, state: AdafactorState, params: Params) -> tuple[Params, AdafactorState]:
        count = state.count + 1
        weight = count.double() ** self.beta2_decay
        row, column, full, updates = dict(state.row), dict(state.column), dict(state.full), {}
        for k, p in params.items():
            g, eps1 = grads[k].to(p.dtype), torch.finfo(p.dtype).eps if self.eps1 is None else self.eps1
            if k in row:
                row[k] = _towards(row[k], _mean_square(g, -1), weight)
                column[k] = _towards(column[k], _mean_square(g, -2), weight)
                variance = (row[k] @ column[k]) / row[k].mean(dim=-2, keepdim=True).clamp(min=eps1)
            else:
                variance = full[k] = _towards(full[k], g * g, weight)
            u = variance.clamp(min=eps1 * eps1).rsqrt() * g
            updates[k] = u * (_rms(p).clamp(min=self.eps2) / (_rms(u) / self.clip).clamp(min=1.0))
        return updates, AdafactorState(count, row, column, full)


def _towards(old: Tensor, new: Tensor, weight: Any) -> Tensor:
    # at weight 1 (the first update) this is `new` up to rounding, since `old` is 0
    mixed: Tensor = old + (new - old) * weight
    return mixed.to(old.dtype)


def _mean_square(x: Tensor, dim: int) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(x, dim=dim, keepdim=True)
    return norm.square() / x.shape[dim]


def _rms(x: Tensor) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(x)
    return norm / float(x.numel() ** 0.5)


def scale_by_adafactor(
    beta2_decay: float = -0.8, eps1: float | None = None, eps2: float = 1e-3, clip: float = 1.0
) -> Transform:
    """max(eps2, RMS(parameter)) * clipped(g / sqrt(factored mean of g^2)) (Shazeer & Stern 2018, algorithms 4 to 6).

    The mean forgets with weight count**beta2_decay; the update's RMS is at most `clip`. eps1 None is the dtype's eps,
    as in torch.optim.Adafactor. Raises ValueError for beta2_decay > 0, a negative eps or clip < 1.
    """
    check(beta2_decay <= 0, f"beta2_decay={beta2_decay} would forget ever faster; choose e.g. -0.8")
    check((eps1 or 0) >= 0 and eps2 >= 0, f"eps1={eps1}, eps2={eps2}: neither may be negative; choose None and 1e-3")
    check(clip >= 1, f"clip={clip} is below 1, the usual RMS of an update; choose e.g. 1.0")
    return transform(ScaleByAdafactor(beta2_decay, eps1, eps2, clip))
