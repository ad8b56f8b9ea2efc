"""The checkpoints of a run as models of their own: NAME@STEP, and NAME@newest for whichever was committed last."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path

from fnlm.checkpoint import layout

NEWEST = "newest"


def folder_of(path: Path) -> Path:
    """The folder with a run's checkpoints, or of checkpoints itself."""
    return path / "checkpoints" if (path / "checkpoints").is_dir() else path


def saved(path: Path) -> dict[int, Path]:
    """The committed checkpoints of a run by step, the one committed last first; of two of one step the later."""
    found: dict[int, Path] = {}
    for checkpoint in layout.committed(folder_of(path)):
        found.setdefault(checkpoint.step, checkpoint.path)
    return found


def named(name: str, runs: Mapping[str, Path]) -> Path:
    """Where NAME@STEP, NAME@newest or NAME@best lies. KeyError for what is none, or is not there (any more)."""
    run, _, at = name.rpartition("@")
    if at == "best":
        return runs[run]  # a run by its name alone is its best
    if not (at == NEWEST or (at.isascii() and at.isdigit() and len(at) < 19)):
        raise KeyError(name)
    found = saved(runs[run])
    if at == NEWEST and found:
        return next(iter(found.values()))
    return found[int(at) if at != NEWEST else -1]


class Measured:
    """What runs measured: a checkpoint is saved before it is evaluated, so its own loss is that of an earlier step."""

    def __init__(self) -> None:
        self._known: dict[Path, tuple[tuple[int, int], dict[int, float]]] = {}

    def loss(self, path: Path, step: int) -> float | None:
        """The validation loss at a step of the run, or of the run of a checkpoint; None where there is none."""
        run = path.parent.parent if path.parent.name == "checkpoints" else path
        file = run / "metrics.jsonl"
        try:
            if file.is_symlink():
                return None
            status = file.stat()
            now, known = (status.st_mtime_ns, status.st_size), self._known.get(file)
            if known is None or known[0] != now:
                known = self._known[file] = (now, dict(_losses(file)))
        except OSError:
            return None
        return known[1].get(step)


def _losses(file: Path) -> Iterator[tuple[int, float]]:
    """Steps and losses of the whole lines that have them; most have none and are not parsed."""
    with file.open("rb") as lines:
        for line in lines:
            if b'"val/loss"' not in line or not line.endswith(b"\n"):
                continue
            try:
                row = json.loads(line)
                step, loss = row["step"], row["val/loss"]
            except (ValueError, RecursionError, KeyError, TypeError):
                continue
            if isinstance(step, int) and isinstance(loss, float) and math.isfinite(loss):
                yield step, loss
