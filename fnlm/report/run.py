"""A run's folder as it is found: whole or torn, finished or going on; what is missing or broken is left out."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fnlm.budget import counts
from fnlm.checkpoint.read import model_config
from fnlm.config import did_you_mean

Floats = NDArray[np.float64]
Row = dict[str, Any]

GREATEST = 1e150
RUNNING_S = 300  # a run that wrote this lately is going on


class RunError(ValueError):
    """A folder that is no run; the message is one line with the remedy."""

    exit_code = 4


class Series(NamedTuple):
    """Steps (n,), strictly increasing, and values (n,); NaN where there is none, or it is not finite."""

    steps: Floats
    values: Floats


class Sample(NamedTuple):
    """What the model wrote at a step; `name` is the file's."""

    name: str
    text: str


class Run(NamedTuple):
    """What a run's folder holds; `unreadable` counts the whole lines of metrics.jsonl that are no JSON objects."""

    name: str
    folder: Path
    config: Row
    environment: Row
    rows: list[Row]
    samples: list[Sample]
    unreadable: int = 0

    @property
    def events(self) -> list[Row]:
        """The rows that tell of something that happened."""
        return [row for row in self.rows if row.get("event")]

    def series(self, key: str) -> Series:
        """A metric over steps. Of steps that were done again after a resume the last values count."""
        points: list[tuple[float, float]] = []
        for row in self.rows:
            step = number(row.get("step"))
            if key in row and math.isfinite(step):
                while points and points[-1][0] >= step:
                    points.pop()
                points.append((step, number(row[key])))
        steps, values = np.array(points, np.float64).reshape(-1, 2).T
        return Series(steps, np.where(np.isfinite(values), values, np.nan))

    def keys(self, prefix: str) -> list[str]:
        """The metrics that begin with `prefix`, in the order in which they were first seen."""
        return list(dict.fromkeys(key for row in self.rows for key in row if key.startswith(prefix)))


def read_runs(folders: list[Path]) -> list[Run]:
    """The runs in this order, each with a name of its own. Raises RunError for a folder that is none."""
    folders = [Path(folder) for folder in folders]
    last = [folder.resolve().name for folder in folders]
    names = [str(f) if last.count(name) > 1 else name for f, name in zip(folders, last, strict=True)]
    return [read_run(folder, name) for folder, name in zip(folders, names, strict=True)]


def read_run(folder: Path, name: str) -> Run:
    """One run. Raises RunError where there is neither a metrics.jsonl nor a config.json."""
    if not any((folder / file).is_file() for file in ("metrics.jsonl", "config.json")):
        if folder.is_dir():
            raise RunError(f"{folder} is no run: it has no metrics.jsonl; name a folder such as runs/demo")
        near = [p.name for p in folder.parent.iterdir() if p.is_dir()] if folder.parent.is_dir() else []
        raise RunError(f"there is no {folder}{did_you_mean(folder.name, near) if near else ''}")
    *lines, torn = _text(folder / "metrics.jsonl").split("\n")
    lines = [line for line in lines if line.strip()]
    rows = [row for line in (*lines, torn) if (row := _object(line))]
    config, environment = (_object(_text(folder / f"{file}.json")) for file in ("config", "environment"))
    unreadable = sum(not _object(line) for line in lines)
    return Run(name, folder, config, environment, rows, list(_samples(folder / "samples")), unreadable)


def _text(file: Path) -> str:
    return file.read_bytes().decode("utf-8", "replace") if file.is_file() else ""


def _object(text: str) -> Row:
    try:
        found = json.loads(text) if text.strip() else {}
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _samples(folder: Path) -> Iterator[Sample]:
    files = sorted(folder.glob("*.txt")) if folder.is_dir() else []
    yield from (Sample(file.stem, _text(file)) for file in sorted(files, key=lambda f: (len(f.stem), f.stem)))


def number(value: Any) -> float:
    """A JSON value as a number; NaN for what is none or is too great for any axis, 0 for what is too small for one."""
    if not isinstance(value, (int, float)) or not abs(value) <= GREATEST:
        return math.nan
    return float(value) if abs(value) >= 1 / GREATEST else 0.0


class Facts(NamedTuple):
    """What a table says of a run; None where it is not known. `seconds` leaves out the time between two sittings."""

    state: str
    step: float | None
    steps: float | None
    train_loss: float | None
    val_loss: float | None
    best_loss: float | None
    best_step: float | None
    tokens: float | None
    seconds: float | None
    tokens_per_second: float | None
    parameters: int | None


def facts(run: Run, now: float) -> Facts:
    """The figures of a run at the time `now` (unix seconds)."""
    val, train = _finite(run.series("val/loss")), _finite(run.series("train/loss"))
    best = int(val.values.argmin()) if len(val.values) else None
    speed, tokens = _finite(run.series("perf/tok_per_sec")).values, _finite(run.series("tokens")).values
    reached = [s for row in run.rows if math.isfinite(s := number(row.get("step")))]
    return Facts(
        state_of(run, now),
        reached[-1] if reached else None,
        planned_steps(run),
        _last(train.values),
        _last(val.values),
        None if best is None else float(val.values[best]),
        None if best is None else float(val.steps[best]),
        _last(tokens),
        seconds_of(run),
        median(speed.tolist()) if len(speed) else None,
        parameters_of(run),
    )


def _finite(series: Series) -> Series:
    kept = np.isfinite(series.values)
    return Series(series.steps[kept], series.values[kept])


def _last(values: Floats) -> float | None:
    return float(values[-1]) if len(values) else None


def planned_steps(run: Run) -> float | None:
    """The steps that the run was to take."""
    train = run.config.get("train")
    steps = number(train.get("steps")) if isinstance(train, dict) else math.nan
    return steps if math.isfinite(steps) else None


def state_of(run: Run, now: float) -> str:
    """In a word or two: finished, stopped, running, not finished, not begun."""
    if not run.rows:
        return "not begun"
    reached, steps, last = number(run.rows[-1].get("step")), planned_steps(run), run.rows[-1]
    ended = next((str(row["event"]) for row in reversed(run.events) if row["event"] in ("stopped", "finished")), None)
    if (steps is not None and reached >= steps) or (ended == "finished" and last.get("event") == ended):
        return "finished"
    if ended == "stopped" and last.get("event") == ended:
        return "stopped"
    return "running" if abs(now - number(last.get("time"))) < RUNNING_S else "not finished"


def seconds_of(run: Run) -> float | None:
    """The time between rows, without what passed before a resume."""
    times = [(number(row.get("time")), row.get("event")) for row in run.rows]
    gone = [b - a for (a, _), (b, event) in pairwise(times) if event != "resumed" and b >= a]
    return sum(gone) if gone else None


def parameters_of(run: Run) -> int | None:
    """The parameters of the model, or None where config.json has none that this version knows."""
    try:
        return counts(model_config(run.config["model"])).total
    except (KeyError, TypeError, ValueError):
        return None
