"""Writing a checkpoint: under a temporary name, forced to the disk, renamed, committed."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fnlm.checkpoint import layout
from fnlm.checkpoint.files import (
    CheckpointError,
    Parts,
    SaveFailed,
    failed,
    file_sha256,
    remove,
    replace_text,
    sha256,
    sync_folder,
    write_file,
)
from fnlm.checkpoint.layout import What
from fnlm.checkpoint.packing import Packed, as_json, pack
from fnlm.types import NameMask, TrainState

LINK_ABOVE = 1 << 20  # a smaller file is written again: a linked one shares its damage with the earlier checkpoint
SLACK = 1 << 20  # bytes for the folder and for rounding up to blocks
TEMPORARY = ".tmp"


def save(
    folder: str | Path,
    state: TrainState,
    *,
    config: dict[str, Any],
    tokenizer: Path | None = None,
    extra: dict[str, Any] | None = None,
    what: What = "all",
    frozen: NameMask | None = None,
    link: bool = True,
) -> Path:
    """Write the state below `folder` (a run's `checkpoints`) and return its path, such as `folder/00001000`.

    `config` and `extra` become JSON (numbers that are not finite: null); `tokenizer` is copied. `what="params"` leaves
    the optimizer out. The parameters that `frozen` accepts get a file of their own. `link`: a large file equal to that
    of the last checkpoint is hard-linked to it. A checkpoint of the same step is replaced. Raises CheckpointError where
    the disk is full, and for what neither safetensors nor JSON can hold; what was there before stays.
    """
    packed = pack(state, config, tokenizer, extra, what, frozen)
    return commit(Path(folder), packed, link)


def commit(folder: Path, packed: Packed, link: bool = True) -> Path:
    """Write a packed checkpoint; see `save`."""
    final = folder / layout.name_of(packed.step, packed.what)
    with explained(final):
        make(folder)
        tidy(folder)
        temporary = _write_temporary(folder, final, packed, link)
        put_in_place(temporary, final)
    return final


@contextlib.contextmanager
def explained(final: Path) -> Iterator[None]:
    """Raises SaveFailed for an OSError while a checkpoint is made, and gives back the space it took."""
    try:
        yield
    except (OSError, CheckpointError) as error:
        with contextlib.suppress(OSError):  # what cannot be removed now is removed by the next save
            tidy(final.parent)
        raise failed(final, error) if isinstance(error, OSError) else error from error


def make(folder: Path) -> None:
    """Make a folder and those above it, and wait until the disk has them."""
    missing = [p for p in (folder, *folder.parents) if not p.exists()]
    if missing:
        os.makedirs(folder, exist_ok=True)
    for path in missing:
        sync_folder(path.parent)


def tidy(folder: Path) -> None:
    """Take away what interrupted saves left: temporary and torn folders; a checkpoint set aside comes back.

    A torn folder that was committed once is damage, not an interrupted save, and stays for its owner to look at.
    """
    for path in folder.glob(f".*{TEMPORARY}"):
        if path.is_dir():
            remove(path, layout.COMMITTED)
        else:
            os.unlink(path)
    paths = layout.folders(folder)
    for path in paths:
        if path.suffix != ".old" and not (path / layout.COMMITTED).exists():
            remove(path, layout.COMMITTED)
    for path in paths:
        if path.suffix == ".old":
            _take_back(path, path.with_suffix(""))


def _take_back(old: Path, final: Path) -> None:
    if layout.is_committed(final) or not layout.is_committed(old):
        remove(old, layout.COMMITTED)
        return
    if final.exists():
        remove(final, layout.COMMITTED)
    os.rename(old, final)


def _write_temporary(folder: Path, final: Path, packed: Packed, link: bool) -> Path:
    found = layout.committed(folder)
    files = {name: entry_of(parts) for name, parts in packed.files.items()}
    sources = _equal_files(found[0].path, files) if link and found else {}
    require_space(folder, sum(e["bytes"] for k, e in files.items() if k not in sources))
    temporary = temporary_of(final)
    os.mkdir(temporary)
    for name, parts in packed.files.items():
        if not (name in sources and _linked(sources[name], temporary / name)):
            write_file(temporary / name, parts)
    write_manifest(temporary, packed.step, packed.what, files, layout.WHOLE)
    return temporary


def temporary_of(final: Path) -> Path:
    """Where a checkpoint lies until it is whole."""
    return final.with_name(f".{final.name}{TEMPORARY}")


def entry_of(parts: Parts) -> dict[str, Any]:
    """What the manifest says of a file."""
    return {"bytes": sum(map(len, parts)), "sha256": sha256(parts)}


def write_manifest(temporary: Path, step: int, what: What, files: dict[str, Any], form: int) -> None:
    """MANIFEST.json of the files of a temporary folder, which is then on the disk."""
    order = max((f.order for f in layout.committed(temporary.parent)), default=0) + 1
    about = {"format": form, "order": order, "step": step, "what": what, "files": files}
    write_file(temporary / layout.MANIFEST, as_json(about, "manifest"))
    sync_folder(temporary)


def _equal_files(earlier: Path, files: dict[str, Any]) -> dict[str, Path]:
    """The large files that the last checkpoint has already, byte for byte: they are read, as damage would spread."""
    had = layout.manifest(earlier)["files"]
    equal = [k for k, entry in files.items() if entry["bytes"] >= LINK_ABOVE and had.get(k) == entry]
    whole = [k for k in equal if (earlier / k).is_file() and file_sha256(earlier / k) == files[k]["sha256"]]
    return {k: earlier / k for k in whole}


def _linked(source: Path, target: Path) -> bool:
    try:
        os.link(source, target)
    except OSError:  # not every file system has links
        return False
    return True


def require_space(folder: Path, needed: int) -> None:
    """Raises SaveFailed where so many bytes do not fit on the disk."""
    free, needed = shutil.disk_usage(folder).free, needed + SLACK
    if free < needed:
        raise SaveFailed(
            f"{folder} has {free / 2**20:,.1f} MiB of free disk, a checkpoint takes {needed / 2**20:,.1f} MiB; "
            "free some space, keep fewer checkpoints, or save what='params'"
        )


def put_in_place(temporary: Path, final: Path) -> None:
    """Commit what lies in a temporary folder, let `latest` name it, and take away what it replaces."""
    if final.exists():
        os.rename(final, final.with_name(f"{final.name}.old"))
    os.rename(temporary, final)
    replace_text(final / layout.COMMITTED, file_sha256(final / layout.MANIFEST))
    sync_folder(final.parent)
    if layout.is_whole(final):
        replace_text(final.with_name(layout.LATEST), final.name)
    tidy(final.parent)
