"""Sources as streams of rows that can be left at any row and taken up there: local files, the hub, files on the web."""

from __future__ import annotations

import hashlib
import importlib
import json
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from http.client import HTTPException
from itertools import islice
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlsplit

from fnlm.data import chat
from fnlm.data.corpora import Hub, label
from fnlm.data.manifest import DataError
from fnlm.data.sources import RECORDS, TEXT, Piece, pieces, whole

BLOCK = 1 << 20
LARGEST = 1 << 28
"""Characters of a document that is held whole, at most."""
Row = dict[str, Any]


class SourceLost(ValueError):
    """A source that cannot be reached (any more). What was read of it is kept: the same command goes on."""

    exit_code = 1


class Stream(Protocol):
    """Rows, {"text": ...} or {"messages": ...}, and where they have come to, as something JSON can write."""

    name: str

    def rows(self, state: Any) -> Iterator[Row]: ...

    def state(self) -> Any: ...


class LocalStream:
    """The documents or conversations of a file. Going on reads it again up to there."""

    def __init__(self, file: Path, kind: str) -> None:
        self.name, self._file, self._kind, self._done = file.as_posix(), file, kind, 0

    def rows(self, state: Any) -> Iterator[Row]:
        self._done = int(state or 0)
        for row in islice(self._all(), self._done, None):
            self._done += 1
            yield row

    def _all(self) -> Iterator[Row]:
        if self._kind == "chat":
            return ({"messages": messages} for messages in chat.conversations([self._file]))
        return ({"text": text} for text in joined(pieces([self._file]), self.name))

    def state(self) -> Any:
        return self._done


def joined(parts: Iterator[Piece], name: str) -> Iterator[str]:
    """Whole documents of pieces. Raises DataError for one that is too long to be held."""
    found: list[str] = []
    size = 0
    for part in parts:
        found.append(part.text)
        size = len(part.text) + (0 if part.first else size)
        if size > LARGEST:
            raise DataError(f"{name}: a document of more than {LARGEST:,} characters; part it by <|endoftext|>")
        if part.last:
            yield "".join(found)
            found = []


class HubStream:
    """A dataset on the hub, streamed by the library `datasets`, which can go on in the middle of a file."""

    def __init__(self, source: Hub) -> None:
        self.name, self._source = label(source), source
        self._data: Any = None

    def rows(self, state: Any) -> Iterator[Row]:
        rows = self._opened(state)
        number = 0
        while (row := self._kept_up(lambda: next(rows, None))) is not None:
            number += 1
            yield normal(f"{self.name}, row {number}", row, self._source.column)

    def _opened(self, state: Any) -> Iterator[Row]:
        library, source = _datasets(), self._source

        def opened() -> Iterator[Row]:
            self._data = library.load_dataset(
                source.path, source.config, split=source.split, revision=source.revision, streaming=True
            )
            if state is not None:
                self._data.load_state_dict(state)
            return iter(self._data)

        return self._kept_up(opened)  # type: ignore[no-any-return]

    def _kept_up(self, act: Callable[[], Any]) -> Any:
        try:
            return act()
        except Exception as error:  # the library lets out those of four others
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise SourceLost(f"{self.name}: {reason}; once it can be read, the same command goes on") from error

    def state(self) -> Any:
        assert self._data is not None
        return json.loads(json.dumps(self._data.state_dict()))


def normal(where: str, row: Row, column: str | None) -> Row:
    """A row as text or as a conversation. Raises DataError, with what there is, where it is neither."""
    if column is None and chat.form_of(row) is not None:
        return {"messages": chat.messages_of(where, row)}
    name = column or "text"
    if not isinstance(row.get(name), str):
        strings = [key for key, value in row.items() if isinstance(value, str)]
        remedy = f"; choose a column with #{strings[0]}" if strings else ""
        raise DataError(f"{where} has no {name!r} that is a string; it has {', '.join(row) or 'nothing'}{remedy}")
    return {"text": whole(row[name]), **({"url": row["url"]} if isinstance(row.get("url"), str) else {})}


def _datasets() -> Any:
    try:
        library = importlib.import_module("datasets")
    except ImportError as error:
        raise DataError("reading from the hub needs datasets: pip install 'fnlm[hub]'") from error
    library.disable_progress_bars()
    library.logging.set_verbosity_error()
    return library


def is_from(row: Row, domains: tuple[str, ...]) -> bool:
    """Whether a row's address is on one of these hosts, or below one. Raises DataError for a row without an address."""
    if "url" not in row:
        raise DataError("--domains needs rows with a 'url', as c4's have")
    host = (urlsplit(row["url"]).hostname or "").lower()
    return any(host == domain or host.endswith("." + domain) for domain in domains)


def download(url: str, folder: Path) -> Path:
    """A file of the web in `folder`; what was read before an interruption is kept, and the rest asked for.

    Raises SourceLost where it cannot be read, ValueError for a kind of file that is not known.
    """
    file = folder / (Path(urlsplit(url).path).name or "index")
    if file.suffix not in (*TEXT, *RECORDS):
        raise DataError(
            f"{url}: cannot read {file.suffix or 'it without a suffix'}; known: {', '.join(TEXT + RECORDS)}"
        )
    # two addresses may end in one name
    file = folder / hashlib.blake2b(url.encode(), digest_size=4).hexdigest() / file.name
    file.parent.mkdir(parents=True, exist_ok=True)
    part, about = file.with_suffix(file.suffix + ".part"), file.with_suffix(file.suffix + ".etag")
    if not file.exists():
        try:
            _fetch(url, part, about)
        except (OSError, ValueError, HTTPException) as error:
            reason = getattr(error, "reason", None) or error
            raise SourceLost(f"{url}: {reason}; once it can be read, the same command goes on") from error
        part.rename(file)
    return file


def _fetch(url: str, part: Path, about: Path) -> None:
    """Append what is missing of the same version of a file; all of it where there is another version by now."""
    have, tag = (part.stat().st_size, about.read_text()) if part.exists() and about.exists() else (0, "")
    with _asked(url, have if tag else 0, tag) as answer:
        going_on = answer.status == 206
        about.write_text(answer.headers.get("ETag", ""))
        wanted = int(answer.headers.get("Content-Length", -1))
        got = 0
        with part.open("ab" if going_on else "wb") as out:
            while block := answer.read(BLOCK):
                out.write(block)
                got += len(block)
    if wanted not in (-1, got):
        raise OSError(f"the connection was lost after {got:,} of {wanted:,} bytes")


def _asked(url: str, have: int, tag: str) -> Any:
    """The answer of a server, from byte `have` on of the version `tag`; from the beginning where nothing is left."""
    headers = {"User-Agent": "fnlm", **({"Range": f"bytes={have}-", "If-Range": tag} if have else {})}
    try:
        return urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=60)
    except urllib.error.HTTPError as error:
        if have and error.code == 416:  # all of it was read, but not yet renamed
            return _asked(url, 0, tag)
        raise
