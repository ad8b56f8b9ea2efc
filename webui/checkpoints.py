"""The checkpoints of a run as models of their own: NAME@STEP, and NAME@newest for whichever was committed last."""

from __future__ import annotations

from collections.abc import Mapping
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
    """Where NAME@STEP or NAME@newest lies. KeyError for what is neither, or is not there (any more)."""
    run, _, at = name.rpartition("@")
    if not (at == NEWEST or (at.isascii() and at.isdigit() and len(at) < 19)):
        raise KeyError(name)
    found = saved(runs[run])
    if at == NEWEST and found:
        return next(iter(found.values()))
    return found[int(at) if at != NEWEST else -1]
