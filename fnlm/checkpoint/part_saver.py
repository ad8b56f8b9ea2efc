"""Saving by several ranks while training goes on: each copies and writes what it owns, rank 0 commits."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import wait as wait_for
from pathlib import Path
from threading import Event
from types import TracebackType
from typing import Any, Protocol

from fnlm.checkpoint import layout
from fnlm.checkpoint.files import CheckpointError
from fnlm.checkpoint.host import HostMemory
from fnlm.checkpoint.layout import What
from fnlm.checkpoint.packing import Outline, flat, outline
from fnlm.checkpoint.parts import Owned, Part, begin, finish, part_of, size_of, write_part
from fnlm.checkpoint.saver import prune
from fnlm.checkpoint.write import temporary_of
from fnlm.types import TrainState

PATIENCE = 5.0  # seconds that rank 0 still waits for the others' parts where the run ends with an error


class Ranks(Protocol):
    """Those that save together."""

    rank: int
    world: int

    def agree(self, error: CheckpointError | None) -> None:
        """Every rank calls it. Raises on all where one has an error: its own, and on the others what it says."""


class PartSaver:
    """A `Saver` of several ranks; each makes one and calls it as the others do, with what it holds of the state.

    Nothing is gathered: a rank copies what `owned` says is its own, and a thread of its own writes it. What goes wrong
    there is raised on all ranks by the next call. `timeout`: seconds that rank 0 waits for a part.
    """

    def __init__(
        self, folder: str | Path, ranks: Ranks, owned: Owned, keep: int = 3, keep_every: int | None = None,
        timeout: float = 600.0,
    ) -> None:  # fmt: skip
        self.folder, self.ranks, self.owned, self.timeout = Path(folder), ranks, owned, timeout
        self.keep, self.keep_every = keep, keep_every
        self._thread, self._host, self._given_up = ThreadPoolExecutor(1, "checkpoint"), HostMemory(), Event()
        self._writing: Future[None] | None = None
        self._committing: list[Future[None]] = []
        self._open = False  # whether there is something to wait for, the same on all ranks

    def save(
        self,
        state: TrainState,
        *,
        config: dict[str, Any],
        tokenizer: Path | None = None,
        extra: dict[str, Any] | None = None,
        what: What = "all",
    ) -> Path:
        """As `Saver.save`, in the background; the state may be donated as soon as this returns."""
        self.wait()
        tensors, lead = flat(state, what), self.ranks.rank == 0
        temporary = temporary_of(self.folder / layout.name_of(int(state.step), what))
        head, wrong = None, None
        if lead:
            try:
                shapes = {path: self.owned[path][0] for path in tensors}
                head = outline(state, shapes, config, tokenizer, extra, what)
                begin(self.folder, head.step, what, size_of(tensors, self.owned))
            except CheckpointError as error:
                wrong = error
        self.ranks.agree(wrong)
        own = {path: t for path, t in tensors.items() if self.owned[path][1] is not None}
        part = part_of(self._host.copied(own), self.owned, self.ranks.rank, self.ranks.world)
        self._begin(temporary, part, head)
        return self.folder / layout.name_of(int(state.step), what)

    def _begin(self, temporary: Path, part: Part, head: Outline | None) -> None:
        self._given_up = given_up = Event()
        self._writing = self._thread.submit(write_part, temporary, part)
        self._open = True

        def commit(head: Outline) -> None:
            finish(temporary, head, self.ranks.world, given_up, self.timeout)
            prune(self.folder, self.keep, self.keep_every)

        if head is not None:
            self._committing.append(self._thread.submit(commit, head))

    def mark_best(self, path: str | Path) -> None:
        """As `Saver.mark_best`."""
        self._open = True
        if self.ranks.rank == 0:
            self._committing.append(self._thread.submit(layout.mark_best, path))

    def wait(self) -> None:
        """Until all ranks have all on the disk; raises, on all, what went wrong on one. Every rank calls it."""
        if not self._open:
            return
        self._open = False
        wrote, self._writing = self._writing, None
        try:
            self.ranks.agree(_failure(wrote))
        except CheckpointError:
            self._given_up.set()
            self._committed()
            raise
        self.ranks.agree(self._committed())

    def _committed(self) -> CheckpointError | None:
        done = [_failure(future) for future in self._committing]
        self._committing = []
        return next((error for error in done if error is not None), None)

    def __enter__(self) -> PartSaver:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if error is None:
            self.wait()
        elif self._committing:
            # the others may have ended: no more words with them, but a save that they still finish counts
            wait_for(self._committing, timeout=PATIENCE)
            self._given_up.set()
        self._thread.shutdown(wait=True)


def _failure(future: Future[None] | None) -> CheckpointError | None:
    """What went wrong, once it is done; an error of another kind is raised."""
    error = future.exception() if future is not None else None
    if error is not None and not isinstance(error, CheckpointError):
        raise error
    return error
