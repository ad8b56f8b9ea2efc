"""SIGINT and SIGTERM while a run is going: the first asks, the second quits."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any

ASKING = (signal.SIGINT, signal.SIGTERM)


class Stop:
    """`with Stop() as stop:` notes the first SIGINT or SIGTERM in `stop.signal`; the second ends the process at once.

    `stop()` says whether one came; `then` is said of what happens first. Only the main thread can catch signals; in
    another one nothing is caught.
    """

    def __init__(self, say: Callable[[str], None] = lambda line: None, then: str = "saving after this step") -> None:
        self.signal: int | None = None
        self._say, self._then, self._before = say, then, dict[int, Any]()

    def __call__(self) -> bool:
        return self.signal is not None

    def __enter__(self) -> Stop:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._caught) for number in ASKING}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _caught(self, number: int, frame: FrameType | None) -> None:
        if self.signal is not None:
            sys.stderr.flush()
            os._exit(128 + number)  # checkpoints are whole or not there at all
        self.signal = number
        self._say(f"{signal.Signals(number).name}: {self._then}; once more quits at once")
