"""Texts and conversations out of files, streamed: documents come in pieces, so that no file need fit into memory."""

from __future__ import annotations

import codecs
import glob
import importlib
import json
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from fnlm.data.manifest import DataError
from fnlm.tokenizers import END_OF_TEXT

BLOCK = 1 << 20
PIECE = 1 << 16
TEXT, RECORDS, TOKENS = (".txt", ".md"), (".jsonl", ".json", ".parquet"), (".npy", ".bin")
SUFFIXES = (*TEXT, *RECORDS, *TOKENS)
NOT_DATA = ("tokenizer.json", "manifest.json")
# Where GPT-2's and cl100k's expressions always begin a new word, whatever follows: after a single line break, and
# before a single space.
_BREAK = re.compile(r"(?<=\S\n)(?=\S)|(?<=\S)(?= \S)")


class Piece(NamedTuple):
    """A part of a document: the first one, the last one, often both."""

    text: str
    first: bool = True
    last: bool = True


class Written(NamedTuple):
    """Text that functions write, the same at every call: documents, or of the kind "chat" conversations.

    A tokenizer is trained on `learnt_from`; all is about so many `bytes`; `sources` go into the manifest.
    """

    kind: str
    train: Callable[[], Iterator[Any]]
    val: Callable[[], Iterator[Any]]
    learnt_from: Callable[[], Iterator[str]]
    bytes: int
    sources: list[dict[str, Any]]


def find(paths: Sequence[str]) -> list[Path]:
    """The files that paths, folders (all below them) and globs name, sorted within each.

    Raises FileNotFoundError for a path that is not there, DataError for one of an unknown kind or with no files.
    """
    found: list[Path] = []
    for path in paths:
        if Path(path).is_dir():
            inside = sorted(p for p in Path(path).rglob("*") if p.suffix in SUFFIXES and p.is_file())
            files = [p for p in inside if p.name not in NOT_DATA and not _hidden(p.relative_to(path))]
            if not files:
                raise DataError(f"{path} has no file that ends in {', '.join(SUFFIXES)}")
        elif Path(path).exists():
            files = [Path(path)]
        else:
            files = [Path(p) for p in sorted(glob.glob(path, recursive=True)) if Path(p).is_file()]
            if not files:
                raise FileNotFoundError(2, "no such file, folder or pattern", str(path))
        found += [file for file in files if file not in found]
    for file in found:
        if file.suffix not in SUFFIXES:
            raise DataError(f"{file}: cannot read {file.suffix or 'it without a suffix'}; known: {', '.join(SUFFIXES)}")
        if file.stat().st_size == 0:
            raise DataError(f"{file} is empty")
    return found


def _hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def pieces(files: Sequence[Path]) -> Iterator[Piece]:
    """The documents of text files (parted by `<|endoftext|>`) and of records with a `text`, in order."""
    for file in files:
        if file.suffix in TEXT:
            yield from cut(decoded(file))
        else:
            for where, row in records(file):
                if not isinstance(row.get("text"), str):
                    raise DataError(f"{where} has no 'text' that is a string; it has {', '.join(row) or 'nothing'}")
                if row["text"]:
                    yield from _in_pieces(whole(row["text"]))


