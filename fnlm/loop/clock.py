"""Where the time of training goes: steps, and waiting for data; evaluations and saves do not count."""

from __future__ import annotations

from time import perf_counter
from typing import NamedTuple


class Times(NamedTuple):
    """Over the steps since the last reading: seconds a step, tokens a second, and the share spent waiting for data."""

    step: float
    tokens_per_second: float
    data_share: float


class Clock:
    """`waited()` after each batch arrived, `stepped(tokens)` after each step; `paused()` after what does not count."""

    def __init__(self) -> None:
        self._mark = perf_counter()
        self._clear()

    def _clear(self) -> None:
        self._waiting = self._working = 0.0
        self._steps = self._tokens = 0

    def _lap(self) -> float:
        now = perf_counter()
        lap, self._mark = now - self._mark, now
        return lap

    def waited(self) -> None:
        self._waiting += self._lap()

    def stepped(self, tokens: int) -> None:
        self._working += self._lap()
        self._steps += 1
        self._tokens += tokens

    def paused(self) -> None:
        self._lap()

    def read(self) -> Times:
        """The figures since the last reading, and a fresh start."""
        seconds = max(self._waiting + self._working, 1e-9)
        times = Times(seconds / max(1, self._steps), self._tokens / seconds, self._waiting / seconds)
        self._clear()
        return times
