"""Documents that came before: the same text, or nearly the same by MinHash (Broder 1997).

What a step remembers is in a file, so that an interrupted cleaning goes on: `remembered` bytes of it count.
"""

from __future__ import annotations

import hashlib
import importlib
import os
import re
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

WORDS = 5
"""A shingle is so many words in a row (Lee et al. 2022, section 4.2)."""
_WORD = re.compile(r"\w+")


class Memory:
    """A file of records of one size, appended to. `size` bytes of it are known to be whole."""

    def __init__(self, file: Path, record: int, size: int = 0) -> None:
        self.record, self.size = record, size
        self._stream: BinaryIO = file.open("r+b" if file.exists() else "w+b")
        self._stream.truncate(size)

    def append(self, data: bytes) -> None:
        """Add a record."""
        self._stream.seek(self.size)
        self._stream.write(data)
        self.size += len(data)

    def read(self, number: int) -> bytes:
        """A record by its number."""
        self._stream.seek(number * self.record)
        return self._stream.read(self.record)

    def records(self) -> list[bytes]:
        """All of them."""
        return [self.read(i) for i in range(self.size // self.record)]

    def flush(self) -> None:
        """To disk, before the size is noted elsewhere."""
        self._stream.flush()
        os.fsync(self._stream.fileno())

    def close(self) -> None:
        """The file stays."""
        self._stream.close()


class Exact:
    """Whether the same text, white space at its ends aside, came before: 16 bytes of its hash are remembered."""

    RECORD = 16

    def __init__(self, memory: Memory) -> None:
        self.memory, self._seen = memory, set(memory.records())

    @staticmethod
    def measure(text: str) -> bytes:
        """The hash of a text."""
        return hashlib.blake2b(text.strip().encode("utf-8"), digest_size=16).digest()

    def is_new(self, digest: bytes) -> bool:
        """Remembers a hash; False where it was there."""
        if digest in self._seen:
            return False
        self._seen.add(digest)
        self.memory.append(digest)
        return True


class MinHash:
    """Whether a text is nearly the same as one before it: the Jaccard similarity of their shingles, by estimate.

    `permutations` minima are kept of each text (4 bytes each, in the file); texts that agree in a band of them are
    compared, and the estimate of their similarity decides. By the library `datasketch`; ValueError without it.
    """

    PERMUTATIONS, SEED, THRESHOLD = 128, 1, 0.8
    RECORD = 4 * PERMUTATIONS

    def __init__(self, memory: Memory, threshold: float = THRESHOLD) -> None:
        self.memory, self.threshold = memory, threshold
        self._index: Any = _datasketch().MinHashLSH(threshold=threshold, num_perm=self.PERMUTATIONS)
        for number, data in enumerate(memory.records()):
            self._index.insert(number, self._made(np.frombuffer(data, "<u4")))

    @classmethod
    def measure(cls, text: str) -> bytes:
        """The minima of a text's shingles, `RECORD` bytes. Case and punctuation do not count."""
        made = cls._made(None)
        made.update_batch([shingle.encode("utf-8") for shingle in shingles(text)])
        return made.hashvalues.astype("<u4").tobytes()  # type: ignore[no-any-return]

    @classmethod
    def _made(cls, values: NDArray[np.uint32] | None) -> Any:
        sketch, values = _datasketch(), None if values is None else values.astype(np.uint32)
        return sketch.MinHash(
            num_perm=cls.PERMUTATIONS, seed=cls.SEED, hashfunc=_hash32, hashvalues=values, scheme="affine32"
        )

    def is_new(self, signature: bytes) -> bool:
        """Remembers the minima of a text; False where one that is like it was there."""
        values = np.frombuffer(signature, "<u4")
        made = self._made(values)
        for number in self._index.query(made):
            if (np.frombuffer(self.memory.read(number), "<u4") == values).mean() >= self.threshold:
                return False
        self._index.insert(self.memory.size // self.RECORD, made)
        self.memory.append(signature)
        return True


def shingles(text: str) -> set[str]:
    """Every five words in a row, in lower case; of a shorter text all of them."""
    words = _WORD.findall(text.lower())
    return {" ".join(words[i : i + WORDS]) for i in range(max(1, len(words) - WORDS + 1))}


def _hash32(data: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(data, digest_size=4).digest(), "little")


def _datasketch() -> Any:
    try:
        return importlib.import_module("datasketch")
    except ImportError as error:
        raise ValueError("cleaning with minhash needs datasketch: pip install 'fnlm[clean]'") from error
