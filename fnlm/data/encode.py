"""Which split a document goes to, and the tokens of each split in blocks of bounded size."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from fnlm.data import arrays, chat
from fnlm.data.chat import Messages
from fnlm.data.manifest import DataError
from fnlm.data.sources import Piece
from fnlm.data.template import Template
from fnlm.tokenizers import Tokenizer

CHARACTERS, DOCUMENTS, TOKENS = 1 << 20, 1 << 13, 1 << 22
LONG = 1 << 17
"""Bytes: a longer document that is more than the validation's share of all text is cut."""
T = TypeVar("T")


class Block(NamedTuple):
    """Tokens of one split, how many documents begin in them, and the bytes of text that they stand for."""

    split: str
    ids: NDArray[Any]
    mask: NDArray[np.uint8] | None
    documents: int
    bytes: int
    items: int = 0
    """How many of what is encoded are done with this block; 0 where another block of the same ones follows."""


class Survey(NamedTuple):
    """What a first reading finds; the lowest and highest hash keep both splits from being empty.

    `long`: the number and the bytes of each document that is too long to go to one split as a whole.
    """

    documents: int
    bytes: int
    low: int
    high: int
    long: tuple[tuple[int, int], ...] = ()


def hash_of(text: str) -> int:
    """64 bits of a document's (first) text: the same on every machine, in any order of the files."""
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8"), digest_size=8).digest(), "big")


def survey(pieces: Iterable[Piece], fraction: float = 1.0) -> Survey:
    """Reads everything once, so that every fault of the files is found before the long work. DataError without text.

    Long is a document of more than LONG bytes and more than `fraction` of all: at most 1 / fraction of them.
    """
    documents = size = high = own = 0
    low = 1 << 64
    long: list[tuple[int, int]] = []
    for piece in pieces:
        n = len(piece.text.encode("utf-8"))
        size, own = size + n, n if piece.first else own + n
        if piece.first:
            documents += 1
            h = hash_of(piece.text)
            low, high = min(low, h), max(high, h)
        if piece.last and own > max(LONG, fraction * size):
            long.append((documents - 1, own))
    if size == 0:
        raise DataError("there is no text in these files")
    return Survey(documents, size, low, high, tuple((i, n) for i, n in long if n > fraction * size))


def split_of(h: int, found: Survey, fraction: float) -> str:
    """val below `fraction` of all hashes; the lowest one in any case, the highest one never."""
    return "val" if h == found.low or (h != found.high and h < fraction * 2.0**64) else "train"


def assigned(pieces: Iterable[Piece], found: Survey, fraction: float) -> Iterator[tuple[str, Piece]]:
    """Every piece with its split. A single document, and a long one, is cut: its end, `fraction` of it, is val."""
    if found.documents > 1 and found.low == found.high:
        raise DataError(f"all {found.documents} documents are the same; none is left to validate with")
    cut = {0: found.bytes} if found.documents == 1 else dict(found.long)
    split, place, number = "train", 0, -1
    border: int | None = None
    for piece in pieces:
        if piece.first:
            number, place = number + 1, 0
            border = int(cut[number] * (1 - fraction)) if number in cut else None
        if border is None:
            split = split_of(hash_of(piece.text), found, fraction) if piece.first else split
            yield split, piece
            continue
        data = piece.text.encode("utf-8")
        head, tail = _cut(data, border - place)
        if head:
            # among others, what is cut off ends like a document
            ended = found.documents > 1 and place + len(data) >= border
            yield "train", Piece(head, piece.first, ended or (piece.last and not tail))
        if tail:
            yield "val", Piece(tail, place <= border, piece.last)
        place += len(data)


def _cut(data: bytes, at: int) -> tuple[str, str]:
    """UTF-8 in two, before the character that byte `at` is in."""
    at = min(max(at, 0), len(data))
    while at < len(data) and data[at] & 0xC0 == 0x80:
        at -= 1
    return data[:at].decode("utf-8"), data[at:].decode("utf-8")


