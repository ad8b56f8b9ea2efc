"""Documents of any sources, cleaned, in one local file for each split; taken up where it was interrupted.

After each group of documents the file and what the cleaning remembers are on disk; then one line of JSON says how much
of them counts, and where in the source it goes on.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from fnlm.cleaning import Cleaner, steps_of
from fnlm.data.encode import grouped
from fnlm.data.manifest import DataError
from fnlm.data.streams import Row, Stream, is_from

BETWEEN = "\x1e"
"""Stands between the messages of a conversation while it is cleaned: white space, which no text has."""


class Wanted(NamedTuple):
    """What is done to documents: cleaning steps in order; those of these hosts; so many of a source; processes."""

    clean: tuple[str, ...] = ()
    domains: tuple[str, ...] = ()
    documents: int | None = None
    workers: int = 1


def gather(
    folder: Path,
    split: str,
    streams: Sequence[Stream],
    wanted: Wanted,
    say: Callable[[str], None],
    progress: Callable[[int, int], None],
) -> tuple[Path, dict[str, Any]]:
    """All documents of the streams as `documents.SPLIT.jsonl`, and what each step of cleaning did.

    Raises DataError where nothing is left, SourceLost where a source cannot be read; then calling it again goes on.
    """
    file, journal = folder / f"documents.{split}.jsonl", Journal(folder / f"gathered.{split}.json")
    at = journal.read()
    seen = folder / f"seen.{split}"
    seen.mkdir(exist_ok=True)
    steps = steps_of(wanted.clean, seen, at["memory"])
    with Cleaner(steps, wanted.workers, at["counts"]) as cleaner, file.open("r+b" if file.exists() else "w+b") as out:
        out.truncate(at["bytes"])
        out.seek(at["bytes"])
        while at["source"] < len(streams):
            stream = streams[at["source"]]
            for rows in grouped(_rows(stream, wanted, at), _length):
                kept = _cleaned(rows, cleaner)
                _written(out, kept)
                at |= {"taken": at["taken"] + len(rows), "kept": at["kept"] + len(kept), "bytes": out.tell()}
                journal.write(at | {"state": stream.state(), "memory": cleaner.sizes(), "counts": cleaner.counts})
                progress(at["bytes"], 0)
            say(f"{stream.name}: {at['taken'] - at['before']:,} documents")
            at |= {"source": at["source"] + 1, "state": None, "before": at["taken"], "memory": cleaner.sizes()}
            journal.write(at | {"counts": cleaner.counts})
        if at["kept"] == 0:
            raise DataError(_nothing(streams, at["taken"], cleaner.counts))
        return file, cleaner.counts


class Journal:
    """How far it has come, in a file that is replaced as a whole."""

    def __init__(self, file: Path) -> None:
        self._file = file

    def read(self) -> dict[str, Any]:
        """What was written last; a fresh start without it."""
        fresh = dict.fromkeys(("source", "taken", "before", "kept", "bytes"), 0)
        found: dict[str, Any] = {**fresh, "state": None, "memory": {}, "counts": None}
        return found | (json.loads(self._file.read_text(encoding="utf-8")) if self._file.exists() else {})

    def write(self, at: dict[str, Any]) -> None:
        """Replace what it says."""
        replace(self._file, at)


def replace(file: Path, content: Any) -> None:
    """Write JSON so that the file has either what it had or all of this."""
    new = file.with_suffix(".new")
    with new.open("w", encoding="utf-8") as stream:
        json.dump(content, stream)
        stream.flush()
        os.fsync(stream.fileno())
    new.replace(file)


def _rows(stream: Stream, wanted: Wanted, at: dict[str, Any]) -> Iterator[Row]:
    """Those of the hosts that are wanted, as many as are wanted."""
    left = None if wanted.documents is None else min(wanted.documents - (at["taken"] - at["before"]), sys.maxsize)
    rows = stream.rows(at["state"])
    if wanted.domains:
        rows = (row for row in rows if is_from(row, wanted.domains))
    return islice(({k: v for k, v in row.items() if k != "url"} for row in rows), left)


def _length(row: Row) -> int:
    return len(row["text"]) if "text" in row else sum(len(m["content"]) for m in row["messages"])


def _cleaned(rows: list[Row], cleaner: Cleaner) -> list[Row]:
    """The rows that are kept, as changed."""
    if not cleaner.steps:
        return rows
    kept = cleaner.clean([_text(row) for row in rows])
    return [_with(row, text) for row, text in zip(rows, kept, strict=True) if text is not None]


def _text(row: Row) -> str:
    if "text" in row:
        return str(row["text"])
    return BETWEEN.join(m["content"].replace(BETWEEN, " ") for m in row["messages"])


def _with(row: Row, text: str) -> Row:
    if "text" in row:
        return {"text": text}
    said = zip(row["messages"], text.split(BETWEEN), strict=True)
    return {"messages": [{"role": m["role"], "content": content} for m, content in said]}


def _written(out: BinaryIO, rows: list[Row]) -> None:
    for row in rows:
        out.write(json.dumps(row, ensure_ascii=False).encode("utf-8") + b"\n")
    out.flush()
    os.fsync(out.fileno())


def _nothing(streams: Sequence[Stream], taken: int, counts: dict[str, Any]) -> str:
    names = ", ".join(stream.name for stream in streams)
    removed = ", ".join(f"{name} {count['removed']:,}" for name, count in counts.items() if count.get("removed"))
    if not taken:
        return f"{names}: there is no document in it"
    return f"{names}: cleaning left none of {taken:,} documents (removed: {removed or 'none'})"
