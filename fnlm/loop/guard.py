"""Whether a step's loss and gradients can be trusted."""

from __future__ import annotations

import math
from collections import deque
from typing import Any

WINDOW = 128
FEWEST = 32  # values before a deviation means anything


class Guard:
    """Looks at each step's loss and gradient norm; what is not finite, or a spike, is refused with a reason.

    A spike lies `z` standard deviations above the mean of the last `WINDOW` finite values, where it counts as just
    that: one does not hide the next, and a lasting change is accepted after some steps. `state` and `restore` let a
    resumed run decide as the first.
    """

    def __init__(self, z: float = 10.0) -> None:
        self.z = z
        self._last = {"loss": deque[float](maxlen=WINDOW), "gradient norm": deque[float](maxlen=WINDOW)}

    def reason(self, loss: float, norm: float) -> str | None:
        """Why this step should not be taken, or None."""
        found = [self._look(name, value) for name, value in (("loss", loss), ("gradient norm", norm))]
        return next((text for text in found if text), None)

    def _look(self, name: str, value: float) -> str | None:
        if not math.isfinite(value):
            return f"the {name} is {value}"
        last = self._last[name]
        text = None
        if self.z and len(last) >= FEWEST:
            mean = math.fsum(last) / len(last)
            spread = math.sqrt(math.fsum((x - mean) ** 2 for x in last) / len(last))
            highest = mean + self.z * max(spread, 1e-3 * abs(mean))
            if value > highest:
                text = f"the {name} is {value:.4g}, of late {mean:.4g} ± {spread:.2g}"
                value = highest
        last.append(value)
        return text

    def state(self) -> dict[str, list[float]]:
        """The values that it compares with, for a checkpoint; JSON gives every bit back."""
        return {name: list(values) for name, values in self._last.items()}

    def restore(self, state: dict[str, Any]) -> None:
        for name, values in self._last.items():
            values.clear()
            values.extend(state.get(name, []))
