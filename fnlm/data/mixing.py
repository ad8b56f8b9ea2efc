"""Prepared folders mixed by weight into one: documents as they are, in an order that a seed decides.

A weight is the share of the training tokens of the result. Documents are taken whole, each folder's in an order of its
own; the next one comes from the folder that is furthest behind its share, so that the shares hold all along. A share is
therefore met to within one document.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from fnlm import random
from fnlm.data import staging
from fnlm.data.encode import bytes_of
from fnlm.data.manifest import BLOCK, SPLITS, DataError, Dataset, Split, boundary
from fnlm.data.manifest import open as opened
from fnlm.data.sink import Sink

PIECE = 1 << 16
"""Tokens: a longer document, and text without ends of documents, is taken in pieces of so many."""
AHEAD = 1 << 16
"""Documents whose order is looked up at once."""
TEMPLATE = ("template", "eot_within")
"""What the manifest says of conversations that a model's own template wrote."""
Say = Callable[[str], None]


class NoRoom(ValueError):
    """The disk has no room for so many tokens."""

    exit_code = 3


class Part(NamedTuple):
    """A folder and its weight."""

    folder: str
    weight: float


def parts_of(words: Sequence[str]) -> list[Part]:
    """`data/a=0.7 data/b=0.3` with weights that sum to 1; as many times their sum as they were given.

    Raises ValueError for a word without a weight, or fewer than two folders.
    """
    found = []
    for word in words:
        folder, _, number = word.rpartition("=")
        try:
            weight = float(number)
        except ValueError:
            weight = -1.0
        if not folder or not 0 < weight < float("inf"):
            raise ValueError(f"{word} has no weight; write data/a=0.7 data/b=0.3")
        found.append(Part(folder, weight))
    if len({Path(part.folder).resolve() for part in found}) < max(2, len(found)):
        raise ValueError("a mixture has at least two different folders; write data/a=0.7 data/b=0.3")
    total = sum(part.weight for part in found)
    shares = [part._replace(weight=part.weight / total) for part in found]
    if not all(part.weight for part in shares):
        raise ValueError("the weights lie too far apart; write data/a=0.7 data/b=0.3")
    return shares


