"""Saving while training goes on: one copy of the state, a thread that writes it, and which checkpoints are kept."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any

from fnlm import tree
from fnlm.checkpoint import layout
from fnlm.checkpoint.files import CheckpointError, failed, remove
from fnlm.checkpoint.host import HostMemory
from fnlm.checkpoint.layout import What
from fnlm.checkpoint.packing import Packed, pack
from fnlm.checkpoint.write import commit
from fnlm.types import NameMask, TrainState


class Saver:
    """Saves into one folder (a run's `checkpoints`), and removes older checkpoints once newer ones are committed.

    Kept are the `keep` that were committed last, each whose step is a multiple of `keep_every`, the one that `best`
    names, and those of parameters alone. `background`: `save` returns when the state is copied to the host's memory,
    which holds one copy for as long as the Saver lives; a thread writes it, and an error there is raised by the next
    call. As a context manager it waits at the end. Not for several threads or processes at once.
    """

    def __init__(
        self,
        folder: str | Path,
        keep: int = 3,
        keep_every: int | None = None,
        background: bool = True,
        link: bool = True,
    ) -> None:
        if keep < 1:
            raise CheckpointError(
                f"keep={keep} would keep no checkpoint; choose at least 1, better 2: one to fall back on"
            )
        if keep_every is not None and keep_every < 1:
            raise CheckpointError(f"keep_every={keep_every} is not a number of steps; choose at least 1, or None")
        self.folder, self.keep, self.keep_every, self.link = Path(folder), keep, keep_every, link
        self._thread = ThreadPoolExecutor(1, "checkpoint") if background else None
        self._pending: list[Future[None]] = []
        self._host = HostMemory()

    def save(
        self,
        state: TrainState,
        *,
        config: dict[str, Any],
        tokenizer: Path | None = None,
        extra: dict[str, Any] | None = None,
        what: What = "all",
        frozen: NameMask | None = None,
    ) -> Path:
        """Save as `fnlm.checkpoint.save` does and return the path; in the background it is there only after `wait`.

        The state may be donated as soon as this returns. Waits for the save before, where that is still being written.
        """
        self.wait()
        if self._thread is not None:
            state = self._copied(state, what, frozen)
        packed = pack(state, config, tokenizer, extra, what, frozen)
        self._do(lambda: self._write(packed))
        return self.folder / layout.name_of(packed.step, what)

    def mark_best(self, path: str | Path) -> None:
        """Let `best` name a checkpoint of this folder, after those being saved are written."""
        self._do(lambda: layout.mark_best(path))

    def wait(self) -> None:
        """Until all is on the disk; raises what went wrong while writing."""
        errors = [future.exception() for future in self._pending]
        self._pending = []  # only now: whoever interrupts the waiting must not get at the memory being written
        for error in errors:
            if error is not None:
                raise error

    def __enter__(self) -> Saver:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._thread is not None:
            self._thread.shutdown(wait=True)
        self.wait()

    def _do(self, job: Callable[[], None]) -> None:
        if self._thread is None:
            job()
        else:
            self._pending.append(self._thread.submit(job))

    def _write(self, packed: Packed) -> None:
        commit(self.folder, packed, self.link)
        prune(self.folder, self.keep, self.keep_every)

    def _copied(self, state: TrainState, what: What, frozen: NameMask | None) -> TrainState:
        """The state in the host's memory; what is frozen there needs no copy."""
        like = state if what == "all" else state._replace(opt_state=None)
        flat = tree.flatten(like)
        names = {f"params/{k}" for k, p in state.params.items() if frozen and frozen(k) and p.device.type == "cpu"}
        host = self._host.copied({path: x for path, x in flat.items() if path not in names})
        copied: TrainState = tree.unflatten({path: host.get(path, x) for path, x in flat.items()}, like)
        return copied


def prune(folder: Path, keep: int, keep_every: int | None = None) -> None:
    """Remove the committed whole checkpoints that no rule of `Saver` keeps. SaveFailed where the disk refuses."""
    whole = [found for found in layout.committed(folder) if found.what == "all"]
    best = layout.best(folder)
    try:
        for found in whole[keep:]:
            if found.path != best and not (keep_every and found.step % keep_every == 0):
                remove(found.path, layout.COMMITTED)
    except OSError as error:
        raise failed(folder, error) from error
