"""Whoever gives no signs of life is gone; whoever ends because of it is not blamed; a store that is gone is named."""

from __future__ import annotations

import time

import pytest

from fnlm.sharding import heartbeat
from fnlm.sharding.heartbeat import Heartbeat
from tests.sharding.words import Words


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
