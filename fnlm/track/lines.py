"""`metrics.jsonl`: one JSON object a line, appended whole, readable while it grows, cut back to a step on resume."""

from __future__ import annotations

import json
import logging
import math
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

_log = logging.getLogger(__name__)


class JsonLines:
    """A tracker that appends each row to a file at once, in strict JSON: what is not finite is null. Adds `time`.

    A row reaches the file whole or waits in memory: on a full disk it is tried again with the next one, training goes
    on, and one line is logged. Only complete lines count; a torn last one, of a process that died, is cut on opening.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._waiting, self._said = b"", False
        self._open()

    def _open(self) -> None:
        self._file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND | getattr(os, "O_BINARY", 0), 0o644)
        os.ftruncate(self._file, _length_of_whole_lines(self._file))

    def log(self, row: Mapping[str, Any]) -> None:
        line = json.dumps({"time": round(time.time(), 3)} | _plain(row), ensure_ascii=False, allow_nan=False)
        self._waiting += line.encode("utf-8", "replace") + b"\n"
        self._write()

    def _write(self) -> None:
        try:
            while self._waiting:
                self._waiting = self._waiting[os.write(self._file, self._waiting) :]
        except OSError as error:
            if not self._said:
                _log.warning("%s cannot be written: %s; training goes on, rows wait", self.path, error.strerror)
            self._said = True

    def cut(self, step: int) -> None:
        """Forget the rows of steps after `step`, as `truncate` does, and go on behind it."""
        os.close(self._file)
        self.truncate(self.path, step)
        self._open()

    def close(self) -> None:
        self._write()
        os.close(self._file)

    @staticmethod
    def read(path: str | Path) -> list[dict[str, Any]]:
        """The rows of a file, also of one that is being written or was torn: what is no complete row is left out."""
        return [row for _, row in _rows(Path(path))]

    @staticmethod
    def truncate(path: str | Path, step: int) -> None:
        """Rewrite the file, all at once, without a torn line and without rows of steps after `step`.

        A run that resumes at `step` then has one curve. Rows without a step stay; no file is fine.
        """
        path = Path(path)
        if not path.exists():
            return
        kept = b"".join(line for line, row in _rows(path) if not _after(row, step))
        if kept == path.read_bytes():
            return
        beside = path.with_name(f".{path.name}.tmp")
        with beside.open("wb") as file:
            file.write(kept)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)


def _length_of_whole_lines(file: int) -> int:
    """The bytes up to the last line break, found from the end."""
    end = os.lseek(file, 0, os.SEEK_END)
    while end > 0:
        start = max(0, end - 4096)
        os.lseek(file, start, os.SEEK_SET)
        at = os.read(file, end - start).rfind(b"\n")
        if at >= 0:
            return start + at + 1
        end = start
    return 0


def _rows(path: Path) -> Iterator[tuple[bytes, dict[str, Any]]]:
    with path.open("rb") as file:
        for line in file:
            if line.endswith(b"\n") and (row := _row(line)) is not None:
                yield line, row


def _row(line: bytes) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) else None


def _after(row: dict[str, Any], step: int) -> bool:
    at = row.get("step")
    return isinstance(at, int | float) and at > step


def _plain(value: Any) -> Any:
    """Made of what JSON has: scalars of torch and numpy as numbers, what is not finite as None, the rest as text."""
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, str | int):
        return value
    return _plain(value.item()) if hasattr(value, "item") and getattr(value, "ndim", 0) == 0 else str(value)
