"""What every tokenizer is: a table from id to bytes, a way to encode, and a file that says both."""

from __future__ import annotations

import codecs
import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

END_OF_TEXT, IM_START, IM_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
CHAT_SPECIAL = (END_OF_TEXT, IM_START, IM_END)
"""The special tokens of ChatML, and the one that ends a document."""
ENDS = (END_OF_TEXT, "</s>", "<|end_of_text|>", "<eos>")
"""What tokenizers call the end of a document."""
FILE = "tokenizer.json"


class Tokenizer(ABC):
    """Text to ids and back. `table[id]` is the bytes of an id; special tokens are never parsed out of a text.

    `kind` is char, byte, bpe, gpt2 or cl100k; `special` maps the text of each special token to its id; `sha256` is of
    the file that `save` writes, and two tokenizers with the same one are the same. `prefix` are the ids that begin
    every text; `encode` leaves them out.
    """

    kind: str
    prefix: tuple[int, ...] = ()

    def __init__(self, table: Sequence[bytes], special: dict[str, int]) -> None:
        self.table = tuple(table)
        self.special = dict(special)

    @property
    def vocab_size(self) -> int:
        """One more than the largest id."""
        return len(self.table)

    @property
    def eot_id(self) -> int | None:
        """The id of `<|endoftext|>`, or of what stands in its place in other people's tokenizers; or None."""
        return next((self.special[token] for token in ENDS if token in self.special), None)

    @abstractmethod
    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of each text; in parallel where the library behind it can."""

    @property
    @abstractmethod
    def json(self) -> str:
        """The text of tokenizer.json."""

    def encode(self, text: str) -> list[int]:
        """The ids of one text. Special tokens written in it are ordinary text."""
        return self.encode_batch([text])[0]

    def encode_arrays(self, texts: Sequence[str]) -> list[NDArray[np.uint32]]:
        """As `encode_batch`, as arrays."""
        return [np.array(ids, np.uint32) for ids in self.encode_batch(texts)]

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The bytes of the ids, which need not be whole UTF-8. Raises ValueError for an id outside the vocabulary."""
        return b"".join(self._bytes_of(int(i)) for i in ids)

    def decode(self, ids: Iterable[int]) -> str:
        """The text of the ids; bytes that are not UTF-8 become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    @cached_property
    def sha256(self) -> str:
        """Of the file that `save` writes."""
        return hashlib.sha256(self.json.encode("utf-8")).hexdigest()

    def save(self, path: str | Path) -> Path:
        """Write tokenizer.json to this file, or into this folder; returns the file."""
        path = Path(path)
        path = path / FILE if path.is_dir() else path
        path.write_bytes(self.json.encode("utf-8"))
        return path

    def _bytes_of(self, i: int) -> bytes:
        if not 0 <= i < len(self.table):
            raise ValueError(f"id {i} is not in the vocabulary of {len(self.table)}; was the text made with another?")
        return self.table[i]


class StreamDecoder:
    """Ids one at a time to text that is whole at every moment: the first bytes of an unfinished character wait.

    What all `push` and the last `flush` return, joined, is what `decode` returns for all ids.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token: int) -> str:
        """The text that this id completes, often empty in the middle of a character."""
        return self._decoder.decode(self._tokenizer.decode_bytes([token]))

    def flush(self) -> str:
        """What still waited, as U+FFFD; the decoder is then as new."""
        rest = self._decoder.decode(b"", True)
        self._decoder.reset()
        return rest


def numbered(special: Sequence[str], start: int) -> dict[str, int]:
    """Consecutive ids for special tokens. Raises ValueError for an empty or repeated one."""
    if len(set(special)) != len(special) or "" in special:
        raise ValueError(f"the special tokens {list(special)} must be different and not empty")
    return {token: start + i for i, token in enumerate(special)}
