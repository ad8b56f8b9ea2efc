"""Axes: ranges and ticks at 1, 2 and 5 times powers of ten, and numbers as people write them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from fnlm.report.run import Floats

UNITS = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


class Scale(NamedTuple):
    """From `low` to `high`, with ticks in between."""

    low: float
    high: float
    log: bool
    ticks: tuple[float, ...]

    def at(self, values: Floats) -> Floats:
        """Where values lie, 0 for low and 1 for high."""
        low, high = (math.log(v) if self.log else v for v in (self.low, self.high))
        return ((np.log(values) if self.log else values) - low) / (high - low)


def linear(low: float, high: float, count: int = 5, rounded: bool = True) -> Scale:
    """About `count` ticks; `rounded`: the range is widened to the ticks around it."""
    if high <= low:
        low, high = min(low, 2 * low), max(high, 2 * high) or 1.0
    step = nice((high - low) / count)
    # A hair of tolerance: 0.3 / 0.1 is a little less than 3.
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    if not rounded:
        first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    ticks = tuple(round(i * step, 12 - math.floor(math.log10(step))) for i in range(first, last + 1))
    return Scale(ticks[0], ticks[-1], False, ticks) if rounded else Scale(low, high, False, ticks)


def logarithmic(low: float, high: float) -> Scale:
    """Ticks at powers of ten, at 1, 2 and 5 times them where there are few, or evenly in a short range; low > 0."""
    low, high = low / 1.1, high * 1.1
    if high / low < 12:
        return linear(low, high, count=8, rounded=False)._replace(log=True)
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    factors = (1, 2, 5) if len(powers) <= 3 else (1, 3) if len(powers) <= 4 else (1,)
    every = max(1, math.ceil(len(powers) / 7))
    ticks = (float(f"{m}e{p}") for p in powers if p % every == 0 for m in factors)
    return Scale(low, high, True, tuple(t for t in ticks if low <= t <= high))


def nice(step: float) -> float:
    """The least of 1, 2 and 5 times a power of ten that is not less."""
    power = math.floor(math.log10(step) + 1e-9)
    return next(m * 10.0**power for m in (1, 2, 5, 10) if m * 10.0**power >= step * (1 - 1e-9))


def labels(scale: Scale) -> list[str]:
    """The ticks as texts: alike on one axis."""
    if scale.log or not scale.ticks:
        return [short(t) for t in scale.ticks]
    top = max(abs(t) for t in scale.ticks)
    if top >= 1e4 or 0 < top < 1e-2:
        unit = next((u for u in UNITS if top >= u[0]), None)
        return [f"{t / unit[0]:.6g}{unit[1]}" if unit and t else _exponent(t) for t in scale.ticks]
    step = scale.ticks[1] - scale.ticks[0] if len(scale.ticks) > 1 else top
    decimals = max(0, -math.floor(math.log10(step) + 1e-9)) if step else 0
    return [f"{t:.{decimals}f}" for t in scale.ticks]


def short(value: float) -> str:
    """A tick by itself: 20k, 0.5, 2e-4."""
    if abs(value) >= 1e4:
        size, unit = next(u for u in UNITS if abs(value) >= u[0])
        return f"{value / size:.6g}{unit}"
    return _exponent(value) if 0 < abs(value) < 1e-2 else f"{value:.6g}"


def _exponent(value: float) -> str:
    if not value:
        return "0"
    mantissa, _, power = f"{value:.4e}".partition("e")
    return f"{float(mantissa):g}e{int(power)}"


def said(value: float | None, digits: int = 4) -> str:
    """A number in a table or under the pointer: four digits, whole from 10,000 on; a dash where there is none."""
    if value is None or not math.isfinite(value):
        return "–"
    if value == int(value) or abs(value) >= 1e4:
        return f"{value:,.0f}"
    return _exponent(float(f"{value:.{digits}g}")) if abs(value) < 1e-3 else f"{value:.{digits}g}"


def large(value: float | None) -> str:
    """A count with a unit: 12.5 M."""
    if value is None or not math.isfinite(value):
        return "–"
    size, unit = next((u for u in UNITS if value >= 0.9995 * u[0]), (1.0, ""))
    if size == 1 and value == int(value):
        return f"{value:.0f}"
    return f"{value / size:#.3g}".rstrip(".") + f" {unit}".rstrip()


def duration(seconds: float | None) -> str:
    """Seconds as 42 s, 3:05 min, 2:10:00 h."""
    if seconds is None or not math.isfinite(seconds):
        return "–"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    hours, minutes_left = divmod(minutes, 60)
    return f"{hours}:{minutes_left:02}:{rest:02} h" if hours else f"{minutes}:{rest:02} min"


def domain(values: Sequence[Floats]) -> tuple[float, float] | None:
    """The least and the greatest finite value of all, or None where there is none."""
    finite = [v[np.isfinite(v)] for v in values]
    finite = [v for v in finite if len(v)]
    return (min(float(v.min()) for v in finite), max(float(v.max()) for v in finite)) if finite else None
