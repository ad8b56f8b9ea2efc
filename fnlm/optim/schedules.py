"""Learning rates as pure functions of the count of updates made: 0 at the first update.

A Python int gives a float; a 0-d tensor gives a 0-d float64 tensor (nothing is compiled again when it changes).
`warmup` updates climb linearly to the peak, which is reached at count = warmup; the first update is not wasted: it has
peak / (warmup + 1).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

Count: TypeAlias = "int | Tensor"
Schedule: TypeAlias = Callable[[Any], Any]
"""count (int or 0-d int64 tensor) -> float or 0-d tensor."""


def _real(count: Count) -> Any:
    return count.double() if isinstance(count, Tensor) else float(count)


def _clip(x: Any, low: float, high: float) -> Any:
    return x.clamp(low, high) if isinstance(x, Tensor) else min(max(x, low), high)


def _where(condition: Any, yes: Any, no: Any) -> Any:
    return torch.where(condition, yes, no) if isinstance(condition, Tensor) else yes if condition else no


def _cos(x: Any) -> Any:
    return x.cos() if isinstance(x, Tensor) else math.cos(x)


def _check(peak: float, warmup: int, total: int | None = None, floor: float = 0.0) -> None:
    if not peak >= 0:
        raise ValueError(f"peak={peak} is not a learning rate; give a number >= 0")
    if warmup < 0:
        raise ValueError(f"warmup={warmup} is negative; 0 means no warm-up")
    if total is not None and total <= warmup:
        raise ValueError(f"total={total} leaves no update after warmup={warmup}; choose total > warmup")
    if not 0 <= floor <= peak:
        raise ValueError(f"floor={floor} is outside [0, peak={peak}]; choose one inside")


def _climb(t: Any, warmup: int) -> Any:
    return _clip((t + 1) / (warmup + 1), 0.0, 1.0)


def constant(value: float) -> Schedule:
    """The same value always. Raises ValueError if it is negative."""
    if not value >= 0:
        raise ValueError(f"value={value} is not a learning rate; give a number >= 0")
    return lambda count: torch.full_like(_real(count), value) if isinstance(count, Tensor) else value


def linear(start: float, end: float, steps: int) -> Schedule:
    """From start at count 0 to end at count = steps, then end."""
    if steps <= 0:
        raise ValueError(f"steps={steps} is no distance; choose steps >= 1")
    return lambda count: start + (end - start) * _clip(_real(count) / steps, 0.0, 1.0)


def warmup_cosine(peak: float, warmup: int, total: int, floor: float = 0.0) -> Schedule:
    """Climb to peak, then half a cosine to floor at count = total (Loshchilov & Hutter 2017, eq. 5, one period)."""
    _check(peak, warmup, total, floor)

    def schedule(count: Count) -> Any:
        t = _real(count)
        gone = _clip((t - warmup) / (total - warmup), 0.0, 1.0)
        return _where(t < warmup, peak * _climb(t, warmup), floor + (peak - floor) * 0.5 * (1 + _cos(math.pi * gone)))

    return schedule


def warmup_linear(peak: float, warmup: int, total: int, floor: float = 0.0) -> Schedule:
    """Climb to peak, then a straight line to floor at count = total."""
    return warmup_stable_decay(peak, warmup, total, total - warmup, floor)


def warmup_stable_decay(peak: float, warmup: int, total: int, decay: int, floor: float = 0.0) -> Schedule:
    """Climb to peak, stay, and fall in a straight line over the last `decay` updates (Hägele et al. 2024, sec. 3)."""
    _check(peak, warmup, total, floor)
    if not 1 <= decay <= total - warmup:
        raise ValueError(f"decay={decay} does not fit between warmup={warmup} and total={total}; "
                         f"choose 1 to {total - warmup}")  # fmt: skip

    def schedule(count: Count) -> Any:
        t = _real(count)
        left = _clip((total - t) / decay, 0.0, 1.0)
        return _where(t < warmup, peak * _climb(t, warmup), floor + (peak - floor) * left)

    return schedule


def inverse_sqrt(peak: float, warmup: int) -> Schedule:
    """Climb to peak, then fall as 1 / sqrt(count) (Vaswani et al. 2017, section 5.3, scaled to the peak)."""
    _check(peak, warmup)

    def schedule(count: Count) -> Any:
        t = _real(count)
        return _where(t < warmup, peak * _climb(t, warmup), peak * ((warmup + 1) / (t + 1)) ** 0.5)

    return schedule


def at_most_inverse_sqrt(schedule: Schedule) -> Schedule:
    """min(schedule(count), 1 / sqrt(count + 1)): Adafactor's relative step size (Shazeer & Stern 2018, algorithm 5)."""

    def bounded(count: Count) -> Any:
        bound, value = (_real(count) + 1) ** -0.5, schedule(count)
        return _where(value < bound, value, bound)

    return bounded


def join(schedules: Sequence[Schedule], boundaries: Sequence[int]) -> Schedule:
    """One schedule after another: schedule i + 1 starts, with its own count 0, at boundaries[i].

    Raises ValueError unless there is one boundary fewer than schedules, in increasing order.
    """
    if len(boundaries) != len(schedules) - 1 or list(boundaries) != sorted(set(boundaries)):
        raise ValueError(f"{len(schedules)} schedules need {len(schedules) - 1} increasing boundaries, "
                         f"not {list(boundaries)}")  # fmt: skip

    def schedule(count: Count) -> Any:
        value = schedules[0](count)
        for start, later in zip(boundaries, schedules[1:], strict=True):
            # the count of a schedule that has not begun is 0: none need be defined below it
            since = (count - start).clamp(min=0) if isinstance(count, Tensor) else max(count - start, 0)
            value = _where(count >= start, later(since), value)
        return value

    return schedule
