"""A lock file that the system lets go of when its process dies, however it dies."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO


class Busy(ValueError):
    """Another process holds the lock; the message is one line with the remedy."""

    exit_code = 1


@contextmanager
def held(lock: Path, otherwise: str) -> Iterator[None]:
    """The file `lock`, made for this process alone and removed after it. Raises Busy(otherwise) while another holds it.

    Where there are no such locks (Windows, some file systems) nothing is held.
    """
    try:
        import fcntl
    except ImportError:
        yield
        return
    with lock.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise Busy(otherwise) from error
        except OSError:  # a file system without locks
            pass
        if not _is_at(file, lock):  # another one removed it between opening and locking: a third may have a new one
            raise Busy(otherwise)
        try:
            yield
        finally:
            lock.unlink(missing_ok=True)


def _is_at(file: IO[str], place: Path) -> bool:
    """Whether an open file is still the one that lies there."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), place.stat())
    except OSError:
        return False
