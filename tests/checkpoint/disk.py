"""A disk that fails on demand: every call that changes a file system is counted, and one of them goes wrong."""

from __future__ import annotations

import errno
import os
import shutil
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pytest

CALLS = ("open", "write", "fsync", "mkdir", "rename", "replace", "link", "unlink", "rmdir")
NEEDS_SPACE = ("open", "write", "fsync", "mkdir", "link")
Fault = Literal["kill before", "kill amid", "full", "broken", "power", "power, names lost"]
FAULTS: tuple[Fault, ...] = ("kill before", "kill amid", "full", "broken", "power", "power, names lost")
Undo = Callable[[Path], Any]
"""Takes the folder whose entry was changed, wherever it lies by now."""


class Killed(BaseException):
    """The process is dead: nothing that it would still do to the disk happens."""


class Disk:
    """Counts the calls of `os` that write; number `at` fails. `root` is a folder that holds all that is written.

    "kill before": the process dies before it; "kill amid": a write gets half way, another call is done, then it dies;
    "full": from here on nothing that takes space succeeds; "broken": this one call fails; "power": it dies, and files
    that were written and not fsynced lose half; "power, names lost": so do folders that were not fsynced their changes.
    """

    def __init__(self, patch: pytest.MonkeyPatch, root: Path, at: int | None = None, fault: Fault = "kill before"):
        self.root, self.at, self.fault = root, at, fault
        self.count, self.dead, self.failed = 0, False, ""
        self.attic = root / "attic"  # what was unlinked, in case that did not reach the disk
        self.attic.mkdir()
        self.unsynced: set[int] = set()
        self.undo: list[tuple[int, Undo]] = []
        self.patch, self.real = patch, {name: getattr(os, name) for name in CALLS}
        for name in CALLS:
            patch.setattr(os, name, self._patched(name))

    def repair(self) -> None:
        """All calls work again."""
        for name in CALLS:
            self.patch.setattr(os, name, self.real[name])

    def _patched(self, name: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if name == "open" and not args[1] & os.O_CREAT:
                return self.real[name](*args, **kwargs)
            if self.dead:
                raise Killed
            here, self.count = self.count, self.count + 1
            if here == self.at or (self.fault == "full" and self.at is not None and here > self.at):
                self._fail(name, args)
            return self._do(name, args)

        return call

    def _fail(self, name: str, args: tuple[Any, ...]) -> None:
        self.failed = self.failed or name
        half = (args[0], args[1][: len(args[1]) // 2]) if name == "write" else args
        if self.fault in ("full", "broken"):
            if self.fault == "full" and name not in NEEDS_SPACE:
                return
            if name == "write":
                self._do(name, half)
            code = errno.ENOSPC if self.fault == "full" else errno.EIO
            raise OSError(code, os.strerror(code))
        if self.fault == "kill amid":
            self._do(name, half)
        if self.fault.startswith("power"):
            self.lose_power()
        self.dead = True
        raise Killed

    def _do(self, name: str, args: tuple[Any, ...]) -> Any:
        undo = self._undo_of(name, args)
        node = os.stat(args[0]).st_ino if name == "rmdir" else 0
        result = None if name == "fsync" else self.real[name](*args)
        if undo is not None:
            target = Path(args[1] if name in ("rename", "replace", "link") else args[0])
            self.undo.append((target.parent.stat().st_ino, undo))
        if name == "write":
            self.unsynced.add(os.fstat(args[0]).st_ino)
        if name == "fsync":
            self._synced(os.fstat(args[0]))
        self.undo = [(folder, fn) for folder, fn in self.undo if folder != node]
        return result

    def _synced(self, node: os.stat_result) -> None:
        self.unsynced.discard(node.st_ino)
        if stat.S_ISDIR(node.st_mode):
            self.undo = [(folder, fn) for folder, fn in self.undo if folder != node.st_ino]

    def _undo_of(self, name: str, args: tuple[Any, ...]) -> Undo | None:
        if name in ("write", "fsync") or (name == "open" and os.path.exists(args[0])):
            return None
        was = Path(args[0]).name
        if name in ("rename", "replace"):
            now = Path(args[1])
            spare = self._spare(now) if now.is_file() else None
            return lambda at: [os.rename(at / now.name, at / was), spare and os.link(spare, at / now.name)]
        if name == "unlink":
            spare = self._spare(Path(args[0]))
            return lambda at: os.link(spare, at / was)
        made = Path(args[-1] if name == "link" else args[0]).name
        return {
            "open": lambda at: os.unlink(at / made),
            "link": lambda at: os.unlink(at / made),
            "mkdir": lambda at: shutil.rmtree(at / made),
            "rmdir": lambda at: os.mkdir(at / made),
        }[name]

    def _spare(self, path: Path) -> Path:
        spare = self.attic / f"{self.count}"
        self.real["link"](path, spare)
        return spare

    def lose_power(self) -> None:
        """What did not reach the disk is gone; all calls work again."""
        self.repair()
        for inode, fn in reversed(self.undo if self.fault == "power, names lost" else []):
            for folder in [p for p in (self.root, *self.root.rglob("*")) if p.is_dir() and p.stat().st_ino == inode]:
                fn(folder)
        for path in self.root.rglob("*"):
            if path.is_file() and path.stat().st_ino in self.unsynced:
                os.truncate(path, path.stat().st_size // 2)
