"""A checkpoint that several ranks write together: each its own files, then the first of them commits all.

They meet in the temporary folder, so it must be one that all of them see: each writes its files and then, in one go,
a note of them. Once all notes are there, and say that every tensor is covered, what is committed is one checkpoint.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from math import prod
from pathlib import Path
from threading import Event
from typing import Any, NamedTuple

from torch import Tensor

from fnlm.checkpoint import layout
from fnlm.checkpoint.files import CheckpointError, Parts, SaveFailed, failed, safetensors, write_file
from fnlm.checkpoint.layout import What
from fnlm.checkpoint.packing import Outline, as_json, file_of, key_of
from fnlm.checkpoint.pieces import Piece, uncovered
from fnlm.checkpoint.write import (
    entry_of,
    explained,
    make,
    put_in_place,
    require_space,
    temporary_of,
    tidy,
    write_manifest,
)

Owned = Mapping[str, tuple[tuple[int, ...], tuple[int, ...] | None]]
"""Of every tensor by its path: the whole shape, and where in it begins what this rank writes; None: nothing."""

POLL = 0.01  # seconds between two looks for the notes of the others


class Part(NamedTuple):
    """What one rank writes: its files, and which box of which tensor they have."""

    rank: int
    files: dict[str, Parts]
    pieces: dict[str, Piece]


def part_of(tensors: Mapping[str, Tensor], owned: Owned, rank: int, world: int) -> Part:
    """A rank's part of a checkpoint, of those of its tensors that it owns; they are not copied."""
    groups: dict[str, dict[str, Tensor]] = {}
    pieces: dict[str, Piece] = {}
    for path, tensor in tensors.items():
        at = owned[path][1]
        if at is not None:
            name = part_name(file_of(path), rank, world)
            groups.setdefault(name, {})[key_of(path)] = tensor
            pieces[path] = Piece(name, at, tuple(tensor.shape))
    return Part(rank, {name: safetensors(group) for name, group in groups.items()}, pieces)


def part_name(name: str, rank: int, world: int) -> str:
    """`params-00001-of-00004.safetensors`."""
    stem, _, kind = name.rpartition(".")
    return f"{stem}-{rank:05d}-of-{world:05d}.{kind}"


def begin(folder: Path, step: int, what: What, nbytes: int) -> Path:
    """By the first rank, before any other writes: the temporary folder, empty. SaveFailed where the space is short."""
    final = folder / layout.name_of(step, what)
    with explained(final):
        make(folder)
        tidy(folder)
        require_space(folder, nbytes)
        os.mkdir(temporary_of(final))
    return temporary_of(final)


def write_part(temporary: Path, part: Part) -> None:
    """Write a rank's files, and then the note that says so. SaveFailed where the disk does not take them."""
    if not temporary.is_dir():
        raise SaveFailed(
            f"rank {part.rank} does not see {temporary}, which rank 0 has made; the run's folder must be on a file "
            "system that all ranks share"
        )
    try:
        for name, parts in part.files.items():
            write_file(temporary / name, parts)
        about = {"files": {name: entry_of(parts) for name, parts in part.files.items()}, "pieces": part.pieces}
        beside = temporary / f"{_note(part.rank)}.tmp"
        write_file(beside, as_json(about, "note"))
        os.replace(beside, temporary / _note(part.rank))
    except OSError as error:
        raise failed(temporary, error) from error


def _note(rank: int) -> str:
    return f"{rank:05d}.json"


def finish(temporary: Path, outline: Outline, world: int, given_up: Event, timeout: float) -> Path:
    """By the first rank: wait for the parts of all and commit them; the checkpoint.

    SaveFailed where a rank has written nothing within `timeout` seconds, or once `given_up` is set; CheckpointError
    where what was written does not cover every tensor. What was there before stays.
    """
    final = temporary.with_name(layout.name_of(outline.step, outline.what))
    with explained(final):
        notes = [_awaited(temporary, rank, given_up, timeout) for rank in range(world)]
        files: dict[str, Any] = {name: entry for note in notes for name, entry in note["files"].items()}
        about = outline.about | {"format": layout.IN_PARTS, "pieces": _joined(notes, outline.about["tensors"])}
        for name, parts in {layout.TREE: as_json(about, "extra"), **outline.files}.items():
            write_file(temporary / name, parts)
            files[name] = entry_of(parts)
        for rank in range(world):
            os.unlink(temporary / _note(rank))
        write_manifest(temporary, outline.step, outline.what, files, layout.IN_PARTS)
        put_in_place(temporary, final)
    return final


def _awaited(temporary: Path, rank: int, given_up: Event, timeout: float) -> dict[str, Any]:
    """The note of a rank, once it is there."""
    deadline = time.monotonic() + timeout
    while True:
        over = given_up.is_set() or time.monotonic() > deadline
        try:
            found: dict[str, Any] = json.loads((temporary / _note(rank)).read_bytes())
            return found
        except FileNotFoundError:
            if over:
                raise SaveFailed(
                    f"cannot save {temporary.stem.strip('.')}: rank {rank} has written no part; it ended, or does not "
                    f"see {temporary.parent}, which must be on a file system that all ranks share"
                ) from None
        time.sleep(POLL)


def _joined(notes: list[dict[str, Any]], tensors: dict[str, Any]) -> dict[str, list[Piece]]:
    """The pieces of every tensor; CheckpointError where they do not add up to the whole."""
    pieces: dict[str, list[Piece]] = {path: [] for path in tensors}
    for note in notes:
        for path, (file, at, shape) in note["pieces"].items():
            pieces[path].append(Piece(file, tuple(at), tuple(shape)))
    if odd := uncovered(tensors, pieces):
        raise CheckpointError(f"the ranks did not write all of {len(odd)} tensors, first {odd[0]}")
    return pieces


def size_of(tensors: Mapping[str, Tensor], owned: Owned) -> int:
    """The bytes of all parts together, headers not counted."""
    return sum(prod(owned[path][0]) * t.element_size() for path, t in tensors.items())
