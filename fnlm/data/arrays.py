"""Tokens that others prepared: raw .bin as nanoGPT writes it, the .bin of llm.c with its header, and .npy."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fnlm.data.manifest import FILE, DataError

HEADER = 256
"""llm.c: 256 int32, of which the first three are the magic number, the version and the number of tokens."""
MAGIC = {20240520: (1, "<u2"), 20240801: (7, "<u4")}
"""The version and the type of the ids: GPT-2's and Llama 3's."""


def mapped(file: Path) -> NDArray[Any]:
    """The ids of a file, mapped into memory. Raises DataError for one whose length or type does not fit."""
    if file.suffix == ".npy":
        return _npy(file)
    size = file.stat().st_size
    head = np.fromfile(file, "<i4", min(HEADER, size // 4))
    if len(head) == HEADER and int(head[0]) in MAGIC:
        return _llm_c(file, head)
    dtype = _dtype_beside(file)
    if size % dtype.itemsize:
        raise DataError(f"{file} has {size} bytes, which is not a whole number of {dtype} ids")
    return np.memmap(file, dtype, "r")


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


def _dtype_beside(file: Path) -> np.dtype[Any]:
    """What a manifest of ours beside it says; nanoGPT's uint16 without one."""
    manifest = file.with_name(FILE)
    if manifest.is_file():
        return np.dtype(str(json.loads(manifest.read_text(encoding="utf-8"))["dtype"]))
    return np.dtype("<u2")


def split_named(file: Path) -> str | None:
    """The split that a file's name gives: train.bin, val.bin, fineweb_val_000000.bin; None for another."""
    words = set(file.stem.lower().replace("-", "_").split("_"))
    if words & {"val", "valid", "validation"}:
        return "val"
    return "train" if "train" in words else None