def text_blocks(pieces: Iterable[tuple[str, Piece]], tokenizer: Tokenizer) -> Iterator[Block]:
    """Documents encoded, each begun with the tokenizer's prefix and ended by `<|endoftext|>` where it has them."""
    begin = np.array(tokenizer.prefix, np.uint32)
    end = np.array([] if tokenizer.eot_id is None else [tokenizer.eot_id], np.uint32)
    for group in grouped(pieces, lambda item: len(item[1].text)):
        encoded = tokenizer.encode_arrays([piece.text for _, piece in group])
        splits = sorted({name for name, _ in group})
        for split in splits:
            rows = [(p, ids) for (name, p), ids in zip(group, encoded, strict=True) if name == split]
            parts = [part for p, row in rows for part in (begin if p.first else begin[:0], row, end[: int(p.last)])]
            size = sum(len(p.text.encode("utf-8")) for p, _ in rows)
            done = len(group) if split == splits[-1] else 0
            yield Block(split, np.concatenate(parts), None, sum(p.first for p, _ in rows), size, done)


def chat_blocks(
    rows: Iterable[tuple[str, Messages]], tokenizer: Tokenizer, template: Template | None = None
) -> Iterator[Block]:
    """Conversations with their masks, as ChatML or by a template."""
    for group in grouped(rows, lambda item: sum(len(m["content"]) for m in item[1])):
        talks = [messages for _, messages in group]
        rendered = template.render(talks) if template else chat.render(tokenizer, talks)
        splits = sorted({name for name, _ in group})
        for split in splits:
            here = [i for i, (name, _) in enumerate(group) if name == split]
            size = sum(len(m["content"].encode("utf-8")) for i in here for m in group[i][1])
            ids, mask = (np.concatenate([rendered[i][part] for i in here]) for part in (0, 1))
            done = len(group) if split == splits[-1] else 0
            yield Block(split, ids, mask.astype(np.uint8), len(here), size, done)


def token_blocks(files: Sequence[Path], val_files: Sequence[Path], fraction: float, tok: Tokenizer) -> Iterator[Block]:
    """Tokens that are prepared already: the splits by the files' names, or else the end is val."""
    names = [(arrays.split_named(f), f) for f in files] + [("val", f) for f in val_files]
    parts = [(name, arrays.mapped(f, tok)) for name, f in names]
    if not {"train", "val"} <= {name for name, _ in parts}:
        total = sum(len(ids) for _, ids in parts)
        parts = [*_divided([ids for _, ids in parts], int(total * (1 - fraction)))]
    lengths = bytes_of(tok, tok.vocab_size)
    for name, ids in parts:
        for start in range(0, len(ids), TOKENS):
            block = np.asarray(ids[start : start + TOKENS])
            last = start + TOKENS >= len(ids) and (tok.eot_id is None or int(block[-1]) != tok.eot_id)
            ends = 0 if tok.eot_id is None else int(np.count_nonzero(block == tok.eot_id))
            size = int(lengths[block[(block >= 0) & (block < len(lengths))]].sum())
            yield Block(name or "train", block, None, ends + last, size)


def bytes_of(tokenizer: Tokenizer, vocab_size: int) -> NDArray[np.int64]:
    """How many bytes of text each id stands for, (vocab_size,): none where it is special, or nobody's."""
    special = set(tokenizer.special.values())
    lengths = [0 if i in special else len(data) for i, data in enumerate(tokenizer.table)]
    return np.array(lengths + [0] * (vocab_size - len(lengths)), np.int64)


def _divided(parts: Sequence[NDArray[Any]], border: int) -> Iterator[tuple[str, NDArray[Any]]]:
    for ids in parts:
        at = min(max(border, 0), len(ids))
        yield from ((name, part) for name, part in (("train", ids[:at]), ("val", ids[at:])) if len(part))
        border -= len(ids)


def grouped(items: Iterable[T], size_of: Any) -> Iterator[list[T]]:
    """Lists of items of about `CHARACTERS` together: enough to keep all threads busy, little enough for the memory."""
    group: list[T] = []
    size = 0
    for item in items:
        group.append(item)
        size += size_of(item)
        if size >= CHARACTERS or len(group) >= DOCUMENTS:
            yield group
            group, size = [], 0
    if group:
        yield group
