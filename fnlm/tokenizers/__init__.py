"""Tokenizers: characters, bytes, trained byte pair encoding, GPT-2's and cl100k; one file each to save and load."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from functools import lru_cache
from pathlib import Path

from fnlm.config import did_you_mean
from fnlm.tokenizers.base import CHAT_SPECIAL, END_OF_TEXT, FILE, IM_END, IM_START, StreamDecoder, Tokenizer
from fnlm.tokenizers.bpe import BPE, tables, train_bpe, with_special
from fnlm.tokenizers.plain import Byte, Char, characters_of, from_description
from fnlm.tokenizers.pretrained import FILES, Pretrained, from_table, kind_of, pretrained

NAMES = ("char", "byte", "bpe", "gpt2", "cl100k")


def named(name: str, files: str | Path | None = None, special: Sequence[str] | None = None) -> Tokenizer:
    """`byte`, `gpt2` or `cl100k`, which need no training.

    `files` is the folder or file with tiktoken's data (without it, tiktoken's cache or the network); `special` replaces
    byte's special tokens and follows behind those of the others. Raises ValueError for another name, with the nearest.
    """
    if name == "byte":
        return Byte(CHAT_SPECIAL if special is None else special)
    if name in FILES:
        return pretrained(name, files, special or ())
    if name in ("char", "bpe"):
        raise ValueError(f"a {name} tokenizer is made from texts: tokenizers.train({name!r}, texts)")
    raise ValueError(f"there is no tokenizer {name!r}{did_you_mean(name, NAMES)}")


def train(
    kind: str, texts: Iterable[str], vocab_size: int | None = None, special: Sequence[str] | None = None
) -> Tokenizer:
    """A `char` or `bpe` tokenizer of these texts; bpe needs `vocab_size`, and ChatML's special tokens are its default.

    Raises ValueError for another kind, and for a `vocab_size` that is missing or too small.
    """
    if kind == "char":
        return Char(characters_of(texts), special or ())
    if kind == "bpe":
        if vocab_size is None:
            raise ValueError("how many tokens? give vocab_size, for example 16000")
        return train_bpe(texts, vocab_size, CHAT_SPECIAL if special is None else special)
    raise ValueError(f"a tokenizer of kind {kind!r} is not trained; choose 'char' or 'bpe'")


def load(path: str | Path) -> Tokenizer:
    """The tokenizer of a tokenizer.json, or of the folder that has one; also tiktoken's own files.

    Raises ValueError for a file that is none, FileNotFoundError where nothing is.
    """
    path = Path(path)
    file = path / FILE if path.is_dir() else path
    if file.suffix in (".tiktoken", ".bpe"):
        return pretrained("gpt2" if file.suffix == ".bpe" else "cl100k", file)
    try:
        return loads(file.read_bytes().decode("utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} is not a tokenizer.json: it is not JSON ({error})") from error
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{file} is not a tokenizer.json: {type(error).__name__} {error}") from error
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error


@lru_cache(4)
def loads(text: str) -> Tokenizer:
    """As `load`, from the text of a tokenizer.json; the same one again where it was asked for lately."""
    spec = json.loads(text)
    if "fnlm" in spec:
        return from_description(spec)
    if "model" not in spec:
        raise ValueError("this is not the JSON of a tokenizer")
    table, special = tables(spec)
    kind = kind_of(spec, table)
    return BPE(text) if kind is None else from_table(kind, table, special, text)


def extended(tokenizer: Tokenizer, special: Sequence[str]) -> Tokenizer:
    """The same tokenizer with these special tokens behind its own; itself where it has them all."""
    more = [token for token in special if token not in tokenizer.special]
    if not more:
        return tokenizer
    ids = {token: tokenizer.vocab_size + i for i, token in enumerate(more)}
    if isinstance(tokenizer, (Char, Byte)):
        kept = [*tokenizer.special, *more]
        return Byte(kept) if isinstance(tokenizer, Byte) else Char(tokenizer.characters, kept)
    return loads(with_special(json.loads(tokenizer.json), ids))


__all__ = [
    "BPE",
    "CHAT_SPECIAL",
    "END_OF_TEXT",
    "FILE",
    "IM_END",
    "IM_START",
    "NAMES",
    "Byte",
    "Char",
    "Pretrained",
    "StreamDecoder",
    "Tokenizer",
    "extended",
    "load",
    "loads",
    "named",
    "train",
]
