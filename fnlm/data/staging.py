"""The folder beside a data folder in which it is made: one process holds it, goes on with it, renames it when whole."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from fnlm import tokenizers
from fnlm.data.gather import replace
from fnlm.data.manifest import FILE, SPLITS, DataError
from fnlm.data.manifest import open as opened
from fnlm.held import held as lock_of

# All that a preparation leaves in its folder.
WRITTEN = {FILE, tokenizers.FILE, *(f"{name}.{end}" for name in SPLITS for end in ("bin", "npy", "mask"))}
ASKED = "preparation.json"


@contextmanager
def held(out: Path) -> Iterator[None]:
    """`out` for this process alone. Raises Busy while another one prepares it."""
    if out.name in ("", ".."):
        raise ValueError(f"--out {out} has no name of its own; choose one such as data/NAME")
    out.parent.mkdir(parents=True, exist_ok=True)
    lock = out.with_name(f".{out.name}.lock")
    with lock_of(lock, f"another process prepares {out}; let it end, or choose another --out"):
        yield


def done(out: Path, todo: dict[str, Any]) -> dict[str, Any] | None:
    """The manifest of a folder that was made of just this, the same `settings` and `source`, and is still whole."""
    if not (out / FILE).is_file():
        return None
    try:
        manifest = opened(out).manifest
    except DataError:  # damaged, or what it was is not known: as any other folder that is in the way
        return None
    return manifest if all(manifest.get(name) == value for name, value in todo.items()) else None


def stage_of(out: Path, todo: dict[str, Any], force: bool, say: Callable[[str], None]) -> Path:
    """The folder beside `out` to write into: that of the same preparation where it was interrupted, else an empty one.

    Raises ValueError where `out` holds something else. Also with `force` only what a preparation writes is replaced: a
    text that lies among it may be the only copy.
    """
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out} is a file; choose another --out")
    foreign = sorted(path.name for path in out.iterdir() if path.name not in WRITTEN) if out.exists() else []
    if foreign:
        raise ValueError(f"{out} already holds something else, {foreign[0]!r}; choose another --out")
    if not force and out.exists() and any(out.iterdir()):
        raise ValueError(f"{out} already holds other data; choose another --out, or --force to replace it")
    stage = out.with_name(f".{out.name}.partial")
    if stage.exists():
        if _noted(stage) == todo:
            say(f"an earlier preparation of {out} was interrupted; going on with it")
            return stage
        say(f"an earlier preparation of {out} was not finished; starting again")
        shutil.rmtree(stage)
    stage.mkdir(parents=True)
    replace(stage / ASKED, todo)
    return stage


def forget_nothing(stage: Path) -> None:
    """Remove the folder of a preparation that has come to nothing yet: a wrong address leaves no trace."""
    if not any(path.stat().st_size for path in stage.rglob("*") if path.is_file() and path.name != ASKED):
        shutil.rmtree(stage, ignore_errors=True)


def _noted(stage: Path) -> Any:
    with suppress(OSError, ValueError):
        return json.loads((stage / ASKED).read_text(encoding="utf-8"))
    return None


def commit(stage: Path, out: Path, manifest: dict[str, Any]) -> None:
    """The manifest, everything to disk, what helped on the way removed, then the name."""
    (stage / FILE).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    for path in stage.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name not in WRITTEN:
            path.unlink()
    for path in (stage / FILE, stage / tokenizers.FILE, stage):
        _synced(path)
    old = out.with_name(f".{out.name}.old")
    if out.exists():
        shutil.rmtree(old, ignore_errors=True)
        out.rename(old)
    stage.rename(out)
    _synced(out.parent)
    shutil.rmtree(old, ignore_errors=True)


def _synced(path: Path) -> None:
    if os.name == "nt" and path.is_dir():
        return  # Windows opens no folders
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
