"""Curves as they are drawn: smoothed, and thinned without losing what stands out."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from fnlm.report.run import Floats, Series

BUCKETS = 240  # a curve is seldom drawn wider than 1000 pixels, and a bucket keeps up to 5 points
SMOOTH_FROM = 60  # points: fewer can be followed by eye
SMOOTH_PART = 40  # the moving mean sees this part of the points


def thinned(series: Series, buckets: int = BUCKETS) -> Series:
    """At most 5 points of each of `buckets` equal parts: the first, the last, the least, the greatest, and a gap."""
    n = len(series.steps)
    if n <= 5 * buckets:
        return series
    edges = np.linspace(0, n, buckets + 1).astype(int)
    first, last = edges[:-1, None], edges[1:, None] - 1
    index = np.minimum(first + np.arange(int((last - first).max()) + 1), last)
    part = series.values[index]
    gap = np.isnan(part)
    notable = [np.where(gap, np.inf, part).argmin(1), np.where(gap, -np.inf, part).argmax(1), gap.argmax(1)]
    kept = np.unique(np.concatenate([first[:, 0], last[:, 0], *(index[np.arange(buckets), at] for at in notable)]))
    return Series(series.steps[kept], series.values[kept])


def smoothed(series: Series) -> tuple[Series, int] | None:
    """The mean over a window around each point, and the window's points; None where the curve is short.

    A gap stays a gap, and its neighbours' means are over the others.
    """
    there = np.isfinite(series.values)
    if there.sum() < SMOOTH_FROM:
        return None
    half = max(2, len(there) // SMOOTH_PART // 2)
    sums, count = (_window_sum(x, half) for x in (np.where(there, series.values, 0.0), there.astype(np.float64)))
    means = np.where(there, sums / np.maximum(count, 1), np.nan)
    return Series(series.steps, means), 2 * half + 1


def _window_sum(x: NDArray[np.float64], half: int) -> Floats:
    total = np.concatenate([[0.0], np.cumsum(x)])
    at = np.arange(len(x))
    left, right = np.minimum(half, at), np.minimum(half, len(x) - 1 - at)
    # At the beginning a curve is steep: as much to the right as to the left, or it would be drawn downwards.
    window: Floats = total[at + np.minimum(left, right) + 1] - total[at - left]
    return window
