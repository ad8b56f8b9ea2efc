"""Where the ranks of one attempt meet: under a name in the store that no attempt before it has used."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable
from functools import partial
from typing import Any, Protocol

PAUSE = 0.02  # seconds between two looks


class Store(Protocol):
    """Where ranks leave word, such as torch.distributed's TCPStore."""

    def set(self, key: str, value: str, /) -> Any: ...
    def get(self, key: str, /) -> bytes: ...
    def check(self, keys: list[str], /) -> bool: ...


def meet(store: Store, rank: int, world: int, timeout: float) -> str:
    """A name that all ranks now in the store agree on, once all are there.

    torchrun starts ranks again with the store of the attempt before (torch 2.13), words of ended ranks in it; gloo
    would take an ended rank's address for that of the new one, and wait for it. So rank 0 says a new name, each
    rank answers under it with a word of its own, and counts as met once rank 0 has repeated that word.

    Raises RuntimeError where one is missing after `timeout` seconds.
    """
    deadline = time.monotonic() + timeout
    if rank == 0:
        return _invite(store, world, deadline)
    word = uuid.uuid4().hex

    def accepted() -> str | None:
        name = _said(store, "name")
        if name is None:
            return None
        if _said(store, f"{name}/here/{rank}") != word:
            store.set(f"{name}/here/{rank}", word)
        return name if _said(store, f"{name}/met/{rank}") == word else None

    return _until(accepted, deadline, "rank 0")


def _invite(store: Store, world: int, deadline: float) -> str:
    """Rank 0's side: a new name, said to all, and each one's word repeated."""
    name = uuid.uuid4().hex
    store.set("name", name)
    for rank in range(1, world):
        word = _until(partial(_said, store, f"{name}/here/{rank}"), deadline, f"rank {rank}")
        store.set(f"{name}/met/{rank}", word)
    return name


def _said(store: Store, key: str) -> str | None:
    return store.get(key).decode() if store.check([key]) else None


def _until(found: Callable[[], str | None], deadline: float, who: str) -> str:
    """What `found` returns once it is not None."""
    while (value := found()) is None:
        if time.monotonic() > deadline:
            raise RuntimeError(f"Timed out waiting for {who} to come")
        time.sleep(PAUSE)
    return value
