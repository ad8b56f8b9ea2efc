"""`fnlm prepare`: files to a data folder; `--verify` checks one, `--show` prints its tokens."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

import click
import numpy as np
from click.core import ParameterSource
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn

from cli.tables import columns, in_si
from fnlm import data
from fnlm.data import Dataset, Preparation, Split


@click.command()
@click.argument("paths", nargs=-1, metavar="PATH...")
@click.option("--out", type=click.Path(path_type=Path), metavar="FOLDER", help="Where to. [default: data/NAME]")
@click.option(
    "--tokenizer",
    default="bpe:4096",
    show_default=True,
    metavar="T",
    help="char, byte, bpe:SIZE, gpt2, cl100k (or gpt2:FOLDER with tiktoken's files), or a tokenizer.json.",
)
@click.option("--val", multiple=True, metavar="PATH", help="Files to validate with, instead of a part of PATH.")
@click.option("--val-fraction", default=0.1, show_default=True, metavar="F", help="The documents to validate with.")
@click.option("--documents", type=click.IntRange(1), metavar="N", help="Of demo: so many stories. [default: 60000]")
@click.option("--special", multiple=True, metavar="TOKEN", help="A further special token.")
@click.option("--npy", is_flag=True, help="Write .npy files instead of raw .bin.")
@click.option("--dtype", type=click.Choice(["uint16", "uint32"]), help="Of the ids. [default: the smallest]")
@click.option("--force", is_flag=True, help="Replace what is in the folder.")
@click.option("--verify", is_flag=True, help="PATH is a prepared folder: check every byte, id and count.")
@click.option("--show", type=click.IntRange(1), metavar="N", help="Print N documents, learnt tokens marked.")
@click.option("--json", "as_json", is_flag=True, help="The manifest as JSON.")
def command(
    paths: tuple[str, ...],
    out: Path | None,
    tokenizer: str,
    val: tuple[str, ...],
    val_fraction: float,
    documents: int | None,
    special: tuple[str, ...],
    npy: bool,
    dtype: str | None,
    force: bool,
    verify: bool,
    show: int | None,
    as_json: bool,
) -> None:
    """Turn text or conversations into tokens to train on.

    PATH is a file, a folder or a pattern: .txt, .md, .jsonl, .json, .parquet, or tokens as .npy and .bin. Conversations
    are recognised by their first line. --show and --verify also take a folder that is prepared already. Without any
    file, `demo` writes a small world: stories into data/demo, and chats about them into data/demo-chat.
    """
    if not paths:
        raise click.UsageError("name a file, a folder or a pattern to prepare", click.get_current_context())
    prepared = len(paths) == 1 and (Path(paths[0]) / "manifest.json").is_file()
    if verify:
        for path in paths:
            for line in data.verify(path):
                click.echo(line)
        return
    todo: list[Preparation] = []
    if not (show and prepared):
        options: dict[str, Any] = {"special": special, "npy": npy, "dtype": dtype}
        folder = out or Path("data") / name_of(paths)
        if is_name(paths):
            refuse("val", "val_fraction", why="the data of a name are validated on others of their kind")
            options |= {"tokenizer": tokenizer} if is_given("tokenizer") else {}
            todo = data.named(paths[0], folder, documents, **options)
        else:
            refuse("documents", why=f"that is of a name: {', '.join(data.NAMES)}")
            todo = [Preparation(paths, folder, tokenizer, val, val_fraction, **options)]
    for one in todo:
        with progress_bar() as progress:
            data.prepare(one, lambda line: click.echo(line, err=True), progress, force)
    folders = [one.out for one in todo] or [Path(paths[0])]
    manifests = [data.open(folder).manifest for folder in folders]
    if as_json:
        click.echo(json.dumps(manifests[0] if len(manifests) == 1 else manifests, indent=2))
    else:
        click.echo("\n".join(chain(*map(summary, folders, manifests))))
    if show:
        click.echo("\n".join(line for folder in folders for line in shown(data.open(folder), show)))


def is_name(paths: tuple[str, ...]) -> bool:
    """Whether the data have a name, and no file is called so."""
    return len(paths) == 1 and paths[0] in data.NAMES and not Path(paths[0]).exists()


def is_given(option: str) -> bool:
    """Whether it is on the command line."""
    return click.get_current_context().get_parameter_source(option) is ParameterSource.COMMANDLINE


def refuse(*options: str, why: str) -> None:
    """Raises UsageError where one of these is on the command line."""
    for option in filter(is_given, options):
        raise click.UsageError(f"--{option.replace('_', '-')} has no meaning here: {why}", click.get_current_context())


def name_of(paths: tuple[str, ...]) -> str:
    """The name of the folder: that of the first path, without its suffix. Raises ValueError for a pattern."""
    name = Path(paths[0]).stem or Path(paths[0]).resolve().name
    if not name or any(c in "*?[]" for c in name):
        raise ValueError(f"what to call the data of {paths[0]}? give --out data/NAME")
    return name


@contextmanager
def progress_bar() -> Iterator[Any]:
    """A bar on stderr, where that is a terminal; yields what takes (done, total)."""
    console = Console(stderr=True)
    bar = Progress(
        BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn(),
        console=console, transient=True, disable=not console.is_terminal,
    )  # fmt: skip
    task = bar.add_task("encoding", total=None)
    with bar:
        yield lambda done, total: bar.update(task, completed=done, total=total)


def summary(folder: Path, manifest: dict[str, Any]) -> list[str]:
    """What there is, a line for each split."""
    rows = [["split", "tokens", "documents", "text", "bytes a token"]]
    for name, split in manifest["splits"].items():
        per = split["bytes"] / max(1, split["tokens"])
        counts = [f"{split[what]:,}" for what in ("tokens", "documents")]
        size = in_si(split["bytes"]) + ("B" if split["bytes"] >= 1000 else " B")
        rows.append([name, *counts, size, f"{per:.2f}"])
        if split["mask"]:
            rows[-1].append(f"{100 * split['learnt'] / split['tokens']:.0f} %")
    if len(rows[-1]) > len(rows[0]):
        rows[0].append("learnt")
    kind, size = manifest["tokenizer"]["kind"], manifest["vocab_size"]
    return [f"{folder}: {manifest['kind']}, {kind} tokenizer of {size:,} tokens, {manifest['dtype']}", *columns(rows)]


def shown(dataset: Dataset, n: int) -> list[str]:
    """The first n documents, token by token between bars; of a chat, learnt tokens in brackets (and green)."""
    lines = []
    for number, (ids, mask) in enumerate(documents(dataset.train, dataset.tokenizer.eot_id, n), 1):
        lines += ["", click.style(f"document {number}: {len(ids)} tokens, {int(mask.sum())} learnt", bold=True)]
        words = [repr(dataset.tokenizer.decode([i]))[1:-1] for i in ids.tolist()]
        lines.append("|".join(marked(w) if m else w for w, m in zip(words, mask.tolist(), strict=True)))
    return lines


def marked(word: str) -> str:
    """A learnt token."""
    return click.style(f"[{word}]", fg="green")


def documents(split: Split, eot_id: int | None, n: int, most: int = 2000) -> Iterator[tuple[Any, Any]]:
    """Ids and mask (ones for text) of the first documents, at most `most` tokens of each."""
    start = 0
    while n and start < len(split.tokens):
        window = np.asarray(split.tokens[start : start + (1 << 20)])
        ends = np.flatnonzero(window == eot_id) if eot_id is not None else np.zeros(0, int)
        stop = int(ends[0]) + 1 if ends.size else len(window)
        ids = window[:stop][:most]
        yield ids, np.ones_like(ids) if split.mask is None else np.asarray(split.mask[start : start + len(ids)])
        start, n = start + stop, n - 1
