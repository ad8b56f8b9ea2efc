"""wandb, trackio and tensorboard behind one interface; once started, none of them can stop or stall training."""

from __future__ import annotations

import contextlib
import importlib
import json
import logging
import os
import queue
import re
import secrets
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from fnlm.config import did_you_mean

PROJECT = "fnlm"
WAITING_ROWS = 4096
CLOSE_S = 10.0
MODULES = {"tensorboard": "torch.utils.tensorboard"}
_log = logging.getLogger(__name__)


class Tracker(Protocol):
    """What takes the rows of a run, each a dict with a `step`; tracker names are those of `TRACKERS`."""

    def log(self, row: Mapping[str, Any]) -> None: ...
    def close(self) -> None: ...


class Many:
    """Each row to each tracker, in order; all are closed, whichever fails."""

    def __init__(self, trackers: Sequence[Tracker]) -> None:
        self.trackers = tuple(trackers)

    def log(self, row: Mapping[str, Any]) -> None:
        for tracker in self.trackers:
            tracker.log(row)

    def close(self) -> None:
        with contextlib.ExitStack() as stack:
            for tracker in reversed(self.trackers):
                stack.callback(tracker.close)


def open_trackers(
    names: Sequence[str],
    folder: str | Path,
    config: Mapping[str, Any],
    *,
    step: int = 0,
    strict: bool = True,
    close_s: float = CLOSE_S,
) -> Many:
    """Start the named services for a run's folder; `step` is where it resumes. From then on their errors are one line.

    Raises ValueError for an unknown name, and for a service that is not installed or does not start; with
    `strict=False`, as fits a run that resumes unattended, such a one is left out and one line is logged.
    """
    _check_names(names)
    started: list[Tracker] = []
    for name in dict.fromkeys(names):
        try:
            started.append(Guarded(name, _start(name, Path(folder), config, step), close_s))
        except ValueError as error:
            if strict:
                Many(started).close()
                raise
            _log.warning("%s; the run goes on without it", error)
    return Many(started)


def require_trackers(names: Sequence[str]) -> None:
    """Raises the ValueError of `open_trackers` for what is unknown or not installed, before a folder is touched."""
    _check_names(names)
    for name in names:
        with contextlib.redirect_stdout(sys.stderr):  # stdout is for results
            _imported(name)


def _check_names(names: Sequence[str]) -> None:
    for name in names:
        if name not in TRACKERS:
            raise ValueError(f"there is no tracker {name!r}{did_you_mean(name, list(TRACKERS))}")


def _imported(name: str) -> Any:
    try:
        return importlib.import_module(MODULES.get(name, name))
    except Exception as error:  # a package that is broken raises anything
        raise ValueError(f"tracker {name!r} needs its package: pip install 'fnlm[{name}]' ({_line(error)})") from error


def _start(name: str, folder: Path, config: Mapping[str, Any], step: int) -> Tracker:
    with contextlib.redirect_stdout(sys.stderr):
        package = _imported(name)
        try:
            return TRACKERS[name](package, folder, config, step)
        except Exception as error:  # whatever a service raises, the user hears it in one line
            raise ValueError(f"tracker {name!r} does not start: {_line(error)}; mend it, or leave it out") from error


class Guarded:
    """A tracker that works in a thread of its own: what it raises is logged once, and what hangs is left behind."""

    def __init__(self, name: str, inner: Tracker, close_s: float = CLOSE_S) -> None:
        self.name, self._inner, self._close_s = name, inner, close_s
        self._rows: queue.Queue[Mapping[str, Any] | None] = queue.Queue(WAITING_ROWS)
        self._said = False
        self._thread = threading.Thread(target=self._work, name=f"tracker {name}", daemon=True)
        self._thread.start()

    def log(self, row: Mapping[str, Any]) -> None:
        try:
            self._rows.put_nowait(dict(row))
        except queue.Full:
            self._say("takes no more rows")

    def close(self) -> None:
        """Wait for what was logged to arrive, a limited time."""
        with contextlib.redirect_stdout(sys.stderr):
            with contextlib.suppress(queue.Full):
                self._rows.put(None, timeout=self._close_s)
            self._thread.join(self._close_s)
        if self._thread.is_alive():
            self._say(f"did not finish in {self._close_s:g} s and is left behind")

    def _work(self) -> None:
        while (row := self._rows.get()) is not None:
            self._attempt(self._inner.log, row)
        self._attempt(self._inner.close)

    def _attempt(self, do: Callable[..., None], *args: Any) -> None:
        try:
            do(*args)
        except BaseException as error:  # noqa: BLE001  (some leave with SystemExit; here that would end only the thread)
            self._say(f"failed: {_line(error)}")

    def _say(self, what: str) -> None:
        if not self._said:
            _log.warning("tracker %s %s; training goes on, metrics.jsonl has every row", self.name, what)
        self._said = True


def _line(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


class Wandb:
    """Weights & Biases. A run's folder keeps the id, so that a resumed run goes on there, and a new one begins anew."""

    def __init__(self, package: Any, folder: Path, config: Mapping[str, Any], step: int) -> None:
        self._run = package.init(
            project=PROJECT,
            name=folder.resolve().name,
            id=_id(folder),
            resume="allow",
            dir=str(folder),
            config=dict(config),
            settings={"console": "off"},  # it would copy every redraw of the bar
        )
        # The axis is our step, not a count of calls, which may not go back when a run resumes.
        self._run.define_metric("*", step_metric="step")

    def log(self, row: Mapping[str, Any]) -> None:
        self._run.log({k: v for k, v in row.items() if v is not None and k != "time"})

    def close(self) -> None:
        self._run.finish()


class Trackio:
    """trackio, wandb's interface on a local database; a run is known by its name there."""

    def __init__(self, package: Any, folder: Path, config: Mapping[str, Any], step: int) -> None:
        self._run = package.init(project=PROJECT, name=_id(folder), resume="allow", config=dict(config))

    def log(self, row: Mapping[str, Any]) -> None:
        self._run.log({k: v for k, v in row.items() if v is not None and k not in ("time", "step")}, step=row["step"])

    def close(self) -> None:
        self._run.finish()


class Tensorboard:
    """Event files in the run's `tensorboard/`; what lies beyond the step of a resume is hidden."""

    def __init__(self, package: Any, folder: Path, config: Mapping[str, Any], step: int) -> None:
        self._writer = package.SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1 if step else None)
        self._writer.add_text("config", f"```\n{json.dumps(config, indent=2, default=str)}\n```")

    def log(self, row: Mapping[str, Any]) -> None:
        step = row.get("step")
        for name, value in row.items():
            if name in ("step", "time") or value is None:
                continue
            if isinstance(value, str):
                self._writer.add_text(name, value, step)
            else:
                self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


def _id(folder: Path) -> str:
    """The run's id for services, made once and kept in `tracker-id`: it survives a move, not a new beginning."""
    path = folder / "tracker-id"
    if path.is_file() and (kept := path.read_text(encoding="utf-8").strip()):
        return kept
    name = re.sub(r"[^\w.-]+", "-", folder.resolve().name)[:40]
    made = f"{name}-{secrets.token_hex(4)}"
    beside = path.with_name(".tracker-id.tmp")
    beside.write_text(made + "\n", encoding="utf-8")
    os.replace(beside, path)
    return made


TRACKERS: dict[str, Callable[[Any, Path, Mapping[str, Any], int], Tracker]] = {
    "wandb": Wandb,
    "trackio": Trackio,
    "tensorboard": Tensorboard,
}
