"""A file of JSON lines that grows: each line is read once, and all anew where it was cut back or replaced."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any, BinaryIO

LAST = 256  # bytes before the place reached, by which the file is known again


class Tail:
    """`rows` has the whole lines that are JSON objects; `unreadable` counts the others. A torn last line waits.

    `version` grows whenever `rows` changes. Not for several threads at once.
    """

    def __init__(self, file: Path):
        self.file, self.version = file, time.time_ns()  # not that of another that was let go of
        self._forget(None)

    def _forget(self, identity: tuple[int, int] | None) -> None:
        self.rows: list[dict[str, Any]] = []
        self.unreadable, self._end, self._last, self._identity = 0, 0, b"", identity
        self.version += 1

    def read(self) -> int:
        """Take in what is new; the version. A file that is not there (any more) has no rows."""
        try:
            with self.file.open("rb") as file:
                self._go_on(file)
        except OSError:
            if self._identity is not None:
                self._forget(None)
        return self.version

    def _go_on(self, file: BinaryIO) -> None:
        status = os.fstat(file.fileno())
        identity = (status.st_dev, status.st_ino)
        file.seek(max(0, self._end - len(self._last)))
        # A file cut back to an earlier step is a new one, which may have got the number of the old one.
        if identity != self._identity or file.read(len(self._last)) != self._last:
            self._forget(identity)
        file.seek(self._end)
        before = self._end
        for line in file:
            if not line.endswith(b"\n"):
                break
            self._end += len(line)
            self._last = (self._last + line)[-LAST:]
            self._take(line)
        self.version += self._end > before

    def _take(self, line: bytes) -> None:
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        if isinstance(row, dict):
            self.rows.append(row)
        elif line.strip():
            self.unreadable += 1
