"""Batches made ahead of their use, in a thread."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable
from itertools import count
from typing import NamedTuple, TypeVar

T = TypeVar("T")


class _Item(NamedTuple):
    """What the thread hands over: a value, an error, or neither at the end."""

    value: tuple[object, ...] = ()
    error: BaseException | None = None


class _Shelf:
    """Items between the thread and the user. The thread fills it up, and is woken when half of it is empty.

    Woken for every item, it would take the user's core from it for a moment at every step.
    """

    def __init__(self, depth: int) -> None:
        self.depth, self.items, self.closed = depth, deque[_Item](), False
        lock = threading.Lock()
        self.filled, self.wanted = threading.Condition(lock), threading.Condition(lock)

    def put(self, item: _Item) -> None:
        """Leave an item; returns when there is room for another, or nobody takes any more."""
        with self.wanted:
            self.items.append(item)
            self.filled.notify()
            if len(self.items) >= self.depth:
                self.wanted.wait_for(lambda: self.closed or len(self.items) <= self.depth // 2)

    def take(self) -> _Item:
        with self.filled:
            self.filled.wait_for(lambda: self.items)
            item = self.items.popleft()
            if len(self.items) == self.depth // 2:
                self.wanted.notify()
        return item

    def close(self) -> None:
        with self.wanted:
            self.closed = True
            self.wanted.notify()


def prefetch(
    make: Callable[[int], T], start: int = 0, stop: int | None = None, depth: int = 2
) -> Generator[T, None, None]:
    """`make(start)`, `make(start + 1)`, ... up to `stop` (None: for ever), up to `depth` of them made ahead.

    An error of `make` is raised where its result would have come. Closing the iterator, or losing it, ends the thread.
    """
    if depth < 1:
        raise ValueError(f"depth={depth} must be at least 1")
    shelf = _Shelf(depth)
    steps = count(start) if stop is None else range(start, stop)
    thread = threading.Thread(target=_fill, args=(make, steps, shelf), name="prefetch", daemon=True)
    return _given(thread, shelf)


def _given(thread: threading.Thread, shelf: _Shelf) -> Generator[T, None, None]:
    thread.start()
    try:
        while True:
            item = shelf.take()
            if item.error is not None:
                raise item.error
            if not item.value:
                return
            yield item.value[0]  # type: ignore[misc]
    finally:
        shelf.close()
        thread.join()


def _fill(make: Callable[[int], T], steps: Iterable[int], shelf: _Shelf) -> None:
    for step in steps:
        try:
            item = _Item((make(step),))
        except BaseException as error:  # noqa: BLE001 - it is raised where the batch is wanted
            item = _Item(error=error)
        shelf.put(item)
        if shelf.closed or item.error is not None:
            return
    shelf.put(_Item())
