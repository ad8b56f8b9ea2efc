"""What lies where in a folder of checkpoints, which of them are complete, and which is the newest."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

from fnlm.checkpoint.files import CheckpointError, failed, file_sha256, replace_text, sha256

What = Literal["all", "params"]
WHOLE, IN_PARTS = 1, 2
"""The format of a checkpoint: tensors that are whole, and pieces that several ranks wrote."""
COMMITTED, MANIFEST, TREE, CONFIG, TOKENIZER = (
    "COMMITTED",
    "MANIFEST.json",
    "tree.json",
    "config.json",
    "tokenizer.json",
)
PARAMS, FROZEN, OPT_STATE = "params.safetensors", "params.frozen.safetensors", "opt_state.safetensors"
LATEST, BEST = "latest", "best"
PARAMS_ALONE = ".params"

_NAME = re.compile(r"(?P<step>\d{8,})(?P<params>\.params)?(?P<old>\.old)?")
_log = logging.getLogger(__name__)


class Found(NamedTuple):
    """A committed checkpoint; `order` counts the commits of its folder, so that the greatest is the newest."""

    path: Path
    step: int
    what: What
    order: int


def name_of(step: int, what: What) -> str:
    """The name of a checkpoint's folder. Parameters alone have one of their own: they replace no whole checkpoint."""
    return f"{step:08d}" + (PARAMS_ALONE if what == "params" else "")


def is_whole(path: Path) -> bool:
    """Whether a checkpoint's folder is named like one with the optimizer's state."""
    return not path.name.endswith(PARAMS_ALONE)


def folders(folder: Path) -> list[Path]:
    """The folders that are named like checkpoints, torn ones and those being replaced (`.old`) among them."""
    if not folder.is_dir():
        return []
    return sorted(p for p in folder.iterdir() if _NAME.fullmatch(p.name) and p.is_dir())


def manifest(path: Path) -> dict[str, Any]:
    """MANIFEST.json of a committed checkpoint. CheckpointError where it is torn, damaged or of a newer format."""
    if not path.is_dir():
        raise CheckpointError(f"{path} is not a folder; name a checkpoint such as runs/demo/checkpoints/00001000")
    for name in (COMMITTED, MANIFEST):
        if not (path / name).is_file():
            raise CheckpointError(f"{path} is not a complete checkpoint: it has no {name}")
    if (path / COMMITTED).read_bytes() != f"{file_sha256(path / MANIFEST)}\n".encode():
        raise CheckpointError(f"{path} is damaged: COMMITTED does not hold the sha256 of MANIFEST.json")
    found: dict[str, Any] = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
    if found["format"] > IN_PARTS:
        raise CheckpointError(
            f"{path} has format {found['format']}, this fnlm reads up to {IN_PARTS}; use a newer fnlm"
        )
    return found


def is_committed(path: Path) -> bool:
    """Whether all files were on the disk when it was written; damage since then is for `verify`."""
    try:
        manifest(path)
    except CheckpointError:
        return False
    return True


def is_any(folder: str | Path) -> bool:
    """Whether a folder holds at least one checkpoint whose files were all written."""
    return any(is_committed(path) for path in folders(Path(folder)))


def _problems(path: Path, share: tuple[int, int]) -> Iterator[str]:
    own, of = share
    for number, (name, entry) in enumerate(manifest(path)["files"].items()):
        file = path / name
        if not file.is_file():
            yield f"{name} is missing"
        elif file.stat().st_size != entry["bytes"]:
            yield f"{name} has {file.stat().st_size} bytes instead of {entry['bytes']}"
        elif of and number % of == own and file_sha256(file) != entry["sha256"]:
            yield f"{name} has another sha256 than in MANIFEST.json"


