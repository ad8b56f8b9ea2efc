"""The tokenizer of a preparation: named, loaded, or trained on the very texts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path

from fnlm import tokenizers
from fnlm.data import chat
from fnlm.data.manifest import DataError, dtype_of
from fnlm.data.sources import pieces
from fnlm.tokenizers import CHAT_SPECIAL, Tokenizer

SAMPLE = 1 << 30
"""Characters of text that a BPE tokenizer is trained on, at most."""
LARGEST = 1 << 22
"""Of a vocabulary: the library that trains it makes room for all of it at once, and ends the process without."""


def check(wanted: str) -> None:
    """Raises ValueError, before anything is read, for a tokenizer that nothing can come of."""
    name, _, rest = wanted.partition(":")
    if name == "bpe":
        _size(rest)
    elif name not in tokenizers.NAMES and not Path(wanted).exists():
        if Path(wanted).suffix or Path(wanted).name != wanted:
            raise ValueError(f"there is no {wanted}; give the path of a tokenizer.json, of prepared data or of a run")
        tokenizers.named(wanted)  # says what is meant


def make_tokenizer(
    wanted: str,
    more: Sequence[str],
    kind: str,
    texts: Iterable[str],
    val_texts: Iterable[str],
    say: Callable[[str], None],
) -> Tokenizer:
    """The tokenizer that `wanted` names, trained on the texts where it needs to be, with `more` special tokens.

    For chat, ChatML's are added, except to a tokenizer.json: a model may know it already. Raises ValueError for an
    unknown name, with the nearest.
    """
    name, _, rest = wanted.partition(":")
    special = tuple(dict.fromkeys((*(CHAT_SPECIAL if kind == "chat" else ()), *more)))
    if name in ("char", "bpe") and kind == "tokens":
        raise ValueError("tokens have a tokenizer already; give --tokenizer gpt2, or the path of its tokenizer.json")
    if name == "char":
        return tokenizers.train("char", chain(texts, val_texts), special=special)
    if name == "bpe":
        size = _size(rest)
        say(f"training a tokenizer of {size:,} tokens")
        both = tuple(dict.fromkeys((*CHAT_SPECIAL, *special)))
        made = tokenizers.train("bpe", _sample(texts), size, both)
        if made.vocab_size < size:
            say(f"the text has no more pairs to merge: {made.vocab_size:,} tokens instead of {size:,}")
        return made
    if name in tokenizers.NAMES:
        return tokenizers.extended(tokenizers.named(name, rest or None), special)
    return tokenizers.extended(tokenizers.load(wanted), more)


def _size(text: str) -> int:
    if not text.isdecimal():
        raise ValueError(f"bpe:{text} has no size; write bpe:16000 for a vocabulary of 16,000")
    if int(text) > LARGEST:
        raise ValueError(f"bpe:{text} is more than the {LARGEST:,} tokens that can be trained; choose fewer")
    return int(text)


def learnt_from(kind: str, files: list[Path]) -> Iterator[str]:
    """The texts of files, or what is said in their conversations."""
    if kind == "chat":
        contents = (m["content"] for messages in chat.conversations(files) for m in messages)
        return chain((role + "\n" for role in chat.ROLES), contents)
    return (piece.text for piece in pieces(files))


def _sample(texts: Iterable[str]) -> Iterator[str]:
    size = 0
    for text in texts:
        yield text
        size += len(text)
        if size >= SAMPLE:
            return


def dtype_for(tokenizer: Tokenizer, wanted: str | None) -> str:
    """How the ids are stored: as asked for, or as small as they fit. Raises DataError where they do not fit."""
    needed = dtype_of(tokenizer.vocab_size)
    if wanted == "uint16" and needed != wanted:
        raise DataError(f"a vocabulary of {tokenizer.vocab_size} does not fit into uint16 (65535); leave --dtype out")
    return wanted or needed
