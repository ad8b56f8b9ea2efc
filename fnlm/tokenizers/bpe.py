"""Byte pair encoding (Sennrich et al. 2016; Radford et al. 2019), by the `tokenizers` library.

Byte-level as GPT-2's; SentencePiece's as well (Kudo & Richardson 2018), where what is not in the vocabulary falls back
on bytes: Llama 2's kind.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Any

from tokenizers import Tokenizer as Library
from tokenizers import decoders, models, pre_tokenizers, trainers

from fnlm.tokenizers.base import CHAT_SPECIAL, Tokenizer
from fnlm.tokenizers.byte_level import to_bytes

TOGETHER, PART = 256, 1 << 13
"""Texts that training takes at once, and their characters. The library holds 256 of them, and the time it takes for a
word grows with the square of its length."""


class BPE(Tokenizer):
    """A tokenizer.json, ours or another tool's. Any text can be encoded and comes back whole.

    SentencePiece's puts a space in front of a text, which comes back too.
    """

    kind = "bpe"

    def __init__(self, text: str) -> None:
        """`text` is that of the file. Raises ValueError for a tokenizer of another kind."""
        spec = json.loads(text)
        super().__init__(*tables(spec))
        self.prefix = _prefix(spec.get("post_processor") or {})
        self._json = text
        self._library = Library.from_str(text)
        self._library.encode_special_tokens = True  # "<|endoftext|>" in a text is text
        self._library.no_truncation()
        self._library.no_padding()

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """On all threads."""
        return [e.ids for e in self._library.encode_batch_fast(list(texts), add_special_tokens=False)]

    @property
    def json(self) -> str:
        return self._json


def train_bpe(texts: Iterable[str], vocab_size: int, special: Sequence[str] = CHAT_SPECIAL) -> BPE:
    """Learn merges until there are `vocab_size` tokens, the 256 bytes and the special tokens (ids 0, 1, ...) included.

    A small corpus may have fewer merges to offer. Memory: the different words of all texts. ValueError below 256 tokens
    and the special ones.
    """
    if vocab_size < 256 + len(special):
        raise ValueError(f"vocab_size={vocab_size} has no room for 256 bytes and {len(special)} special tokens")
    library = Library(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(special),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    library.train_from_iterator(_grouped(texts), trainer)
    return BPE(library.to_str())


def tables(spec: dict[str, Any]) -> tuple[list[bytes], dict[str, int]]:
    """The bytes of every id of a tokenizer.json, and its special tokens; b"" for an id that nothing has.

    Raises ValueError for another kind of tokenizer.
    """
    model, decoder = spec["model"], json.dumps(spec.get("decoder"))
    level, pieces = '"ByteLevel"' in decoder, '"ByteFallback"' in decoder and model.get("byte_fallback")
    if model.get("type", "BPE") != "BPE" or not (level or pieces):
        raise ValueError(f"this tokenizer.json is {model.get('type')}, and not byte-level; other kinds are not read")
    bytes_of = to_bytes if level else _piece
    added = {t["content"]: int(t["id"]) for t in spec.get("added_tokens", [])}
    vocabulary = model["vocab"]
    table = [b""] * (1 + max([*vocabulary.values(), *added.values()]))
    for token, i in vocabulary.items():
        if token not in added:
            table[i] = bytes_of(token)
    for token, i in added.items():
        table[i] = token.encode("utf-8")
    return table, {t["content"]: int(t["id"]) for t in spec.get("added_tokens", []) if t.get("special", True)}


def _piece(token: str) -> bytes:
    """What a piece of SentencePiece's stands for: <0x0A> a byte, U+2581 a space."""
    if len(token) == 6 and token.startswith("<0x"):
        return bytes([int(token[3:5], 16)])
    return token.replace("\u2581", " ").encode("utf-8")


def _prefix(after: dict[str, Any]) -> tuple[int, ...]:
    """The ids that a post-processor puts in front of a text."""
    found: list[int] = []
    for part in (after, *after.get("processors", ())):
        for one in part.get("single", ()) if part.get("type") == "TemplateProcessing" else ():
            if "SpecialToken" not in one:
                break
            found += part["special_tokens"][one["SpecialToken"]["id"]]["ids"]
    return tuple(found)


def with_special(spec: dict[str, Any], special: dict[str, int]) -> str:
    """The text of a tokenizer.json to which these special tokens were added."""
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    known = {t["content"] for t in spec["added_tokens"]}
    more = [{"id": i, "content": token, **flags} for token, i in special.items() if token not in known]
    added = sorted([*spec["added_tokens"], *more], key=lambda t: int(t["id"]))
    return json.dumps(spec | {"added_tokens": added}, ensure_ascii=False)


def _grouped(texts: Iterable[str]) -> Iterator[list[str]]:
    """Lists of texts: the library counts the words of one list on all threads."""
    parts = (part for text in texts for part in _parts(text))
    while group := list(islice(parts, TOGETHER)):
        yield group


def _parts(text: str) -> Iterator[str]:
    """A text cut before spaces, where it has some."""
    start = 0
    while len(text) - start > PART:
        space = text.rfind(" ", start + PART // 2, start + PART)
        end = space if space > 0 else start + PART
        yield text[start:end]
        start = end
    yield text[start:]
