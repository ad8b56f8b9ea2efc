"""Writing a checkpoint: under a temporary name, forced to the disk, renamed, committed."""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import shutil
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from fnlm import tree
from fnlm.checkpoint import layout
from fnlm.checkpoint.files import (
    CheckpointError,
    Parts,
    file_sha256,
    remove,
    replace_text,
    safetensors,
    sha256,
    sync_folder,
    write_file,
)
from fnlm.checkpoint.layout import What
from fnlm.types import NameMask, TrainState

LINK_ABOVE = 1 << 20  # a smaller file is written again: a linked one shares its damage with the earlier checkpoint
SLACK = 1 << 20  # bytes for the folder and for rounding up to blocks
TEMPORARY = ".tmp"


class Packed(NamedTuple):
    """A checkpoint before it is written: the contents of each file, as they will be."""

    step: int
    what: What
    files: dict[str, Parts]


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


def pack(
    state: TrainState,
    config: dict[str, Any],
    tokenizer: Path | None = None,
    extra: dict[str, Any] | None = None,
    what: What = "all",
    frozen: NameMask | None = None,
) -> Packed:
    """The files of a checkpoint; tensors on the CPU are not copied, so they must stay as they are until `commit`."""
    if what not in ("all", "params"):
        raise CheckpointError(f"what={what!r} is unknown; choose 'all' or 'params'")
    resting = {name for name in state.params if frozen is not None and frozen(name)}
    groups = {layout.PARAMS: {k: v for k, v in state.params.items() if k not in resting}}
    if resting:
        groups[layout.FROZEN] = {k: v for k, v in state.params.items() if k in resting}
    if what == "all":
        groups[layout.OPT_STATE] = _flat({"opt_state": state.opt_state})
    named = {"params": state.params, **({"opt_state": state.opt_state} if what == "all" else {})}
    about = {
        "format": layout.FORMAT,
        "what": what,
        "step": int(state.step),
        "key": state.key.tolist(),
        "extra": extra or {},
        "tensors": {k: {"shape": list(t.shape), "dtype": dtype_name(t)} for k, t in tree.leaves(named)},
    }
    files = {name: safetensors(tensors) for name, tensors in groups.items()}
    files |= {layout.TREE: _json(about, "extra"), layout.CONFIG: _json(config, "config")}
    if tokenizer is not None:
        files[layout.TOKENIZER] = [memoryview(Path(tokenizer).read_bytes())]
    return Packed(int(state.step), what, files)


def dtype_name(tensor: Tensor) -> str:
    """`float32`, as tree.json writes it."""
    return str(tensor.dtype).removeprefix("torch.")


def _flat(named: dict[str, Any]) -> dict[str, Tensor]:
    pairs = list(tree.leaves(named))
    if len(flat := dict(pairs)) < len(pairs):
        raise CheckpointError("two tensors of the state have the same path; choose keys without '/'")
    return flat


def _json(value: Any, name: str) -> Parts:
    text = json.dumps(_plain(value, name), ensure_ascii=False, allow_nan=False, indent=1)
    return [memoryview(f"{text}\n".encode())]


def _plain(value: Any, at: str) -> Any:
    """What JSON can hold."""
    if isinstance(value, Tensor) and value.ndim == 0:
        value = value.item()
    if is_dataclass(value) and not isinstance(value, type):
        value = asdict(value)
    if isinstance(value, dict):
        return {str(k): _plain(v, f"{at}.{k}") for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v, f"{at}[{i}]") for i, v in enumerate(value)]
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if value is None or isinstance(value, (str, int)):
        return value
    if isinstance(value, Path):
        return str(value)
    raise CheckpointError(f"{at} is a {type(value).__name__}, which JSON cannot hold; make it a number or a string")


def commit(folder: Path, packed: Packed, link: bool = True) -> Path:
    """Write a packed checkpoint; see `save`."""
    final = folder / layout.name_of(packed.step, packed.what)
    try:
        _make(folder)
        tidy(folder)
        temporary = _write_temporary(folder, final, packed, link)
        _put_in_place(temporary, final)
        if packed.what == "all":
            replace_text(folder / layout.LATEST, final.name)
        tidy(folder)
    except OSError as error:
        with contextlib.suppress(
            OSError
        ):  # give the space back; what cannot be removed now is removed by the next save
            tidy(folder)
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        remedy = "; free some space, keep fewer checkpoints, or save what='params'" if full else ""
        raise CheckpointError(f"cannot save {final}: {error.strerror or error}{remedy}") from error
    return final


def _make(folder: Path) -> None:
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
    files: dict[str, Any] = {
        k: {"bytes": sum(map(len, parts)), "sha256": sha256(parts)} for k, parts in packed.files.items()
    }
    order = max((f.order for f in found), default=0) + 1
    about = {"format": layout.FORMAT, "order": order, "step": packed.step, "what": packed.what, "files": files}
    sources = _equal_files(found[0].path, files) if link and found else {}
    _check_space(folder, sum(e["bytes"] for k, e in files.items() if k not in sources))
    temporary = folder / f".{final.name}{TEMPORARY}"
    os.mkdir(temporary)
    for name, parts in packed.files.items():
        if not (name in sources and _linked(sources[name], temporary / name)):
            write_file(temporary / name, parts)
    write_file(temporary / layout.MANIFEST, _json(about, "manifest"))
    sync_folder(temporary)
    return temporary


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


def _check_space(folder: Path, needed: int) -> None:
    free, needed = shutil.disk_usage(folder).free, needed + SLACK
    if free < needed:
        raise CheckpointError(
            f"{folder} has {free / 2**20:,.0f} MiB of free disk, a checkpoint takes {needed / 2**20:,.0f} MiB; "
            "free some space, keep fewer checkpoints, or save what='params'"
        )


def _put_in_place(temporary: Path, final: Path) -> None:
    if final.exists():
        os.rename(final, final.with_name(f"{final.name}.old"))
    os.rename(temporary, final)
    replace_text(final / layout.COMMITTED, file_sha256(final / layout.MANIFEST))
    sync_folder(final.parent)
