"""Any text as a split that `evaluate` takes, and its loss for each word and byte in place of each token.

A word is what whitespace parts (`str.split`), a byte one of the text in UTF-8.
"""

from __future__ import annotations

import codecs
import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from fnlm.data import DataError, Split
from fnlm.data.encode import grouped
from fnlm.data.inputs import kind_of
from fnlm.data.sources import TOKENS, Piece, find, pieces
from fnlm.generate import beginning
from fnlm.tokenizers import Tokenizer

BLOCK = 1 << 16


class Text(NamedTuple):
    """A split and the words of its text. The mask is 1 for the text's own tokens, 0 for what stands before it."""

    split: Split
    words: int


def read_text(paths: Sequence[str], tokenizer: Tokenizer) -> Text:
    """The documents of files and folders, as `fnlm prepare` reads them, in order.

    Before each stands what begins a text, so that its first token is predicted too; ends are not among the tokens.
    Raises DataError for files that cannot be read or encoded, FileNotFoundError for none.
    """
    files = find(paths)
    where = str(files[0]) if len(files) == 1 else ", ".join(paths)
    if any(file.suffix in TOKENS for file in files):
        raise DataError(f"{where} holds tokens; name the folder that 'fnlm prepare' makes of them")
    try:
        return text_of(pieces(files), tokenizer, where)
    except DataError as error:
        if kind_of(files) != "chat":
            raise
        raise DataError(f"{where} holds conversations; prepare them, with --tokenizer of the model") from error


def text_of(documents: Iterable[Piece], tokenizer: Tokenizer, where: str = "the text") -> Text:
    """Documents, each in one piece or several, as one row of tokens. DataError, naming `where`, for none."""
    begin = np.array(beginning(tokenizer), np.uint32)
    nothing = np.zeros(len(begin), np.uint8)
    ids, mask, words, size, count, inside = [np.zeros(0, np.uint32)], [np.zeros(0, np.uint8)], 0, 0, 0, False
    for group in grouped(documents, lambda piece: len(piece.text)):
        try:
            encoded = tokenizer.encode_arrays([piece.text for piece in group])
        except ValueError as error:
            raise DataError(f"{where}: {error}") from error
        for piece, own in zip(group, encoded, strict=True):
            ids += [begin, own] if piece.first else [own]
            counted = np.ones(len(own), np.uint8)
            mask += [nothing, counted] if piece.first else [counted]
            more, inside = _begun(piece.text, inside and not piece.first)
            words, size, count = words + more, size + len(piece.text.encode("utf-8")), count + piece.first
    if not size:
        raise DataError(f"there is no text in {where}")
    return Text(Split(np.concatenate(ids), np.concatenate(mask), count, size), words)


def words_of(split: Split, tokenizer: Tokenizer) -> int:
    """The words of prepared text, by decoding its tokens; special tokens part words."""
    special = set(tokenizer.special.values())
    table = [b"\n" if i in special else data for i, data in enumerate(tokenizer.table)]
    decoder, words, inside = codecs.getincrementaldecoder("utf-8")("replace"), 0, False
    for at in range(0, len(split.tokens), BLOCK):
        ids = split.tokens[at : at + BLOCK].tolist()
        more, inside = _begun(decoder.decode(b"".join(table[i] if i < len(table) else b"" for i in ids)), inside)
        words += more
    return words


def _begun(text: str, inside: bool) -> tuple[int, bool]:
    """How many words begin in a part of a text, and whether its end is inside of one; `inside`: its beginning is."""
    if not text:
        return 0, inside
    return len(text.split()) - (inside and not text[0].isspace()), not text[-1].isspace()


class Normalised(NamedTuple):
    """exp of the loss for each word and byte, and the latter in bits; None where their number is not known."""

    word_perplexity: float | None
    byte_perplexity: float | None
    bits_per_byte: float | None


def normalised(loss: float, tokens: int, words: int | None, size: int | None) -> Normalised:
    """The loss of `tokens` tokens (nats for each) shared among the words and bytes that they stand for.

    As lm-eval's word_perplexity, byte_perplexity and bits_per_byte, where the tokens are all of the text's.
    """
    by_word = _exp(loss * tokens / words) if words else None
    nats = loss * tokens / size if size else None
    return Normalised(by_word, None if nats is None else _exp(nats), None if nats is None else nats / math.log(2))


def _exp(nats: float) -> float:
    return math.exp(nats) if nats < 700 else math.inf if nats == nats else nats
