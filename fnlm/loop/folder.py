"""A run's folder: its config.json, what it may be resumed from, and the settings it was made with."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from fnlm import checkpoint
from fnlm.checkpoint import CheckpointError
from fnlm.config import did_you_mean
from fnlm.held import held as lock_of
from fnlm.loop.settings import KINDS, Settings

CONFIG, METRICS, ENVIRONMENT, CHECKPOINTS, SAMPLES = (
    "config.json",
    "metrics.jsonl",
    "environment.json",
    "checkpoints",
    "samples",
)

MADE = (CONFIG, METRICS, ENVIRONMENT, CHECKPOINTS, SAMPLES, "tensorboard", "tracker-id")
LOCK = ".lock"


def described(settings: Settings, **more: Any) -> dict[str, Any]:
    """config.json: the four records by their kind, and what else there is to say."""
    records: tuple[Any, ...] = settings
    return {**{kind: asdict(record) for kind, record in zip(KINDS, records, strict=True)}, **more}


def settings_of(config: dict[str, Any], where: Path) -> Settings:
    """The records of a config.json. Raises CheckpointError for a field that this version does not have."""
    found = []
    for kind, record in KINDS.items():
        known, values = {f.name: f for f in fields(record)}, config.get(kind, {})
        for name in values:
            if name not in known:
                raise CheckpointError(f"{where}: {kind} has no field {name!r}{did_you_mean(name, list(known))}")
        try:
            found.append(record(**{name: _tuples(value) for name, value in values.items()}))
        except (TypeError, ValueError) as error:
            raise CheckpointError(f"{where}: {error}") from error
    model, train, run, compute = found
    return model, train, run, compute


def _tuples(value: Any) -> Any:
    return tuple(_tuples(x) for x in value) if isinstance(value, list) else value


def read_config(folder: Path) -> dict[str, Any]:
    """A run's or a checkpoint's config.json. Raises CheckpointError where there is none."""
    file = folder / CONFIG
    if not file.is_file():
        raise CheckpointError(f"{folder} is no run: it has no {CONFIG}")
    try:
        config: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{file} is not JSON: {error}") from error
    return config


def resumable(folder: Path, read: bool = True) -> Path | None:
    """The newest good checkpoint of a run's folder with the whole state, or None; unless `read`, by sizes alone."""
    return checkpoint.newest_good(folder / CHECKPOINTS, share=(0, 1) if read else (0, 0))


def write(folder: Path, config: dict[str, Any], environment: dict[str, Any]) -> None:
    """config.json and environment.json, each whole or not at all."""
    for name, content in ((CONFIG, config), (ENVIRONMENT, environment)):
        beside = folder / f".{name}.tmp"
        beside.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        beside.replace(folder / name)


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """The folder, made where there is none, for this process alone. Raises Busy while another one trains in it."""
    folder.mkdir(parents=True, exist_ok=True)
    with lock_of(folder / LOCK, f"another process trains in {folder}; let it end, or choose another --out"):
        yield


def _foreign(folder: Path) -> str | None:
    """What lies where a run would put its own, in a folder that no run has made."""
    if checkpoint.is_any(folder / CHECKPOINTS):
        return None
    try:
        if set(KINDS) <= read_config(folder).keys():
            return None
    except CheckpointError:
        pass
    for path in (folder / name for name in MADE):
        if path.is_file() or (path.is_dir() and any(path.iterdir())):
            return path.name
    return None


def claim(folder: Path, force: bool) -> None:
    """Make the folder of a new run. Raises ValueError where a run has left a checkpoint there, or something else is.

    What a run that never saved has left is removed; with `force` also what one has saved, but nothing that is no run's.
    """
    if found := _foreign(folder):
        raise ValueError(f"{folder} holds {found!r}, which no run of fnlm has written; choose another --out")
    if checkpoint.is_any(folder / CHECKPOINTS) and not force:
        raise ValueError(
            f"{folder} holds a run; continue it with --resume, choose another --out, or replace it: --force"
        )
    for path in (folder / name for name in MADE):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
    (folder / SAMPLES).mkdir(parents=True, exist_ok=True)
    (folder / CHECKPOINTS).mkdir(exist_ok=True)
