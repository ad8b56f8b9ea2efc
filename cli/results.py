"""What `fnlm eval` leaves behind: a file of figures, a line in the run's folder, and a word when it was interrupted."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import click
import torch

from fnlm import __version__

RESULTS = "evaluations.jsonl"  # in a run's folder, a line for each row
LONG = ("answers",)  # what a line there leaves out


def about() -> dict[str, Any]:
    """When, and by what."""
    now = datetime.now(timezone.utc).isoformat(timespec="seconds")
    return {"measured": now, "fnlm": __version__, "torch": torch.__version__}


def must_be_file(out: Path, name: str) -> None:
    """ValueError where --out is a folder, with the `name` that a file in it might have."""
    if out.is_dir():
        raise ValueError(f"--out {out} is a folder; name a file in it, such as {out / name}")


def write(out: Path, rows: Sequence[dict[str, Any]]) -> None:
    """The figures as JSON."""
    write_whole(out, json.dumps({**about(), "models": list(rows)}, indent=2) + "\n")


def write_whole(out: Path, text: str) -> None:
    """A file, whole or not at all."""
    out.parent.mkdir(parents=True, exist_ok=True)
    beside = out.with_name(f".{out.name}.{os.getpid()}")
    try:
        beside.write_text(text, encoding="utf-8")
        beside.replace(out)
    finally:
        beside.unlink(missing_ok=True)


def keep(checkpoint: Path, row: dict[str, Any]) -> None:
    """A row at the end of the run's file; a model that is in no run has none, and a folder that is read-only stays."""
    if checkpoint.parent.name != "checkpoints":
        return
    short = {name: value for name, value in row.items() if name not in LONG}
    line = json.dumps({**about(), **short}) + "\n"
    try:
        with (checkpoint.parent.parent / RESULTS).open("a", encoding="utf-8") as file:
            file.write(line)
    except OSError as error:
        click.echo(f"not kept in {checkpoint.parent.parent}: {error.strerror}", err=True)


def interrupted(rows: Sequence[dict[str, Any]], models: int) -> str:
    """What was measured before the end."""
    parts = [f"of {row['model']} {_some(row)}" for row in rows if not row.get("complete", True)]
    named = len({row["model"] for row in rows})
    where = f"interrupted {'in' if parts else 'after'} {named} of {models} {'model' if models == 1 else 'models'}"
    return ": ".join([where, "; ".join(parts)]) if parts else where


def _some(row: dict[str, Any]) -> str:
    if "tasks" in row:
        done = ", ".join(f"{task} on {found.get('examples', 0)} examples" for task, found in row["tasks"].items())
        return f"these tasks: {done or 'none'}"
    return f"{row['tokens']:,} tokens of {row['data']}"