def mix(
    parts: Sequence[Part], out: Path, tokens: int | None = None, seed: int = 0, say: Say = print, force: bool = False
) -> dict[str, Any]:
    """Make a folder of the documents of others, and its manifest with what was taken of each.

    `tokens` of training in all; None: as many as there are without taking a document twice. With more than that, the
    documents of a folder that is used up come again, in another order. Validation is mixed likewise, never repeated.
    Raises DataError for folders of different tokenizers or kinds, NoRoom where `tokens` do not fit on the disk.
    """
    sets = [opened(part.folder) for part in parts]
    _check(sets)
    dtype = max((s.manifest["dtype"] for s in sets), key=lambda name: np.dtype(name).itemsize)
    _check_room(out, (tokens or 0) * np.dtype(dtype).itemsize)
    sources = [{"path": p.folder, "weight": p.weight, "sha256": _digests(s)} for p, s in zip(parts, sets, strict=True)]
    about = {"settings": {"mix": seed, "tokens": tokens}, "source": sources}
    if any(s.folder.resolve() == out.resolve() for s in sets):
        raise ValueError(f"--out {out} is mixed itself; choose another")
    with staging.held(out):
        if not force and (manifest := staging.done(out, about)):
            say(f"{out} is already prepared from these folders")
            return manifest
        stage = staging.stage_of(out, about, force, say)
        try:
            first = sets[0].manifest
            sets[0].tokenizer.save(stage)
            kept = {name: first[name] for name in ("format", "eot_id", "kind", "tokenizer", *TEMPLATE) if name in first}
            size = max(s.manifest["vocab_size"] for s in sets)
            made = {name: _split(stage, name, parts, sets, (dtype, size), tokens, seed) for name in SPLITS}
            manifest = {
                **kept, "dtype": dtype, "vocab_size": size, "prefix": first.get("prefix", []),
                "splits": {name: entry for name, (entry, _) in made.items()},
                "mixture": {name: taken for name, (_, taken) in made.items()}, **about,
                "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            }  # fmt: skip
            staging.commit(stage, out, manifest)
        except BaseException:
            shutil.rmtree(stage, ignore_errors=True)
            raise
    return manifest


def _check(sets: Sequence[Dataset]) -> None:
    first = sets[0]
    for other in sets[1:]:
        if other.manifest["tokenizer"]["sha256"] != first.manifest["tokenizer"]["sha256"]:
            remedy = f"prepare one with --tokenizer {first.folder}"
            raise DataError(f"{other.folder} was made with another tokenizer than {first.folder}; {remedy}")
        for name in ("kind", "prefix", *TEMPLATE):
            if other.manifest.get(name) != first.manifest.get(name):
                raise DataError(f"{other.folder} and {first.folder} differ in {name}; they do not mix")


def _check_room(out: Path, size: int) -> None:
    """Raises NoRoom where `size` bytes are more than is free where `out` will be."""
    there = next((folder for folder in out.absolute().parents if folder.is_dir()), Path("."))
    free = shutil.disk_usage(there).free
    if size > free:
        raise NoRoom(f"--tokens would take {size:,} bytes, {there} has {free:,} free; choose fewer, or another --out")


def _digests(one: Dataset) -> list[str]:
    return [str(one.manifest["splits"][name]["sha256"]) for name in SPLITS]


class _Pile:
    """The documents of a split, in an order that does not end: after the last one, in another order again."""

    def __init__(self, split: Split, dataset: Dataset, key: torch.Tensor) -> None:
        self.split, self.taken, self.documents, self._key = split, 0, 0, key
        self.edges = edges(split, dataset)

    def order(self, again: bool) -> Iterator[int]:
        """Every document once, and, with `again`, for ever."""
        count, epoch = len(self.edges) - 1, 0
        while again or not epoch:
            own = random.fold_in(self._key, epoch)
            for start in range(0, count, AHEAD):
                yield from random.shuffled_index(own, count, torch.arange(start, min(start + AHEAD, count))).tolist()
            epoch += 1


def edges(split: Split, dataset: Dataset) -> NDArray[np.int64]:
    """Where the documents of a split begin, and its end, (n + 1,); long ones in pieces of PIECE tokens."""
    try:
        end, start = boundary(dataset)
    except DataError:
        end = start = None
    total, mark, found = len(split.tokens), start if end is None else end, [np.array([0, len(split.tokens)])]
    for at in range(0, total if mark is not None else 0, BLOCK):
        found.append(np.flatnonzero(np.asarray(split.tokens[at : at + BLOCK]) == mark) + at + (start is None))
    edge = np.unique(np.concatenate(found))
    long = np.flatnonzero(np.diff(edge) > PIECE)
    return np.unique(np.concatenate([edge, *(np.arange(edge[i], edge[i + 1], PIECE) for i in long)]))


def _split(
    stage: Path,
    name: str,
    parts: Sequence[Part],
    sets: Sequence[Dataset],
    form: tuple[str, int],
    tokens: int | None,
    seed: int,
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """One split, written; its entry for the manifest, and what of it is from where."""
    keys = random.split(random.fold_in(random.key(seed), SPLITS.index(name)), len(parts))
    piles = [_Pile(getattr(s, name), s, keys[i]) for i, s in enumerate(sets)]
    first, lengths = sets[0].manifest, bytes_of(sets[0].tokenizer, form[1])
    sink = Sink(stage, name, form[0], form[1], first["kind"] == "chat")
    ends = 0
    try:
        for pile, lo, hi in _taken(piles, [part.weight for part in parts], None if name == "val" else tokens):
            ids = np.asarray(pile.split.tokens[lo:hi])
            sink.write(ids, None if pile.split.mask is None else np.asarray(pile.split.mask[lo:hi]))
            ends += int(np.count_nonzero(ids == first["eot_id"])) if first["eot_id"] is not None else 1
            sink.bytes += int(lengths[ids].sum())
        sink.documents = max(1, ends)
        entry = sink.close()
    finally:
        sink.abandon()
    shares = [
        {"path": part.folder, "tokens": pile.taken, "documents": pile.documents, "share": pile.taken / sink.tokens,
         "epochs": pile.taken / len(pile.split.tokens)}
        for part, pile in zip(parts, piles, strict=True)
    ]  # fmt: skip
    return entry, shares


def _taken(piles: Sequence[_Pile], weights: Sequence[float], total: int | None) -> Iterator[tuple[_Pile, int, int]]:
    """Documents until there are `total` tokens, or one pile is used up: always of the one furthest behind its share."""
    orders = [pile.order(again=total is not None) for pile in piles]
    done = 0
    while total is None or done < total:
        i = min(range(len(piles)), key=lambda i: piles[i].taken / weights[i])
        pile, number = piles[i], next(orders[i], None)
        if number is None:
            return
        lo, hi = (int(edge) for edge in pile.edges[number : number + 2])
        pile.taken += hi - lo
        pile.documents += 1
        done += hi - lo
        yield pile, lo, hi
