"""Bytes on disk: files written whole and forced to the disk, and safetensors streamed without a second copy."""

from __future__ import annotations

import errno
import hashlib
import json
import math
import mmap
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

Parts = list[memoryview]
"""The contents of a file, piece by piece."""

CHUNK = 8 << 20
LENGTH = 8  # bytes before a safetensors header that say how long it is
DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
NAMED = {name: dtype for dtype, name in DTYPES.items()}


class CheckpointError(ValueError):
    """A checkpoint that cannot be written, is damaged, or does not fit; the message says what to do."""

    exit_code = 4


class Misfit(CheckpointError):
    """A checkpoint whose tensors are not those that are wanted; the message is a table and, last, the remedy."""


class SaveFailed(CheckpointError):
    """The disk did not take a checkpoint: it is full, or broken. What was there before stays."""

    exit_code = 1


def failed(what: Path, error: OSError) -> SaveFailed:
    """What a file system did not do, in one line with the remedy where there is one."""
    full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    remedy = "; free some space, keep fewer checkpoints, or save what='params'" if full else ""
    return SaveFailed(f"cannot save {what}: {error.strerror or error}{remedy}")


def sha256(parts: Iterable[memoryview]) -> str:
    """The sha256 of the pieces one after the other, in hexadecimal."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()


def file_sha256(path: Path) -> str:
    """The sha256 of a file, in hexadecimal."""
    digest, buffer = hashlib.sha256(), memoryview(bytearray(CHUNK))
    with path.open("rb", buffering=0) as file:
        while n := file.readinto(buffer):
            digest.update(buffer[:n])
    return digest.hexdigest()


def write_file(path: Path, parts: Iterable[memoryview]) -> None:
    """Write the pieces and wait until the disk has them."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | getattr(os, "O_BINARY", 0), 0o644)
    try:
        for part in parts:
            for start in range(0, len(part), CHUNK):
                left = part[start : start + CHUNK]
                while left:
                    left = left[os.write(fd, left) :]
        os.fsync(fd)
    finally:
        os.close(fd)


def sync_folder(path: Path) -> None:
    """Wait until the disk has the folder's entries: which files there are, and their names."""
    if os.name != "posix":  # Windows opens no folders and keeps their entries itself
        return
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def replace_text(path: Path, line: str) -> None:
    """Give a one-line text file a new line: a reader sees the old one or the new one, whatever happens."""
    beside = path.with_name(f".{path.name}.tmp")
    write_file(beside, [memoryview(f"{line}\n".encode())])
    os.replace(beside, path)
    sync_folder(path.parent)


def remove(folder: Path, first: str) -> None:
    """Remove a folder of files; the file called `first`, which says that it is complete, goes first."""
    for path in sorted(folder.iterdir(), key=lambda p: p.name != first):
        os.unlink(path)
    os.rmdir(folder)


def raw(tensor: Tensor) -> memoryview:
    """The bytes of a tensor in row-major order: those in memory where it lies so on the CPU, else of a copy."""
    own = tensor.detach().to("cpu").contiguous()
    return own.reshape(-1).view(torch.uint8).numpy().data


def safetensors(tensors: dict[str, Tensor]) -> Parts:
    """A safetensors file of these tensors, not copied. ValueError for a dtype that the format does not know.

    The widest dtypes come first, so that every tensor starts at a multiple of its element's size.
    """
    odd = [f"{name} ({t.dtype})" for name, t in tensors.items() if t.dtype not in DTYPES]
    if odd:
        raise CheckpointError(f"safetensors cannot hold {', '.join(odd[:3])}; convert it before saving")
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    parts, end = [], 0
    for name, tensor in sorted(tensors.items(), key=lambda item: -item[1].element_size()):
        parts.append(raw(tensor))
        start, end = end, end + len(parts[-1])
        header[name] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return [memoryview(len(text).to_bytes(LENGTH, "little") + text), *parts]


def read_safetensors(path: Path, expected: str) -> dict[str, Tensor]:
    """The tensors of a file whose sha256 is `expected`, in new memory; CheckpointError unless it is.

    One pass: what is hashed is what is returned. Each tensor has memory of its own from torch, since the alignment of
    memory may decide how a kernel rounds.
    """
    digest = hashlib.sha256()
    with path.open("rb") as file:
        try:
            tensors = _read_tensors(file, os.fstat(file.fileno()).st_size, digest)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{path} is damaged: its header cannot be read ({error})") from error
    if digest.hexdigest() != expected:
        raise CheckpointError(f"{path} is damaged: its sha256 is not that of MANIFEST.json")
    return tensors


def _read_tensors(file: BinaryIO, size: int, digest: hashlib._Hash) -> dict[str, Tensor]:
    head = file.read(LENGTH)
    length = int.from_bytes(head, "little")
    if LENGTH + length > size:
        raise ValueError(f"a header of {length} bytes in a file of {size}")
    text = file.read(length)
    digest.update(head + text)
    header = json.loads(text)
    header.pop("__metadata__", None)
    tensors, at = {}, 0
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        dtype, shape, (start, end) = NAMED[entry["dtype"]], entry["shape"], entry["data_offsets"]
        if start != at or end - start != math.prod(shape) * dtype.itemsize or LENGTH + length + end > size:
            raise ValueError(f"wrong offsets for {name!r}")
        tensors[name], at = torch.empty(shape, dtype=dtype), end
        view = raw(tensors[name])
        file.readinto(view)  # type: ignore[attr-defined]  # a buffered file fills the view, or ends
        digest.update(view)
    digest.update(file.read())
    return tensors


class Mapped:
    """A safetensors file as views of its pages: what is not touched is not read, and no byte is checked.

    CheckpointError where it is not there, or its header cannot be read.
    """

    def __init__(self, path: Path) -> None:
        try:
            with path.open("rb") as file:
                length, size = int.from_bytes(file.read(LENGTH), "little"), os.fstat(file.fileno()).st_size
                self.header: dict[str, Any] = dict(json.loads(file.read(min(length, size))))
                self._content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        except (OSError, ValueError, TypeError) as error:
            raise CheckpointError(f"{path} is damaged or not there: {error}") from error
        self.header.pop("__metadata__", None)
        self._start = LENGTH + length

    def view(self, name: str) -> Tensor:
        """A tensor, not copied; it must not be written to."""
        entry = self.header[name]
        dtype, shape, (start, end) = NAMED[entry["dtype"]], tuple(entry["shape"]), entry["data_offsets"]
        if end == start:
            return torch.empty(shape, dtype=dtype)
        count, at = math.prod(shape), self._start + start
        return torch.frombuffer(self._content, dtype=dtype, count=count, offset=at).view(shape)
