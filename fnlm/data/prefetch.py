"""Batches made ahead of their use, in a thread."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Generator, Iterable
from itertools import count
from typing import NamedTuple, TypeVar

T = TypeVar("T")


class _Item(NamedTuple):
    """What the thread hands over: a value, an error, or neither at the end."""

    value: tuple[object, ...] = ()
    error: BaseException | None = None


def prefetch(
    make: Callable[[int], T], start: int = 0, stop: int | None = None, depth: int = 2
) -> Generator[T, None, None]:
    """`make(start)`, `make(start + 1)`, ... up to `stop` (None: for ever), up to `depth` of them made ahead.

    An error of `make` is raised where its result would have come. Closing the iterator, or losing it, ends the thread.
    """
    if depth < 1:
        raise ValueError(f"depth={depth} must be at least 1")
    ready: queue.Queue[_Item] = queue.Queue(depth)
    closed = threading.Event()
    steps = count(start) if stop is None else range(start, stop)
    thread = threading.Thread(target=_fill, args=(make, steps, ready, closed), name="prefetch", daemon=True)
    return _take(thread, ready, closed)


def _take(thread: threading.Thread, ready: queue.Queue[_Item], closed: threading.Event) -> Generator[T, None, None]:
    thread.start()
    try:
        while True:
            item = ready.get()
            if item.error is not None:
                raise item.error
            if not item.value:
                return
            yield item.value[0]  # type: ignore[misc]
    finally:
        closed.set()
        thread.join()


def _fill(make: Callable[[int], T], steps: Iterable[int], ready: queue.Queue[_Item], closed: threading.Event) -> None:
    for step in steps:
        try:
            item = _Item((make(step),))
        except BaseException as error:  # noqa: BLE001 - it is raised where the batch is wanted
            item = _Item(error=error)
        _put(item, ready, closed)
        if closed.is_set() or item.error is not None:
            return
    _put(_Item(), ready, closed)


def _put(item: _Item, ready: queue.Queue[_Item], closed: threading.Event) -> None:
    """Wait for room, unless nobody takes any more."""
    while not closed.is_set():
        try:
            return ready.put(item, timeout=0.05)
        except queue.Full:
            continue
