"""Whoever gives no signs of life is gone; whoever ends because of it is not blamed; a store that is gone is named."""

from __future__ import annotations

import threading
import time

import pytest

from fnlm.sharding import heartbeat
from fnlm.sharding.heartbeat import Heartbeat


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


@pytest.fixture(autouse=True)
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heartbeat, "PERIOD", 0.01)
    monkeypatch.setattr(heartbeat, "LONG", 0.1)


def test_the_silent_one_is_gone_and_the_first_verdict_holds() -> None:
    store = Words()
    ranks = [Heartbeat(store, rank, 4) for rank in range(4)]
    time.sleep(0.05)
    ranks[2].stop()
    assert ranks[0].gone() == [2]
    ranks[0].stop()  # it ends because rank 2 has
    time.sleep(0.05)
    assert ranks[1].gone() == ranks[3].gone() == [2]
    for rank in ranks:
        rank.stop()


def test_one_that_never_came_is_gone_and_nobody_where_all_are_there() -> None:
    store = Words()
    ranks = [Heartbeat(store, rank, 3) for rank in (0, 1)]
    assert ranks[0].gone() == [2]
    store.held.pop("verdict")
    ranks.append(Heartbeat(store, 2, 3))
    time.sleep(0.05)
    assert ranks[1].gone() == []
    for rank in ranks:
        rank.stop()


def test_a_store_that_does_not_answer() -> None:
    store = Words()
    rank = Heartbeat(store, 1, 2)
    store.reachable.clear()
    began = time.monotonic()
    assert rank.gone() is None
    assert time.monotonic() - began < 2
    store.reachable.set()
    rank.stop()
