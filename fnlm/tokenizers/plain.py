"""Tokenizers without merges: one id for each character of a text, or for each byte."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fnlm.tokenizers.base import CHAT_SPECIAL, Tokenizer, numbered

CODE_POINTS = 0x110000


class Char(Tokenizer):
    """One id for each character, in the order of their code points; special tokens after them."""

    kind = "char"

    def __init__(self, characters: Sequence[str], special: Sequence[str] = ()) -> None:
        self.characters = "".join(characters)
        ids = numbered(special, len(self.characters))
        super().__init__([c.encode("utf-8") for c in [*self.characters, *special]], ids)
        self._ids = np.full(CODE_POINTS, -1, np.int32)
        self._ids[_code_points(self.characters)] = np.arange(len(self.characters), dtype=np.int32)

    def encode_arrays(self, texts: Sequence[str]) -> list[NDArray[np.uint32]]:
        """Raises ValueError for a character that the vocabulary does not have."""
        return [self._looked_up(text) for text in texts]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """As `encode_arrays`, with the same errors."""
        return [ids.tolist() for ids in self.encode_arrays(texts)]

    def _looked_up(self, text: str) -> NDArray[np.uint32]:
        ids = self._ids[_code_points(text)]
        unknown = np.flatnonzero(ids < 0)
        if unknown.size:
            at = int(unknown[0])
            raise ValueError(
                f"character {text[at]!r} (U+{ord(text[at]):04X}) at position {at} is not among the "
                f"{len(self.characters)} of this tokenizer; choose 'byte' or 'bpe' for any text"
            )
        return ids.astype(np.uint32)

    @property
    def json(self) -> str:
        return _described(self, characters=self.characters)


class Byte(Tokenizer):
    """One id for each of the 256 bytes of UTF-8; special tokens after them."""

    kind = "byte"

    def __init__(self, special: Sequence[str] = CHAT_SPECIAL) -> None:
        table = [bytes([b]) for b in range(256)] + [token.encode("utf-8") for token in special]
        super().__init__(table, numbered(special, 256))

    def encode_arrays(self, texts: Sequence[str]) -> list[NDArray[np.uint32]]:
        """Any text at all."""
        return [np.frombuffer(text.encode("utf-8"), np.uint8).astype(np.uint32) for text in texts]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Any text at all."""
        return [list(text.encode("utf-8")) for text in texts]

    @property
    def json(self) -> str:
        return _described(self)


def characters_of(texts: Iterable[str]) -> list[str]:
    """The different characters of all texts, sorted by code point. Raises ValueError where there is none."""
    seen = np.zeros(CODE_POINTS, bool)
    for text in texts:
        seen[_code_points(text)] = True
    if not seen.any():
        raise ValueError("there is no text to take characters from")
    return [chr(c) for c in np.flatnonzero(seen)]


def from_description(spec: dict[str, Any]) -> Char | Byte:
    """The tokenizer that a file of ours describes; ValueError for a file that does not."""
    special = [token for token, _ in sorted(spec.get("special", {}).items(), key=lambda item: int(item[1]))]
    if spec.get("kind") == "byte":
        return Byte(special)
    if spec.get("kind") == "char" and isinstance(spec.get("characters"), str):
        return Char(spec["characters"], special)
    raise ValueError(f"a tokenizer of kind {spec.get('kind')!r} is neither char nor byte")


def _described(tokenizer: Tokenizer, **more: Any) -> str:
    spec = {"fnlm": 1, "kind": tokenizer.kind, "special": tokenizer.special, **more}
    return json.dumps(spec, ensure_ascii=False, indent=1)


def _code_points(text: str) -> NDArray[np.uint32]:
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)
