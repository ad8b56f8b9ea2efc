"""A run's folder: its config.json, what it may be resumed from, and the settings it was made with."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from fnlm import checkpoint
from fnlm.checkpoint import CheckpointError
from fnlm.config import did_you_mean
from fnlm.loop.settings import KINDS, Settings

CONFIG, METRICS, ENVIRONMENT, CHECKPOINTS, SAMPLES = (
    "config.json",
    "metrics.jsonl",
    "environment.json",
    "checkpoints",
    "samples",
)


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


def resumable(folder: Path) -> Path | None:
    """The newest good checkpoint of a run's folder with the whole state, or None."""
    return checkpoint.newest_good(folder / CHECKPOINTS)


def write(folder: Path, config: dict[str, Any], environment: dict[str, Any]) -> None:
    """config.json and environment.json, each whole or not at all."""
    for name, content in ((CONFIG, config), (ENVIRONMENT, environment)):
        beside = folder / f".{name}.tmp"
        beside.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        beside.replace(folder / name)


def claim(folder: Path, force: bool) -> None:
    """Make the folder of a new run. Raises ValueError where a run has left a checkpoint there.

    What a run that never saved has left is removed.
    """
    if checkpoint.is_any(folder / CHECKPOINTS) and not force:
        raise ValueError(
            f"{folder} holds a run; continue it with --resume, choose another --out, or replace it: --force"
        )
    for name in (CHECKPOINTS, SAMPLES, "tensorboard"):
        shutil.rmtree(folder / name, ignore_errors=True)
    for name in (CONFIG, METRICS, ENVIRONMENT, "tracker-id"):
        (folder / name).unlink(missing_ok=True)
    (folder / SAMPLES).mkdir(parents=True, exist_ok=True)
    (folder / CHECKPOINTS).mkdir(exist_ok=True)
