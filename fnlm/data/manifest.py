"""A folder of prepared data: its manifest, and opening and verifying it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fnlm import tokenizers
from fnlm.tokenizers import Tokenizer

FORMAT = 1
FILE = "manifest.json"
SPLITS = ("train", "val")
BLOCK = 1 << 22


class DataError(ValueError):
    """Data that cannot be used as they are; the message is one line with the file, the place and the remedy."""

    exit_code = 4


class Split(NamedTuple):
    """The tokens (n,) of a split as a read-only memory map, and 1 for each that is learnt as a target (n,) uint8.

    `bytes` is of the text, as UTF-8. Ids are checked against `vocab_size` where it is not None.
    """

    tokens: NDArray[Any]
    mask: NDArray[np.uint8] | None
    documents: int
    bytes: int
    vocab_size: int | None = None


class Dataset(NamedTuple):
    """A folder of prepared data."""

    folder: Path
    manifest: dict[str, Any]
    tokenizer: Tokenizer
    train: Split
    val: Split


def dtype_of(vocab_size: int) -> str:
    """How ids are stored: uint16, or uint32 for more than 65535 tokens."""
    return "uint16" if vocab_size <= 65535 else "uint32"


def read(folder: str | Path) -> dict[str, Any]:
    """The manifest of a folder. Raises DataError where there is none, or one of another format."""
    file = Path(folder) / FILE
    if not file.is_file():
        if Path(folder).is_file():
            raise DataError(f"{folder} is a file, not a prepared folder; 'fnlm prepare {folder}' makes one of it")
        state = "has no manifest.json" if Path(folder).is_dir() else "does not exist"
        raise DataError(f"{folder} {state}; make it with 'fnlm prepare PATH --out {folder}'")
    try:
        manifest: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        number = manifest["format"]
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{file} is not a manifest ({error}); prepare the data again") from error
    if number != FORMAT:
        raise DataError(f"{file} has format {number}, this version reads {FORMAT}; prepare the data again")
    return manifest


def open(folder: str | Path) -> Dataset:
    """The data of a folder, mapped into memory, and their tokenizer.

    Raises DataError for a missing or cut file, and for a tokenizer that is not the one the data were made with.
    """
    folder = Path(folder)
    manifest = read(folder)
    try:
        return _dataset(folder, manifest)
    except (KeyError, TypeError, AttributeError) as error:
        what = f"{type(error).__name__}: {error}"
        raise DataError(f"{folder / FILE} is damaged ({what}); prepare the data again") from error


def _dataset(folder: Path, manifest: dict[str, Any]) -> Dataset:
    try:
        tokenizer = tokenizers.load(folder)
    except FileNotFoundError as error:
        raise DataError(f"{folder}/{tokenizers.FILE} is missing; prepare the data again") from error
    except ValueError as error:
        raise DataError(f"{error}; prepare the data again") from error
    if tokenizer.sha256 != manifest["tokenizer"]["sha256"]:
        raise DataError(f"{folder}/tokenizer.json is not the tokenizer of these tokens (its sha256 differs)")
    if tokenizer.vocab_size > manifest["vocab_size"]:
        raise DataError(f"{folder}: vocab_size={manifest['vocab_size']}, its tokenizer has {tokenizer.vocab_size}")
    train, val = (_opened(folder, manifest, name) for name in SPLITS)
    return Dataset(folder, manifest, tokenizer, train, val)


def boundary(dataset: Dataset) -> tuple[int | None, int | None]:
    """What tells documents apart: the id that ends each, or, where every one has a prefix, the id that begins each.

    Raises DataError where there is neither.
    """
    manifest = dataset.manifest
    if manifest.get("prefix"):
        return None, int(manifest["prefix"][0])
    if manifest.get("eot_within"):
        raise DataError(
            f"{dataset.folder}: its chat template ends turns as documents end; train with documents=together"
        )
    if manifest["eot_id"] is None:
        raise DataError(
            f"{dataset.folder}: nothing stands between documents, as its tokenizer has no end of text; "
            "train with documents=together, or prepare the data with --special '<|endoftext|>'"
        )
    return int(manifest["eot_id"]), None


def require_same_tokenizer(dataset: Dataset, sha256: str, what: str) -> None:
    """Raises DataError unless the data were made with the tokenizer of this sha256, which is that of `what`."""
    own = str(dataset.manifest["tokenizer"]["sha256"])
    if own != sha256:
        raise DataError(
            f"{dataset.folder} was made with another tokenizer than {what} (sha256 {own[:8]}, not {sha256[:8]}); "
            f"prepare the data again with --tokenizer {what}"
        )


def _opened(folder: Path, manifest: dict[str, Any], name: str) -> Split:
    split = manifest["splits"][name]
    tokens = _mapped(folder / split["file"], np.dtype(manifest["dtype"]), split["tokens"])
    mask = _mapped(folder / split["mask"], np.dtype(np.uint8), split["tokens"]) if split["mask"] else None
    return Split(tokens, mask, split["documents"], split["bytes"], manifest["vocab_size"])


def _mapped(file: Path, dtype: np.dtype[Any], count: int) -> NDArray[Any]:
    """A raw or .npy file of `count` values, read-only."""
    if not file.is_file():
        raise DataError(f"{file} is missing; prepare the data again")
    if file.suffix == ".npy":
        array = _npy(file)
        found, same = len(array), array.dtype == dtype
    else:
        little = dtype.newbyteorder("<")
        found, same = file.stat().st_size // dtype.itemsize, not file.stat().st_size % dtype.itemsize
        # An empty file cannot be mapped.
        array = np.memmap(file, little, "r") if found == count and count else np.zeros(0, dtype)
    if found != count or not same:
        raise DataError(f"{file} has {found} {array.dtype} values, manifest.json says {count}; prepare the data again")
    return array


def _npy(file: Path) -> NDArray[Any]:
    try:
        array: NDArray[Any] = np.load(file, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise DataError(f"{file} is damaged: {error}; prepare the data again") from error
    return array


def verify(folder: str | Path) -> Iterator[str]:
    """Read everything and compare it with the manifest; yields a line for each file that is well.

    Raises DataError at the first file that is not: another sha256, an id outside the vocabulary, a mask that is not 0
    or 1, another number of documents.
    """
    data = open(folder)
    yield f"tokenizer.json: {data.tokenizer.kind}, {data.tokenizer.vocab_size} tokens, sha256 as in the manifest"
    for name, split in zip(SPLITS, (data.train, data.val), strict=True):
        entry = data.manifest["splits"][name]
        for file, digest in ((entry["file"], entry["sha256"]), (entry["mask"], entry.get("mask_sha256"))):
            if file and sha256_of(data.folder / file) != digest:
                raise DataError(f"{data.folder / file} was changed: its sha256 differs; prepare the data again")
        _check_ids(data, name, split)
        yield f"{entry['file']}: {len(split.tokens)} tokens in {split.documents} documents, sha256 as in the manifest"
        if split.mask is not None:
            yield f"{entry['mask']}: {_learnt(data, name, split)} tokens learnt, sha256 as in the manifest"


def _check_ids(data: Dataset, name: str, split: Split) -> None:
    ends = 0
    for start in range(0, len(split.tokens), BLOCK):
        block = split.tokens[start : start + BLOCK]
        wrong = np.flatnonzero(block >= data.manifest["vocab_size"])
        if wrong.size:
            at = start + int(wrong[0])
            raise DataError(f"{name}: token {at} is {block[wrong[0]]}, vocab_size is {data.manifest['vocab_size']}")
        ends += int(np.count_nonzero(block == data.manifest["eot_id"]))
    # The last document of a split may go on in the other.
    if data.manifest.get("eot_within"):
        return
    if data.manifest["eot_id"] is not None and not ends <= split.documents <= ends + 1:
        raise DataError(f"{name}: {ends} documents end here, manifest.json says {split.documents}")


def _learnt(data: Dataset, name: str, split: Split) -> int:
    assert split.mask is not None
    if len(split.mask) and split.mask.max() > 1:
        raise DataError(f"{name}: the mask holds {split.mask.max()}; 0 and 1 are meant")
    return int(np.count_nonzero(split.mask))


def sha256_of(file: Path) -> str:
    """The hex digest of a file, read in blocks."""
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(BLOCK):
            digest.update(block)
    return digest.hexdigest()
