"""Where ranks leave word, in memory, for tests that start no processes."""

from __future__ import annotations

import threading


class Words:
    """A store in memory."""

    def __init__(self) -> None:
        self.held: dict[str, str] = {}
        self.reachable = threading.Event()
        self.reachable.set()

    def set(self, key: str, value: str) -> None:
        self.reachable.wait()
        self.held[key] = value

    def get(self, key: str) -> bytes:
        self.reachable.wait()
        return self.held[key].encode()

    def check(self, keys: list[str]) -> bool:
        self.reachable.wait()
        return all(key in self.held for key in keys)
