"""What a preparation is made of: local files as they are, or what is gathered from elsewhere or cleaned first."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from fnlm.data import chat, corpora
from fnlm.data.corpora import Hub, Web
from fnlm.data.gather import Wanted, gather
from fnlm.data.manifest import DataError
from fnlm.data.sources import TOKENS, find
from fnlm.data.streams import HubStream, LocalStream, Stream, download

Say = Callable[[str], None]
Told = Callable[[int, int], None]


class Input(NamedTuple):
    """Local files to encode, and what the steps of cleaning did to each split."""

    kind: str
    files: list[Path]
    val_files: list[Path]
    cleaned: dict[str, Any]


def validation(paths: Sequence[str]) -> tuple[str, ...]:
    """The validation splits of corpora that all have one; () where one has none."""
    found = [corpora.reference(path) for path in paths]
    own = [corpora.label(f._replace(split=f.val, val=None)) for f in found if isinstance(f, Hub) and f.val]
    return tuple(own) if len(own) == len(found) else ()


def described(paths: Sequence[str]) -> list[dict[str, Any]]:
    """What the manifest says of where data are from: files with their size and time, or the name of the source."""
    found: list[dict[str, Any]] = []
    for path in paths:
        source = corpora.reference(path)
        found += [{"path": corpora.label(source)}] if source else [_file(file) for file in find([path])]
    return [one for i, one in enumerate(found) if one not in found[:i]]


def check(paths: Sequence[str]) -> None:
    """Raises DataError where local files disagree about what they hold, or cannot be read at all."""
    if local := [path for path in paths if corpora.reference(path) is None]:
        kind_of(find(local))


def _file(file: Path) -> dict[str, Any]:
    status = file.stat()
    return {"path": file.as_posix(), "bytes": status.st_size, "modified": status.st_mtime_ns}


def inputs(stage: Path, paths: Sequence[str], val: Sequence[str], wanted: Wanted, say: Say, progress: Told) -> Input:
    """The files of paths; where some are elsewhere, or are to be cleaned, one in `stage` for each split.

    Raises DataError where files disagree about what they hold, and for tokens, which are past cleaning.
    """
    downloads = stage / "downloads"
    local = [_downloaded(path, downloads) for path in paths]
    val_local = [_downloaded(path, downloads) for path in val]
    if not any(wanted[:3]) and not any(isinstance(one, Hub) for one in local + val_local):
        files, val_files = _found(local), _found(val_local)
        return Input(kind_of(files + val_files), files, val_files, {})
    made: list[list[Path]] = []
    cleaned: dict[str, Any] = {}
    for split, places in (("train", local), ("val", val_local)):
        streams = [stream for place in places for stream in _streams(place)]
        limit = wanted if split == "train" else wanted._replace(documents=None)
        file, counts = gather(stage, split, streams, limit, say, progress) if streams else (None, {})
        made.append([file] if file else [])
        cleaned |= {split: counts} if counts else {}
    return Input(kind_of(made[0] + made[1]), made[0], made[1], cleaned)


def _downloaded(path: str, folder: Path) -> str | Hub:
    """A file of the web becomes one of this machine."""
    source = corpora.reference(path)
    return download(source.url, folder).as_posix() if isinstance(source, Web) else source or path


def _found(places: Sequence[str | Hub]) -> list[Path]:
    return find([place for place in places if isinstance(place, str)])


def _streams(place: str | Hub) -> list[Stream]:
    if isinstance(place, Hub):
        return [HubStream(place)]
    files = find([place])
    kind = kind_of(files)
    if kind == "tokens":
        raise DataError(f"{files[0]} holds tokens, which cannot be cleaned or chosen from; prepare the texts")
    return [LocalStream(file, kind) for file in files]


def kind_of(files: Sequence[Path]) -> str:
    """tokens, chat or text. Raises DataError where the files disagree."""
    if not files:
        raise ValueError("name a file, a folder or a pattern to prepare")
    kinds = {file: "tokens" if file.suffix in TOKENS else "chat" if chat.is_chat(file) else "text" for file in files}
    for file, kind in kinds.items():
        if kind != kinds[files[0]]:
            raise DataError(f"{file} holds {kind}, {files[0]} holds {kinds[files[0]]}; prepare them into two folders")
    return kinds[files[0]]