def verify(path: str | Path, share: tuple[int, int] = (0, 1)) -> None:
    """Read every byte of a checkpoint and compare; CheckpointError with all that is wrong.

    `share` (i, n): of the files every n-th, from the i-th on, so that n ranks together read each byte once; of (0, 0)
    none is read, and their sizes compared.
    """
    if problems := list(_problems(Path(path), share)):
        raise CheckpointError(f"{path} is damaged: {'; '.join(problems)}")


def read_json(path: Path, name: str) -> Any:
    """A JSON file of a committed checkpoint, checked against the manifest."""
    file, entry = path / name, manifest(path)["files"].get(name)
    if entry is None or not file.is_file():
        raise CheckpointError(f"{path} has no {name}")
    data = file.read_bytes()
    if sha256([memoryview(data)]) != entry["sha256"]:
        raise CheckpointError(f"{file} is damaged: its sha256 is not that of MANIFEST.json")
    return json.loads(data)


def describe(path: str | Path) -> dict[str, Any]:
    """What tree.json says: `step`, `key`, `what`, `extra`, and `tensors` (shape and dtype by path, in order)."""
    found: dict[str, Any] = read_json(Path(path), TREE)
    return found


def committed(folder: Path, level: int = logging.DEBUG) -> list[Found]:
    """The committed checkpoints, newest first; a torn one is passed over with a line logged at `level`."""
    found = []
    for path in folders(folder):
        try:
            entry = manifest(path)
        except (CheckpointError, OSError) as error:
            _log.log(level, "skipped: %s", error)
        else:
            found.append(Found(path, entry["step"], entry["what"], entry["order"]))
    return sorted(found, key=lambda f: f.order, reverse=True)


def newest_good(
    folder: str | Path, what: What = "all", before: int | None = None, share: tuple[int, int] = (0, 1)
) -> Path | None:
    """The checkpoint committed last whose every byte is right, or None; those passed over are logged, with the reason.

    `what`: "all" asks for one to resume from, "params" for any with parameters. `before`: only those of earlier steps.
    `share`: what is read of each, as in `verify`; of (0, 0) the sizes of the files only.
    """
    for found in committed(Path(folder), logging.WARNING):
        if (what == "all" and found.what == "params") or (before is not None and found.step >= before):
            continue
        try:
            verify(found.path, share)
        except (CheckpointError, OSError) as error:
            _log.warning("skipped: %s", error)
        else:
            return found.path
    return None


def older(path: str | Path) -> Path | None:
    """The whole checkpoint of the same folder that was committed before this one, its files all there; or None."""
    found = [f for f in committed(Path(path).parent) if f.what == "all"]
    order = next((f.order for f in found if f.path == Path(path)), None)
    for earlier in (f.path for f in found if order is not None and f.order < order):
        try:
            verify(earlier, (0, 0))
            return earlier
        except (CheckpointError, OSError) as error:
            _log.warning("skipped: %s", error)
    return None


def resolve(path: str | Path, what: What = "all") -> Path:
    """A checkpoint from its own path, a run's folder or its `checkpoints`: then the newest good one.

    CheckpointError where there is none.
    """
    path = Path(path)
    if not path.is_dir() or _NAME.fullmatch(path.name) or (path / MANIFEST).exists():
        return path
    below = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    found = newest_good(below, what)
    if found is None:
        raise CheckpointError(f"{below} holds no complete checkpoint" + (" to resume from" if what == "all" else ""))
    return found


def best(folder: str | Path) -> Path | None:
    """The checkpoint that the text file `best` names, or None where it is not there."""
    file = Path(folder) / BEST
    name = file.read_bytes().decode("ascii", "replace").strip() if file.is_file() else ""
    return file.with_name(name) if _NAME.fullmatch(name) and file.with_name(name).is_dir() else None


def mark_best(path: str | Path) -> None:
    """Let `best`, beside the checkpoint, name it. CheckpointError unless it is committed."""
    manifest(Path(path))
    try:
        replace_text(Path(path).with_name(BEST), Path(path).name)
    except OSError as error:
        raise failed(Path(path).with_name(BEST), error) from error