def decoded(file: Path) -> Iterator[str]:
    """A text file in blocks, without a byte order mark. Raises DataError, with the byte, where it is not UTF-8."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    offset = 0
    with file.open("rb") as stream:
        while True:
            block = stream.read(BLOCK)
            waiting = len(decoder.getstate()[0])
            try:
                text = decoder.decode(block, final=not block)
            except UnicodeDecodeError as error:
                at = offset - waiting + error.start
                raise DataError(f"{file}: byte {at} is not UTF-8 ({error.reason}); convert the file first") from error
            yield text.removeprefix("\ufeff") if offset == 0 else text
            if not block:
                return
            offset += len(block)


def cut(blocks: Iterator[str]) -> Iterator[Piece]:
    """Documents at each `<|endoftext|>` (line breaks around it are its own), and long ones in pieces."""
    waiting, first, parted = "", True, False
    for block in blocks:
        waiting += block
        *ended, waiting = waiting.split(END_OF_TEXT)
        for text in ended:
            yield from _piece(text.rstrip("\n"), first, True, parted)
            first = parted = True
        # More than a piece stays behind, so that a separator is never cut.
        while len(waiting) > 2 * PIECE:
            at = _place_to_cut(waiting)
            yield from _piece(waiting[:at], first, False, parted)
            waiting, first = waiting[at:], False
    yield from _piece(waiting.rstrip("\n") if parted else waiting, first, True, parted)


def _piece(text: str, first: bool, last: bool, parted: bool) -> Iterator[Piece]:
    text = text.lstrip("\n") if first and parted else text
    if text or not first:
        yield Piece(text, first, last)


def _in_pieces(text: str) -> Iterator[Piece]:
    """One document, whatever stands in it."""
    first = True
    while len(text) > 2 * PIECE:
        at = _place_to_cut(text)
        yield Piece(text[:at], first, False)
        text, first = text[at:], False
    yield Piece(text, first)


def _place_to_cut(text: str) -> int:
    """Near one piece's length, where tokens end in any case; else where words end; else there."""
    breaks = [found.start() for found in _BREAK.finditer(text, PIECE - PIECE // 16, PIECE)]
    space = text.rfind(" ", PIECE // 2, PIECE)
    return breaks[-1] if breaks else space if space > 0 else PIECE


def records(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The objects of a .jsonl, .json (a list) or .parquet file, each with where it stands, for messages."""
    if file.suffix == ".parquet":
        yield from _parquet(file)
        return
    rows = _json_list(file) if file.suffix == ".json" else _json_lines(file)
    for where, row in rows:
        if not isinstance(row, dict):
            raise DataError(f"{where} is not an object but {type(row).__name__}")
        yield where, row


def _json_lines(file: Path) -> Iterator[tuple[str, Any]]:
    offset = 0
    with file.open("rb") as stream:
        for number, line in enumerate(stream, 1):
            try:
                text = line.decode("utf-8").strip().removeprefix("\ufeff")
                if text:
                    yield f"{file}, line {number}", json.loads(text)
            except UnicodeDecodeError as error:
                at = offset + error.start
                raise DataError(f"{file}: byte {at} (line {number}) is not UTF-8 ({error.reason})") from error
            except json.JSONDecodeError as error:
                raise DataError(f"{file}, line {number} is not JSON: {error.msg} at column {error.colno}") from error
            except (ValueError, RecursionError) as error:  # numbers of thousands of digits, lists in lists in lists
                raise DataError(f"{file}, line {number} cannot be read: {error}") from error
            offset += len(line)


def _json_list(file: Path) -> Iterator[tuple[str, Any]]:
    try:
        rows = json.loads(file.read_bytes().decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{file} is not JSON: {error}") from error
    if not isinstance(rows, list):
        raise DataError(f"{file} is not a list of objects; one object a line is .jsonl")
    yield from ((f"{file}, item {i}", row) for i, row in enumerate(rows, 1))


def _parquet(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        parquet = importlib.import_module("pyarrow.parquet")
    except ImportError as error:
        remedy = "pip install 'fnlm[parquet]', or convert to .jsonl"
        raise DataError(f"{file}: reading .parquet needs pyarrow: {remedy}") from error
    number = 0
    try:
        for batch in parquet.ParquetFile(file).iter_batches(batch_size=256):
            for row in batch.to_pylist():
                number += 1
                yield f"{file}, row {number}", row
    except (ValueError, OSError) as error:  # pyarrow's own errors, and text that is not UTF-8
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(f"{file} is not a whole .parquet file: {reason} (after row {number})") from error


def whole(text: str) -> str:
    r"""Half of a surrogate pair, which JSON can write as \ud83d, is no character: it becomes U+FFFD."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text
