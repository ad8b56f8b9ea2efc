"""Files to a data folder: read, split, encode and write, all or nothing."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import datetime, timezone
from itertools import chain, repeat
from pathlib import Path
from typing import Any

from fnlm import tokenizers
from fnlm.data import chat
from fnlm.data.encode import Block, Survey, assigned, chat_blocks, hash_of, split_of, survey, text_blocks, token_blocks
from fnlm.data.manifest import FILE, FORMAT, SPLITS, DataError, read
from fnlm.data.sink import Sink
from fnlm.data.sources import TOKENS, Piece, Written, find, pieces
from fnlm.data.vocabulary import check, dtype_for, learnt_from, make_tokenizer
from fnlm.tokenizers import Tokenizer

# All that a preparation leaves in its folder.
WRITTEN = {FILE, tokenizers.FILE, *(f"{name}.{end}" for name in SPLITS for end in ("bin", "npy", "mask"))}


@dataclass(frozen=True)
class Preparation:
    """What to prepare, where, and how.

    `tokenizer` is char, byte, bpe:SIZE, gpt2, cl100k (either with `:FOLDER` for tiktoken's files) or a tokenizer.json;
    `val` names files of their own, otherwise `val_fraction` of the documents, by their hash, is val. `written` stands
    for text without files; then there are no paths, and what it says is val.
    """

    paths: tuple[str, ...]
    out: Path
    tokenizer: str = "bpe:4096"
    val: tuple[str, ...] = ()
    val_fraction: float = 0.1
    special: tuple[str, ...] = ()
    npy: bool = False
    dtype: str | None = None
    written: Written | None = None


def prepare(
    todo: Preparation,
    say: Callable[[str], None] = lambda line: None,
    progress: Callable[[int, int], None] = lambda done, total: None,
    force: bool = False,
) -> dict[str, Any]:
    """Make a data folder, and its manifest.

    Written beside `out` under another name and renamed when whole: a preparation that was torn starts again, and says
    so. The same one twice is left alone. `progress` is told bytes of text done and in all. Raises DataError, ValueError
    and FileNotFoundError in one line each.
    """
    if not 0.0 < todo.val_fraction < 1.0:
        raise ValueError(f"val_fraction={todo.val_fraction} must be between 0 and 1")
    check(todo.tokenizer)
    files, val_files = find(todo.paths), find(todo.val)
    kind = todo.written.kind if todo.written else _kind(files + val_files)
    settings = _settings(todo)
    sources = todo.written.sources if todo.written else [_source(file) for file in files + val_files]
    if not force and (manifest := _done(todo.out, settings, sources)):
        say(f"{todo.out} is already prepared from {'this' if todo.written else 'these files'}")
        return manifest
    stage = _stage(todo.out, force, say)
    try:
        manifest = _filled(stage, todo, kind, files, val_files, say, progress)
        tokenizer = tokenizers.load(stage)
        manifest |= {
            "tokenizer": {"kind": tokenizer.kind, "sha256": tokenizer.sha256},
            "source": sources,
            "settings": settings,
            "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "fnlm": _version(),
        }
        _commit(stage, todo.out, manifest)
    except BaseException as error:
        shutil.rmtree(stage, ignore_errors=True)
        if isinstance(error, OSError) and error.filename is None:
            error.filename = str(todo.out)  # a full disk does not say where
        raise
    return manifest


def _filled(
    stage: Path,
    todo: Preparation,
    kind: str,
    files: list[Path],
    val_files: list[Path],
    say: Callable[[str], None],
    progress: Callable[[int, int], None],
) -> dict[str, Any]:
    """Tokenizer and tokens written into `stage`; the manifest's entries about them."""
    read = (
        _from_files(todo, kind, files, val_files, say)
        if todo.written is None
        else _from_written(todo, todo.written, say)
    )
    tokenizer, blocks, total = read
    tokenizer.save(stage)
    dtype = dtype_for(tokenizer, todo.dtype)
    with ExitStack() as stack:
        sinks = {name: Sink(stage, name, dtype, tokenizer.vocab_size, kind == "chat", todo.npy) for name in SPLITS}
        for sink in sinks.values():
            stack.callback(sink.abandon)
        _pour(blocks, sinks, total, progress)
        splits = {name: sink.close() for name, sink in sinks.items()}
    return {
        "format": FORMAT,
        "dtype": dtype,
        "vocab_size": tokenizer.vocab_size,
        "eot_id": tokenizer.eot_id,
        "kind": "chat" if kind == "chat" else "text",
        "splits": splits,
    }


def _from_files(
    todo: Preparation, kind: str, files: list[Path], val_files: list[Path], say: Callable[[str], None]
) -> tuple[Tokenizer, Iterator[Block], int]:
    """The tokenizer, what is to be written, and its bytes in all."""
    found = None if kind == "tokens" else _surveyed(kind, files, val_files, say)
    texts, val_texts = learnt_from(kind, files), learnt_from(kind, val_files)
    tokenizer = make_tokenizer(todo.tokenizer, todo.special, kind, texts, val_texts, say)
    total = found.bytes if found else sum(file.stat().st_size for file in files + val_files)
    return tokenizer, _blocks(kind, files, val_files, found, todo.val_fraction, tokenizer, say), total


def _from_written(
    todo: Preparation, written: Written, say: Callable[[str], None]
) -> tuple[Tokenizer, Iterator[Block], int]:
    """The same of text that a function writes: only once, and its bytes are about so many."""
    tokenizer = make_tokenizer(todo.tokenizer, todo.special, written.kind, written.learnt_from(), (), say)
    train, val = (zip(repeat(name), texts()) for name, texts in (("train", written.train), ("val", written.val)))
    if written.kind == "chat":
        return tokenizer, chat_blocks(chain(train, val), tokenizer), written.bytes
    rows = ((split, Piece(text)) for split, text in chain(train, val))
    return tokenizer, text_blocks(rows, tokenizer), written.bytes


def _pour(blocks: Iterable[Block], sinks: dict[str, Sink], total: int, progress: Callable[[int, int], None]) -> None:
    done = 0
    for block in blocks:
        sink = sinks[block.split]
        sink.write(block.ids, block.mask)
        sink.documents += block.documents
        sink.bytes += block.bytes
        done += block.bytes
        progress(min(done, total - 1), total)
    progress(total, total)


def _kind(files: list[Path]) -> str:
    """tokens, chat or text. Raises DataError where the files disagree."""
    if not files:
        raise ValueError("name a file, a folder or a pattern to prepare")
    kinds = {file: "tokens" if file.suffix in TOKENS else "chat" if chat.is_chat(file) else "text" for file in files}
    for file, kind in kinds.items():
        if kind != kinds[files[0]]:
            raise DataError(f"{file} holds {kind}, {files[0]} holds {kinds[files[0]]}; prepare them into two folders")
    return kinds[files[0]]


def _texts(kind: str, files: list[Path]) -> Iterator[Piece]:
    """What is surveyed and learnt from: documents, or a conversation as one text."""
    if kind == "chat":
        return (Piece(chat.key_of(messages)) for messages in chat.answered(files))
    return pieces(files)


def _surveyed(kind: str, files: list[Path], val_files: list[Path], say: Callable[[str], None]) -> Survey:
    found = survey(_texts(kind, files))
    name = "conversation" if kind == "chat" else "document"
    say(f"{found.documents:,} {name}{'s' * (found.documents != 1)}, {found.bytes:,} bytes of text")
    return found._replace(bytes=found.bytes + survey(_texts(kind, val_files)).bytes) if val_files else found


def _blocks(
    kind: str,
    files: list[Path],
    val_files: list[Path],
    found: Survey | None,
    fraction: float,
    tokenizer: Tokenizer,
    say: Callable[[str], None],
) -> Iterator[Block]:
    if found is None:
        return token_blocks(files, val_files, fraction, tokenizer)
    if kind == "text":
        own = (("val", piece) for piece in pieces(val_files))
        rest = (("train", piece) for piece in pieces(files)) if val_files else assigned(pieces(files), found, fraction)
        return text_blocks(chain(rest, own), tokenizer)
    return chat_blocks(_conversations(files, val_files, found, fraction, say), tokenizer)


def _conversations(
    files: list[Path], val_files: list[Path], found: Survey, fraction: float, say: Callable[[str], None]
) -> Iterator[tuple[str, chat.Messages]]:
    """Conversations with their split. Those of `val_files` are left out of train, those without an answer anywhere."""
    held_out = {hash_of(chat.key_of(messages)) for messages in chat.conversations(val_files)}
    if not val_files and found.low == found.high:
        raise DataError("all conversations are the same, or there is only one; give --val FILE")
    repeated = answered = 0
    for messages in chat.answered(files):
        h = hash_of(chat.key_of(messages))
        answered, repeated = answered + 1, repeated + (h in held_out)
        if h not in held_out:
            yield "train" if val_files else split_of(h, found, fraction), messages
    yield from (("val", messages) for messages in chat.answered(val_files))
    if silent := sum(1 for _ in chat.conversations(files)) - answered:
        say(f"{silent:,} conversations without an assistant's message were left out")
    if repeated:
        say(f"{repeated:,} conversations that are also in the validation files were left out of train")


def _settings(todo: Preparation) -> dict[str, Any]:
    names = ("tokenizer", "val_fraction", "special", "npy", "dtype")
    return json.loads(json.dumps({name: getattr(todo, name) for name in names}))  # type: ignore[no-any-return]


def _source(file: Path) -> dict[str, Any]:
    status = file.stat()
    return {"path": file.as_posix(), "bytes": status.st_size, "modified": status.st_mtime_ns}


def _done(out: Path, settings: dict[str, Any], sources: list[dict[str, Any]]) -> dict[str, Any] | None:
    """The manifest of a folder made just so before."""
    if not (out / FILE).is_file():
        return None
    try:
        manifest = read(out)
    except DataError:  # what it was is not known: as any other folder that is in the way
        return None
    same = manifest.get("settings") == settings and manifest.get("source") == sources
    return manifest if same else None


def _stage(out: Path, force: bool, say: Callable[[str], None]) -> Path:
    """The empty folder beside `out` to write into. Raises ValueError where `out` holds something else.

    Also with `force` only what a preparation writes is replaced: a text that lies among it may be the only copy.
    """
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out} is a file; choose another --out")
    foreign = sorted(path.name for path in out.iterdir() if path.name not in WRITTEN) if out.exists() else []
    if foreign:
        raise ValueError(f"{out} already holds something else, {foreign[0]!r}; choose another --out")
    if not force and out.exists() and any(out.iterdir()):
        raise ValueError(f"{out} already holds other data; choose another --out, or --force to replace it")
    stage = out.with_name(f".{out.name}.partial")
    if stage.exists():
        say(f"an earlier preparation of {out} was not finished; starting again")
        shutil.rmtree(stage)
    stage.mkdir(parents=True)
    return stage


def _commit(stage: Path, out: Path, manifest: dict[str, Any]) -> None:
    """The manifest, everything to disk, then the name."""
    (stage / FILE).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    for path in (stage / FILE, stage / tokenizers.FILE, stage):
        _synced(path)
    old = out.with_name(f".{out.name}.old")
    if out.exists():
        shutil.rmtree(old, ignore_errors=True)
        out.rename(old)
    stage.rename(out)
    _synced(out.parent)
    shutil.rmtree(old, ignore_errors=True)


def _synced(path: Path) -> None:
    if os.name == "nt" and path.is_dir():
        return  # Windows opens no folders
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _version() -> str:
    from importlib import metadata

    try:
        return metadata.version("fnlm")
    except metadata.PackageNotFoundError:
        return "unknown"
