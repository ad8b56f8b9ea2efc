"""Files, the hub or the web to a data folder: read, clean, split, encode and write, all or nothing."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from datetime import datetime, timezone
from itertools import chain, islice, repeat
from pathlib import Path
from time import monotonic
from typing import Any

from fnlm import cleaning, tokenizers
from fnlm.data import apart, staging
from fnlm.data.encode import Block, chat_blocks, text_blocks, token_blocks
from fnlm.data.encoded import Encoded
from fnlm.data.gather import Wanted
from fnlm.data.inputs import Input, described, inputs, validation
from fnlm.data.inputs import check as check_files
from fnlm.data.manifest import FORMAT, SPLITS
from fnlm.data.sink import Sink
from fnlm.data.sources import Piece, Written
from fnlm.data.streams import SourceLost
from fnlm.data.template import Template
from fnlm.data.vocabulary import check, dtype_for, learnt_from, make_tokenizer
from fnlm.tokenizers import Tokenizer

SECONDS = 5.0
"""Between two moments from which an interrupted preparation can go on."""
FRACTION = 0.1
Say = Callable[[str], None]
Told = Callable[[int, int], None]


@dataclass(frozen=True)
class Preparation:
    """What to prepare, where, and how.

    `paths` are files, folders, patterns, and names of corpora, `hub:org/name` and addresses (`corpora.reference`).
    `tokenizer` is char, byte, bpe:SIZE, gpt2, cl100k (either with `:FOLDER` for tiktoken's files) or a tokenizer.json;
    `val` names files of their own, otherwise `val_fraction` of the documents, by their hash, is val; None: the
    validation split of a corpus that has one, else a tenth. `wanted`: which documents are taken, and how they are
    cleaned. `written` stands for text without files; then there are no paths, and what it says is val. `template` is
    the text of a chat template in Jinja, with which conversations are written instead of ChatML.
    """

    paths: tuple[str, ...]
    out: Path
    tokenizer: str = "bpe:4096"
    val: tuple[str, ...] = ()
    val_fraction: float | None = None
    special: tuple[str, ...] = ()
    npy: bool = False
    dtype: str | None = None
    written: Written | None = None
    wanted: Wanted = field(default_factory=Wanted)
    template: str | None = None

    def __post_init__(self) -> None:
        if self.val_fraction is not None and not 0.0 < self.val_fraction < 1.0:
            raise ValueError(f"val_fraction={self.val_fraction} must be between 0 and 1")
        if self.val_fraction is None and not self.val:
            object.__setattr__(self, "val", validation(self.paths))

    @property
    def fraction(self) -> float:
        """Of the documents, to validate with, where nothing else is."""
        return FRACTION if self.val_fraction is None else self.val_fraction


def prepare(
    todo: Preparation, say: Say = lambda line: None, progress: Told = lambda done, total: None, force: bool = False
) -> dict[str, Any]:
    """Make a data folder, and its manifest.

    Written beside `out` under another name and renamed when whole. One that was interrupted goes on where it was; the
    same one twice is left alone; two at once into one folder are refused. `progress` is told bytes of text done and in
    all, 0 where that is not known. Raises DataError, ValueError, FileNotFoundError, SourceLost and WorkerLost, each in
    one line.
    """
    check(todo.tokenizer)
    cleaning.check(todo.wanted.clean)
    sources = todo.written.sources if todo.written else _sources(todo)
    check_files(todo.paths + todo.val)
    about = {"settings": _settings(todo), "source": sources}
    with staging.held(todo.out):
        if not force and (manifest := staging.done(todo.out, about)) and _same_tokenizer(todo, manifest):
            say(f"{todo.out} is already prepared from {'this' if todo.written else 'these files'}")
            return manifest
        stage = staging.stage_of(todo.out, about, force, say)
        try:
            manifest = {**_filled(stage, todo, say, progress), **about}
            manifest |= {"created": datetime.now(timezone.utc).isoformat(timespec="seconds"), "fnlm": _version()}
            staging.commit(stage, todo.out, manifest)
        except (KeyboardInterrupt, SourceLost, cleaning.WorkerLost):
            staging.forget_nothing(stage)
            raise  # the same command goes on from what is there
        except BaseException as error:
            shutil.rmtree(stage, ignore_errors=True)
            if isinstance(error, OSError) and error.filename is None:
                error.filename = str(todo.out)  # a full disk does not say where
            raise
    return manifest


def _filled(stage: Path, todo: Preparation, say: Say, progress: Told) -> dict[str, Any]:
    """Tokenizer and tokens written into `stage`; the manifest's entries about them."""
    at, repeated = Encoded(stage), dict[str, int]()
    if todo.written is None:
        given = inputs(stage, todo.paths, todo.val, todo.wanted, say, progress)
        tokenizer, blocks, total = _from_files(todo, given, at, say, repeated)
    else:
        given = Input(todo.written.kind, [], [], {})
        tokenizer, blocks, total = _from_written(todo, todo.written, say)
    if not at.begun:
        tokenizer.save(stage)
    dtype, masked, size = dtype_for(tokenizer, todo.dtype), given.kind == "chat", tokenizer.vocab_size
    with ExitStack() as stack:
        sinks = {name: Sink(stage, name, dtype, size, masked, todo.npy, at.counts(name)) for name in SPLITS}
        for sink in sinks.values():
            stack.callback(sink.abandon)
        _pour(blocks, sinks, total, progress, at)
        splits = {name: sink.close() for name, sink in sinks.items()}
    return {
        "format": FORMAT,
        "dtype": dtype,
        "vocab_size": size,
        "eot_id": tokenizer.eot_id,
        "prefix": [] if given.kind == "tokens" else list(tokenizer.prefix),
        "kind": "chat" if masked else "text",
        "splits": splits,
        "tokenizer": {"kind": tokenizer.kind, "sha256": tokenizer.sha256},
        **(Template(todo.template, tokenizer).about() if todo.template else {}),
        **({"repeated": repeated} if repeated else {}),
        **({"cleaned": given.cleaned} if given.cleaned else {}),
    }


def _from_files(
    todo: Preparation, given: Input, at: Encoded, say: Say, repeated: dict[str, int]
) -> tuple[Tokenizer, Iterator[Block], int]:
    """The tokenizer, what is still to be written, and its bytes in all; `repeated` is filled on the way."""
    kind, files, val_files, _ = given
    if at.begun:
        tokenizer = tokenizers.load(at.folder)
    else:
        at.found = None if kind == "tokens" else apart.surveyed(given, todo.fraction, say)
        texts, val_texts = learnt_from(kind, files), learnt_from(kind, val_files)
        tokenizer = make_tokenizer(todo.tokenizer, todo.special, kind, texts, val_texts, say)
    if at.found is None:
        total = sum(file.stat().st_size for file in files + val_files)
        return tokenizer, token_blocks(files, val_files, todo.fraction, tokenizer), total
    if todo.template and kind != "chat":
        raise ValueError(f"--template is for conversations; {files[0]} holds {kind}")
    if kind == "chat":
        talks = apart.conversations(given, at.found, todo.fraction, say, repeated)
        template = Template(todo.template, tokenizer) if todo.template else None
        return tokenizer, chat_blocks(islice(talks, at.items, None), tokenizer, template), at.found.bytes
    texts_apart = apart.documents(given, at.found, todo.fraction, say, repeated)
    return tokenizer, text_blocks(islice(texts_apart, at.items, None), tokenizer), at.found.bytes


def _from_written(todo: Preparation, written: Written, say: Say) -> tuple[Tokenizer, Iterator[Block], int]:
    """The same of text that a function writes: only once, and its bytes are about so many."""
    tokenizer = make_tokenizer(todo.tokenizer, todo.special, written.kind, written.learnt_from(), (), say)
    train, val = (zip(repeat(name), texts()) for name, texts in (("train", written.train), ("val", written.val)))
    if written.kind == "chat":
        return tokenizer, chat_blocks(chain(train, val), tokenizer), written.bytes
    rows = ((split, Piece(text)) for split, text in chain(train, val))
    return tokenizer, text_blocks(rows, tokenizer), written.bytes


def _pour(blocks: Iterable[Block], sinks: dict[str, Sink], total: int, progress: Told, at: Encoded) -> None:
    done, last = sum(sink.bytes for sink in sinks.values()), monotonic()
    for block in blocks:
        sink = sinks[block.split]
        sink.write(block.ids, block.mask)
        sink.documents += block.documents
        sink.bytes += block.bytes
        done += block.bytes
        at.items += block.items
        if block.items and monotonic() - last >= SECONDS:
            at.commit(sinks)
            last = monotonic()
        progress(min(done, total - 1), total)
    progress(total, total)


def _same_tokenizer(todo: Preparation, manifest: dict[str, Any]) -> bool:
    """Whether the file that `tokenizer` names, if it is one, is still that of a folder."""
    if todo.tokenizer.partition(":")[0] in tokenizers.NAMES:
        return True
    named = tokenizers.extended(tokenizers.load(todo.tokenizer), todo.special)
    return bool(named.sha256 == manifest["tokenizer"]["sha256"])


def _sources(todo: Preparation) -> list[dict[str, Any]]:
    """Where the data are from; what is validated on says so, as the same files make other data without `val`."""
    return described(todo.paths) + [{**one, "split": "val"} for one in described(todo.val)]


def _settings(todo: Preparation) -> dict[str, Any]:
    """What decides the result, besides the sources: the number of workers does not."""
    names = ("tokenizer", "special", "npy", "dtype")
    settings = {name: getattr(todo, name) for name in names} | {"val_fraction": todo.fraction}
    settings |= {"template": todo.template} if todo.template else {}
    settings |= {name: value for name, value in todo.wanted._asdict().items() if value and name != "workers"}
    return json.loads(json.dumps(settings))  # type: ignore[no-any-return]


def _version() -> str:
    from importlib import metadata

    try:
        return metadata.version("fnlm")
    except metadata.PackageNotFoundError:
        return "unknown"
