"""The ranks of one attempt meet, whatever those of the attempt before have left in the store."""

from __future__ import annotations

import threading

import pytest

from fnlm.sharding.meeting import meet
from tests.sharding.words import Words


def met(store: Words, order: list[int], timeout: float = 10.0) -> list[str]:
    """What each rank took the name to be, started in this order with a pause between."""
    names: dict[int, str] = {}

    def go(rank: int) -> None:
        names[rank] = meet(store, rank, len(order), timeout)

    threads = [threading.Thread(target=go, args=(rank,), daemon=True) for rank in order]
    for thread in threads:
        thread.start()
        thread.join(0.1)
    for thread in threads:
        thread.join(timeout)
    return [names[rank] for rank in range(len(order))]


@pytest.mark.parametrize("order", [[0, 1, 2], [2, 1, 0], [1, 0, 2]])
def test_all_agree_in_any_order_and_never_on_the_name_before(order: list[int]) -> None:
    store = Words()
    first, second = met(store, order), met(store, order)
    assert len(set(first)) == len(set(second)) == 1
    assert first[0] != second[0]


def test_one_who_comes_before_rank_0_does_not_take_an_older_attempts_name() -> None:
    """Rank 1 of the attempt before was met; rank 1 of this one finds its word, which is not its own."""
    store = Words()
    (old, _) = met(store, [0, 1])
    with pytest.raises(RuntimeError, match="Timed out waiting for rank 0"):
        meet(store, 1, 2, timeout=0.1)
    assert store.held["name"] == old


def test_rank_0_names_who_is_missing() -> None:
    with pytest.raises(RuntimeError, match="Timed out waiting for rank 1 to come"):
        meet(Words(), 0, 2, timeout=0.05)
