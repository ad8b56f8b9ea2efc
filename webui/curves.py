"""A run whose curves grow: each row is looked at once, however long the run."""

from __future__ import annotations

import math
from array import array
from collections.abc import Sequence

import numpy as np

from fnlm.report.run import Row, Run, Series, number


class Curves:
    """The metrics of rows over steps, and the rows that tell of events."""

    def __init__(self) -> None:
        self.events: list[Row] = []
        self._points: dict[str, tuple[array[float], array[float]]] = {}
        self._taken = 0

    def take(self, rows: Sequence[Row]) -> None:
        """Take in the rows that have come since the last call; `rows` has all of them."""
        for row in rows[self._taken :]:
            step = number(row.get("step"))
            for key in row if math.isfinite(step) else ():
                if key == "tokens" or "/" in key:
                    self._put(key, step, number(row[key]))
            if row.get("event"):
                self.events.append(row)
        self._taken = len(rows)

    def _put(self, key: str, step: float, value: float) -> None:
        """A point; of steps that were done again after a resume the last values count."""
        steps, values = self._points.setdefault(key, (array("d"), array("d")))
        while steps and steps[-1] >= step:
            steps.pop()
            values.pop()
        steps.append(step)
        values.append(value)

    def series(self, key: str) -> Series:
        """A metric over steps, as `Run.series` has it."""
        steps, values = (np.array(v, np.float64) for v in self._points.get(key, ((), ())))
        return Series(steps, np.where(np.isfinite(values), values, np.nan))

    def keys(self, prefix: str) -> list[str]:
        """The metrics that begin with `prefix`, in the order in which they were first seen."""
        return [key for key in self._points if key.startswith(prefix)]


class Growing(Run):
    """A run that has its curves from `curves`."""

    curves: Curves

    @property
    def events(self) -> list[Row]:
        return self.curves.events

    def series(self, key: str) -> Series:
        return self.curves.series(key)

    def keys(self, prefix: str) -> list[str]:
        return self.curves.keys(prefix)
