"""A checkpoint as three ranks write it: what each has of a state, and their calls one after the other."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from threading import Event
from typing import Any

from torch import Tensor

from fnlm.checkpoint.packing import flat, outline
from fnlm.checkpoint.parts import Owned, begin, finish, part_of, size_of, write_part
from fnlm.sharding import span
from fnlm.types import TrainState

WORLD = 3


def cut(state: TrainState, rank: int) -> tuple[dict[str, Tensor], Owned]:
    """Matrices by columns, vectors by their elements, the last rank with the least; what cannot be cut is rank 1's."""
    tensors, owned = dict[str, Tensor](), dict[str, Any]()
    for path, tensor in flat(state).items():
        shape = tuple(tensor.shape)
        if not shape:
            tensors[path], owned[path] = tensor, (shape, () if rank == 1 else None)
            continue
        low, high = span(shape[-1], WORLD, rank)
        tensors[path] = tensor[..., low:high]
        owned[path] = (shape, (*[0] * (len(shape) - 1), low) if high > low else None)
    return tensors, owned


def save_by_ranks(
    folder: Path, state: TrainState, writing: Iterable[int] = range(WORLD), given_up: bool = False, **more: Any
) -> Path:
    """Save what `writing` ranks write; with `given_up` rank 0 waits for none that has not written yet."""
    tensors, owned = cut(state, 0)
    head = outline(state, {path: whole for path, (whole, _) in owned.items()}, **more)
    temporary = begin(folder, head.step, "all", size_of(tensors, owned))
    for rank in writing:
        write_part(temporary, part_of(*cut(state, rank), rank, WORLD))
    event = Event()
    if given_up:
        event.set()
    return finish(temporary, head, WORLD, event, timeout=0.05)
