"""Tokens that others prepared: raw .bin as nanoGPT writes it, the .bin of llm.c with its header, and .npy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fnlm.data.manifest import DataError, dtype_of, read
from fnlm.tokenizers import Tokenizer

HEADER = 256
"""llm.c: 256 int32, of which the first three are the magic number, the version and the number of tokens."""
LOOK = 1 << 16
MAGIC = {20240520: (1, "<u2"), 20240801: (7, "<u4")}
"""The version and the type of the ids: GPT-2's and Llama 3's."""


def mapped(file: Path, tokenizer: Tokenizer) -> NDArray[Any]:
    """The ids of a file, mapped into memory.

    Raises DataError for a file whose length or type does not fit, and for one of a folder of ours that was made with
    another tokenizer, or with a mask.
    """
    manifest = _beside(file)
    if manifest is not None:
        _check_beside(file, manifest, tokenizer)
    if file.suffix == ".npy":
        return _npy(file)
    head = np.fromfile(file, "<i4", min(HEADER, file.stat().st_size // 4))
    if len(head) == HEADER and int(head[0]) in MAGIC:
        return _llm_c(file, head)
    # nanoGPT's are uint16, as long as the vocabulary is small enough
    dtype = dtype_of(tokenizer.vocab_size) if manifest is None else manifest["dtype"]
    return _raw(file, np.dtype(dtype).newbyteorder("<"))


def _npy(file: Path) -> NDArray[Any]:
    try:
        array: NDArray[Any] = np.load(file, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise DataError(f"{file} is not a plain .npy array: {error}") from error
    if array.ndim != 1 or array.dtype.kind not in "ui" or not len(array):
        raise DataError(f"{file} holds {array.dtype} of shape {array.shape}; token ids are whole numbers in one row")
    return array


def _llm_c(file: Path, head: NDArray[np.int32]) -> NDArray[Any]:
    count, (version, name) = int(head[2]), MAGIC[int(head[0])]
    if head[1] != version:
        raise DataError(f"{file} is llm.c's version {head[1]}; {version} is read")
    dtype = np.dtype(name)
    if file.stat().st_size != 4 * HEADER + count * dtype.itemsize:
        raise DataError(f"{file} says {count} tokens, its size does not; is it complete?")
    return np.memmap(file, dtype, "r", offset=4 * HEADER)


def _beside(file: Path) -> dict[str, Any] | None:
    """The manifest of ours that lists a file; None without one."""
    try:
        manifest = read(file.parent)
        listed = {split["file"] for split in manifest["splits"].values()}
    except (DataError, KeyError, TypeError, AttributeError):  # nobody's, or another program's
        return None
    return manifest if file.name in listed else None


def _check_beside(file: Path, manifest: dict[str, Any], tokenizer: Tokenizer) -> None:
    if manifest["kind"] == "chat":
        raise DataError(f"{file} has a mask of what is learnt; prepare the conversations it was made of")
    if manifest["tokenizer"]["sha256"] != tokenizer.sha256:
        raise DataError(f"{file} was made with another tokenizer; give --tokenizer {file.parent}")


def _raw(file: Path, dtype: np.dtype[Any]) -> NDArray[Any]:
    size = file.stat().st_size
    if size % dtype.itemsize:
        raise DataError(f"{file} has {size} bytes, which is not a whole number of {dtype} ids")
    ids = np.memmap(file, dtype, "r")
    if dtype.itemsize == 2 and len(ids) >= 8 and ids[:LOOK:2].any() and not ids[1:LOOK:2].any():
        raise DataError(f"{file} looks like uint32, not {dtype}: every second id is 0; save it as .npy, which says so")
    return ids


def split_named(file: Path) -> str | None:
    """The split that a file's name gives: train.bin, val.bin, fineweb_val_000000.bin; None for another."""
    words = set(file.stem.lower().replace("-", "_").split("_"))
    if words & {"val", "valid", "validation"}:
        return "val"
    return "train" if "train" in words else None
