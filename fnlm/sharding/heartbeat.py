"""Who of the ranks is gone, once a collective has failed: all leave signs of life where they have met."""

from __future__ import annotations

import threading
import time

from fnlm.sharding.meeting import Store

PERIOD = 0.5  # seconds between two signs of life
LONG = 2.5  # seconds without one, after which a rank counts as gone


class Heartbeat:
    """A thread that leaves this rank's signs of life, until `stop`."""

    def __init__(self, store: Store, rank: int, world: int) -> None:
        self.store, self.rank, self.world = store, rank, world
        self._over = threading.Event()
        self._beating = threading.Thread(target=self._beat, daemon=True, name="heartbeat")
        self._beating.start()

    def stop(self) -> None:
        """No more signs of life. A store that does not answer is not waited for."""
        self._over.set()
        self._beating.join(PERIOD)

    def _beat(self) -> None:
        count = 0
        while not self._over.is_set():
            count += 1
            try:
                self.store.set(f"alive/{self.rank}", str(count))
            except RuntimeError:  # the store is gone, and with it whoever keeps it
                return
            self._over.wait(PERIOD)

    def gone(self) -> list[int] | None:
        """The ranks that give no signs of life any more; None: the store, which rank 0 or its machine keeps, does not.

        Whoever asks first has the last word: those that end because of it would seem to be gone themselves.
        """
        found: list[list[int]] = []
        asking = threading.Thread(target=lambda: found.append(self._asked()), daemon=True, name="who is gone")
        asking.start()
        asking.join(2 * LONG)
        return found[0] if found else None

    def _asked(self) -> list[int]:
        if self.store.check(["verdict"]):
            return self._verdict()
        before = self._counts()
        time.sleep(LONG)
        if self.store.check(["verdict"]):
            return self._verdict()
        after = self._counts()
        gone = [r for r in range(self.world) if r != self.rank and after[r] == before[r]]
        self.store.set("verdict", ",".join(map(str, gone)))
        return gone

    def _verdict(self) -> list[int]:
        return [int(word) for word in self.store.get("verdict").decode().split(",") if word]

    def _counts(self) -> list[bytes]:
        keys = [f"alive/{r}" for r in range(self.world)]
        return [self.store.get(key) if self.store.check([key]) else b"" for key in keys]
