"""A split on its way to disk: ids and masks appended to files, checked and counted."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from fnlm.data.manifest import DataError, sha256_of


class Sink:
    """Writes `NAME.bin` (or `.npy`) and, for chat, `NAME.mask`.

    `counts` is what `commit` returned before an interruption: what was written after it is cut off.
    """

    def __init__(
        self,
        folder: Path,
        name: str,
        dtype: str,
        vocab_size: int,
        masked: bool,
        npy: bool = False,
        counts: dict[str, int] | None = None,
    ) -> None:
        self.name, self.vocab_size, self.npy = name, vocab_size, npy
        self.dtype = np.dtype(dtype).newbyteorder("<")
        self.file = folder / f"{name}.{'npy' if npy else 'bin'}"
        self.mask_file = folder / f"{name}.mask" if masked else None
        self.tokens = self.documents = self.bytes = self.learnt = 0
        self._stream = _opened(self.file)
        self._mask_stream = _opened(self.mask_file) if self.mask_file else None
        self._header()
        self._go_on(counts or {})

    def _go_on(self, counts: dict[str, int]) -> None:
        """The counts of a commit, and the files as they were then."""
        for name, count in counts.items():
            setattr(self, name, count)
        self._stream.seek(self.tokens * self.dtype.itemsize, os.SEEK_CUR)
        self._stream.truncate()
        if self._mask_stream is not None:
            self._mask_stream.seek(self.tokens)
            self._mask_stream.truncate()

    def commit(self) -> dict[str, int]:
        """What is written, brought to disk."""
        for stream in (self._stream, self._mask_stream):
            if stream is not None:
                stream.flush()
                os.fsync(stream.fileno())
        return {name: getattr(self, name) for name in ("tokens", "documents", "bytes", "learnt")}

    def _header(self) -> None:
        """An .npy header has room for any count: it is written again at the end."""
        if self.npy:
            shape = {"shape": (self.tokens,), "fortran_order": False, "descr": self.dtype.str}
            np.lib.format.write_array_header_1_0(self._stream, shape)

    def write(self, ids: NDArray[Any], mask: NDArray[np.uint8] | None = None) -> None:
        """Append ids. Raises DataError for one outside the vocabulary."""
        if ids.size and (int(ids.max()) >= self.vocab_size or int(ids.min()) < 0):
            wrong = ids[(ids >= self.vocab_size) | (ids < 0)][0]
            raise DataError(f"{self.name}: id {wrong} is not in the tokenizer's {self.vocab_size}; is it another's?")
        self._stream.write(ids.astype(self.dtype).tobytes())
        self.tokens += len(ids)
        if self._mask_stream is not None:
            assert mask is not None
            assert len(mask) == len(ids)
            self._mask_stream.write(mask.tobytes())
            self.learnt += int(np.count_nonzero(mask))

    def close(self) -> dict[str, Any]:
        """Flush to disk, and the entry for the manifest. Raises DataError for a split with nothing to learn."""
        if self.npy:
            start = self._stream.tell() - self.tokens * self.dtype.itemsize
            self._stream.seek(0)
            self._header()
            assert self._stream.tell() == start, "the header grew"
        for stream in (self._stream, self._mask_stream):
            if stream is not None:
                _finished(stream)
        self._refuse_nothing_to_learn()
        return {
            "tokens": self.tokens,
            "documents": self.documents,
            "bytes": self.bytes,
            "sha256": sha256_of(self.file),
            "file": self.file.name,
            "mask": self.mask_file and self.mask_file.name,
            **({"learnt": self.learnt, "mask_sha256": sha256_of(self.mask_file)} if self.mask_file else {}),
        }

    def abandon(self) -> None:
        """Close the files of a preparation that failed."""
        self._stream.close()
        if self._mask_stream is not None:
            self._mask_stream.close()

    def _refuse_nothing_to_learn(self) -> None:
        if self.tokens == 0:
            raise DataError(f"the {self.name} split is empty; give more text, or another --val-fraction")
        if self.mask_file and self.learnt in (0, self.tokens):
            share = 100 * self.learnt // self.tokens
            raise DataError(f"{share} % of the {self.name} split would be learnt; are there assistant messages?")


def _opened(file: Path) -> BinaryIO:
    return file.open("r+b" if file.exists() else "w+b")


def _finished(stream: BinaryIO) -> None:
    stream.flush()
    os.fsync(stream.fileno())
    stream.close()
