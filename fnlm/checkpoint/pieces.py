"""Where the bytes of a tensor lie: in one file, or as boxes in the files that several ranks wrote."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fnlm.checkpoint import layout
from fnlm.checkpoint.files import CheckpointError, Mapped, read_safetensors
from fnlm.checkpoint.packing import key_of

Shape = tuple[int, ...]
Box = Callable[[str, Shape], tuple[slice, ...]]
"""What is wanted of a tensor, by its path (`params/...`) and its whole shape."""


class Piece(NamedTuple):
    """A box of a tensor: the file that has it, where it begins in the whole, and its shape."""

    file: str
    at: Shape
    shape: Shape


class Pieces:
    """The tensors of a checkpoint below a prefix of their paths, read from its files."""

    def __init__(self, path: Path, about: dict[str, Any], prefix: str = "") -> None:
        self.path, self.files = path, layout.manifest(path)["files"]
        self.tensors = {k: entry for k, entry in about["tensors"].items() if k.startswith(prefix)}
        self.mapped: dict[str, Mapped] = {}
        parted = about.get("pieces")
        self.where = self._whole() if parted is None else {k: [_piece(x) for x in parted[k]] for k in self.tensors}

    def _whole(self) -> dict[str, list[Piece]]:
        """One piece for each tensor: what the headers of the files say."""
        kinds = {k.startswith("params/") for k in self.tensors}
        names = ((True, layout.PARAMS), (True, layout.FROZEN), (False, layout.OPT_STATE))
        wanted = [name for kind, name in names if kind in kinds and name in self.files]
        holds = {name: self._open(name).header for name in wanted}
        found: dict[str, list[Piece]] = {}
        for path, entry in self.tensors.items():
            shape, key = tuple(entry["shape"]), key_of(path)
            found[path] = [Piece(name, (0,) * len(shape), shape) for name, header in holds.items() if key in header]
            if not found[path]:
                raise CheckpointError(f"{self.path} is damaged: no file has {path}")
        return found

    def _open(self, name: str) -> Mapped:
        if name not in self.mapped:
            self.mapped[name] = Mapped(self.path / name)
        return self.mapped[name]

    def boxes(self, box: Box) -> dict[str, Tensor]:
        """A box of each tensor in new memory; only files that have something of it are opened, and none is checked."""
        return {path: self._box(path, box(path, tuple(entry["shape"]))) for path, entry in self.tensors.items()}

    def _box(self, path: str, wanted: tuple[slice, ...]) -> Tensor:
        out = _empty(self.tensors[path], tuple(s.stop - s.start for s in wanted))
        for piece in self.where[path]:
            common = _overlap(wanted, piece)
            if all(s.stop > s.start for s in common):
                here = self._open(piece.file).view(key_of(path))[_within(common, piece.at)]
                out[_within(common, [s.start for s in wanted])] = here
        return out

    def whole(self) -> dict[str, Tensor]:
        """All tensors, every byte of them checked."""
        parts: dict[str, dict[str, Piece]] = {}
        for path, pieces in self.where.items():
            for piece in pieces:
                parts.setdefault(piece.file, {})[path] = piece
        found: dict[str, Tensor] = {}
        for name, there in parts.items():
            if not (self.path / name).is_file():
                raise CheckpointError(f"{self.path} has no {name}")
            tensors = read_safetensors(self.path / name, self.files[name]["sha256"])
            for path, piece in there.items():
                self._lay(found, path, piece, tensors.pop(key_of(path)))
        return {path: found[path] if path in found else _empty(self.tensors[path]) for path in self.tensors}

    def _lay(self, found: dict[str, Tensor], path: str, piece: Piece, tensor: Tensor) -> None:
        if piece.shape == tuple(self.tensors[path]["shape"]):
            found[path] = tensor
            return
        if path not in found:
            found[path] = _empty(self.tensors[path])
        found[path][tuple(slice(a, a + n) for a, n in zip(piece.at, piece.shape, strict=True))] = tensor


def _piece(entry: Iterable[Any]) -> Piece:
    file, at, shape = entry
    return Piece(file, tuple(at), tuple(shape))


def _empty(entry: dict[str, Any], shape: Shape | None = None) -> Tensor:
    return torch.empty(entry["shape"] if shape is None else shape, dtype=getattr(torch, entry["dtype"]))


def _overlap(wanted: tuple[slice, ...], piece: Piece) -> tuple[slice, ...]:
    """What a box and a piece have in common, in the coordinates of the whole; it may be empty."""
    ends = zip(wanted, piece.at, piece.shape, strict=True)
    return tuple(slice(max(s.start, a), min(s.stop, a + n)) for s, a, n in ends)


def _within(box: tuple[slice, ...], corner: Iterable[int]) -> tuple[slice, ...]:
    """A box as seen from a corner of another one."""
    return tuple(slice(s.start - a, s.stop - a) for s, a in zip(box, corner, strict=True))


def uncovered(tensors: dict[str, Any], pieces: dict[str, list[Piece]]) -> list[str]:
    """The paths whose pieces do not add up to the whole."""
    return [
        path
        for path, entry in tensors.items()
        if sum(prod(piece.shape) for piece in pieces.get(path, [])) != prod(entry["shape"])
    ]
