"""Other people's safetensors, read one tensor at a time: names and shapes first, bytes when they are asked for."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, Protocol

import torch
from torch import Tensor

from fnlm.checkpoint.files import LENGTH, NAMED, CheckpointError, raw

HEADER = 100 << 20  # bytes; what the safetensors library allows
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLED = ("pytorch_model.bin", "pytorch_model.bin.index.json")


class Stored(Protocol):
    """A tensor on disk."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Known before it is read."""

    def read(self) -> Tensor:
        """The values, in new memory."""


class Entry(NamedTuple):
    """A tensor of a safetensors file: `start` is where its bytes begin."""

    file: Path
    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int

    def read(self) -> Tensor:
        """The values. CheckpointError where the file ends too early."""
        out = torch.empty(self.shape, dtype=self.dtype)
        with self.file.open("rb") as file:
            file.seek(self.start)
            fill(file, out, self.file)
        return out


def fill(file: BinaryIO, out: Tensor, path: Path) -> None:
    """Read a contiguous tensor's bytes, little-endian, in place. CheckpointError where the file ends too early."""
    view = raw(out)
    if file.readinto(view) != len(view):  # type: ignore[attr-defined]
        raise CheckpointError(f"{path} ends in the middle of a tensor; fetch it again")


def of_folder(folder: Path) -> dict[str, Entry]:
    """The tensors of a model's folder: model.safetensors, or what its index names.

    CheckpointError where a file is missing or damaged, and for pickled weights, which are not read.
    """
    if (folder / INDEX).is_file():
        return _of_index(folder)
    if (folder / WEIGHTS).is_file():
        return of_file(folder / WEIGHTS)
    for name in PICKLED:
        if (folder / name).is_file():
            raise CheckpointError(f"{folder} has {name}, a pickle, which is not read; save it as safetensors")
    raise CheckpointError(f"{folder} has no {WEIGHTS}")


def _of_index(folder: Path) -> dict[str, Entry]:
    index = read_json(folder / INDEX)
    placed = index.get("weight_map")
    if not isinstance(placed, dict) or not all(isinstance(name, str) for name in placed.values()):
        raise CheckpointError(f"{folder / INDEX} has no weight_map of names to files")
    found: dict[str, Entry] = {}
    for name in sorted(set(placed.values())):
        if Path(name).name != name:
            raise CheckpointError(f"{folder / INDEX} names {name!r}, which is not a file beside it")
        if not (folder / name).is_file():
            raise CheckpointError(f"{folder} has no {name}, which {INDEX} names; fetch the rest of it")
        found |= of_file(folder / name)
    if missing := sorted(set(placed) - set(found)):
        raise CheckpointError(f"{folder} has no tensor {missing[0]}, which {INDEX} names")
    return found


def of_file(path: Path) -> dict[str, Entry]:
    """The tensors of a safetensors file. CheckpointError for a damaged one, in a line, before memory is taken."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(LENGTH), "little")
        if size < LENGTH or not 2 <= length <= min(HEADER, size - LENGTH):
            raise CheckpointError(f"{path} is no whole safetensors file: a header of {length} bytes in {size}")
        text = file.read(length)
    try:
        header = json.loads(text)
        header.pop("__metadata__", None)
        return {name: _entry(path, name, e, LENGTH + length, size) for name, e in header.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{path} is damaged: its header cannot be read ({type(error).__name__})") from error


def _entry(path: Path, name: str, entry: dict[str, Any], base: int, size: int) -> Entry:
    if entry["dtype"] not in NAMED:
        raise CheckpointError(f"{path}: {name} has dtype {entry['dtype']}, which is not read")
    dtype, shape, (start, end) = NAMED[entry["dtype"]], tuple(entry["shape"]), entry["data_offsets"]
    if not all(isinstance(n, int) and n >= 0 for n in (*shape, start, end)):
        raise CheckpointError(f"{path} is damaged: wrong offsets or shape for {name!r}")
    if end - start != math.prod(shape) * dtype.itemsize:
        raise CheckpointError(f"{path} is damaged: wrong offsets for {name!r}")
    if base + end > size:
        raise CheckpointError(f"{path} is cut off: {size} bytes, and {name!r} ends at {base + end}; fetch it again")
    return Entry(path, name, dtype, shape, base + start)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. CheckpointError for a file that holds none."""
    try:
        found = json.loads(path.read_bytes().decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not JSON ({type(error).__name__})") from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{path} is not a JSON object")
    return found


Tensors = Mapping[str, Stored]
