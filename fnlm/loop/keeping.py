"""The checkpoints of one run: each step's once, what fails told and tried again, the best one marked."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from fnlm import tokenizers
from fnlm.checkpoint import CheckpointError, PartSaver, Saver
from fnlm.checkpoint.layout import What, name_of
from fnlm.loop.job import Job, averaged
from fnlm.loop.team import SubsetSaver
from fnlm.types import TrainState

FAILED_SAVES = 3  # in a row, that end a run; a disk may be full for a while
AnySaver = Saver | PartSaver | SubsetSaver


class Keeper:
    """Writes with a saver; `saved` is the last checkpoint of the run, `tell` is given what went wrong.

    A failure is raised as CheckpointError when the last save fails, and the third time in a row.
    """

    def __init__(self, job: Job, saver: AnySaver, tell: Callable[[str], None]) -> None:
        self.saver, self._job, self._tell, self._failed = saver, job, tell, 0
        own = job.resume is not None and job.resume.parent == saver.folder
        self.saved: Path | None = job.resume if own else None

    def save(self, state: TrainState, notes: dict[str, Any], last: bool = False) -> None:
        """Begin to write a checkpoint of this step, unless there is one; the last is there when this returns."""
        if self.saved == self.saver.folder / name_of(int(state.step), "all"):
            return
        # what went wrong in the background is told, and is no reason not to save now
        if self._attempt(state, self.saver.wait) and self.saved is not None:
            self._failed = 0

        def save() -> None:
            self.saved = self._write(state, notes, "all")
            if last:
                self.saver.wait()

        self._attempt(state, save, last)

    def snapshot(self, state: TrainState, notes: dict[str, Any]) -> None:
        """Write the parameters alone, their average where there is one."""
        self._attempt(state, lambda: self._write(state._replace(params=averaged(state)), notes, "params"))

    def mark_best(self) -> None:
        """The last one is the best so far."""
        if self.saved is not None:
            self.saver.mark_best(self.saved)

    def _write(self, state: TrainState, notes: dict[str, Any], what: What) -> Path:
        return self.saver.save(state, what=what, config=self._job.config, tokenizer=self._tokenizer, extra=notes)

    @property
    def _tokenizer(self) -> Path:
        """The data's; where their folder is gone by now, that of the last checkpoint: the tokens are still mapped."""
        own = self._job.dataset.folder / tokenizers.FILE
        return own if own.is_file() or self.saved is None else self.saved / tokenizers.FILE

    def _attempt(self, state: TrainState, write: Callable[[], object], last: bool = False) -> bool:
        """Whether writing went well."""
        try:
            write()
            return True
        except CheckpointError as error:
            self.saved, self._failed = None, self._failed + 1
            if last or self._failed >= FAILED_SAVES:
                raise
            self._tell(f"step {int(state.step)}: {error}; training goes on, the next save tries again")
            return False
