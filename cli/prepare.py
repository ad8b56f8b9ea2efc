"""`fnlm prepare`: files to a data folder; `--verify` checks one, `--show` prints its tokens."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn

from cli.prepared import shown, summary
from fnlm import data
from fnlm.data import Preparation, Wanted, corpora
from fnlm.interop import vocabulary
from fnlm.interop.stored import read_json
from fnlm.trained import locate

TEXTUAL = (
    "tokenizer",
    "val",
    "val_fraction",
    "clean",
    "workers",
    "domains",
    "documents",
    "special",
    "npy",
    "dtype",
    "template",
)


@click.command()
@click.argument("paths", nargs=-1, metavar="PATH...")
@click.option("--out", type=click.Path(path_type=Path), metavar="FOLDER", help="Where to. [default: data/NAME]")
@click.option(
    "--tokenizer",
    default="bpe:4096",
    show_default=True,
    metavar="T",
    help="char, byte, bpe:SIZE, gpt2, cl100k (or gpt2:FOLDER with tiktoken's files), a tokenizer.json, or a run.",
)
@click.option("--val", multiple=True, metavar="PATH", help="Files to validate with, instead of a part of PATH.")
@click.option("--val-fraction", type=float, metavar="F", help="The documents to validate with. [default: 0.1]")
@click.option("--clean", default="", metavar="STEPS", help="exact,minhash,gopher,language=en,pii: in this order.")
@click.option("--workers", type=click.IntRange(1), default=1, metavar="N", help="Processes that clean. [default: 1]")
@click.option("--domains", default="", metavar="HOSTS", help="Only documents of these: news, or bbc.com,reuters.com.")
@click.option("--documents", type=click.IntRange(1), metavar="N", help="So many of each source. [demo: 60000 stories]")
@click.option("--tokens", type=click.IntRange(1), metavar="N", help="Of mix: so many to train on. [all, none twice]")
@click.option("--seed", type=click.IntRange(0), default=0, metavar="N", help="Of mix: the order of documents.")
@click.option("--special", multiple=True, metavar="TOKEN", help="A further special token.")
@click.option("--npy", is_flag=True, help="Write .npy files instead of raw .bin.")
@click.option("--dtype", type=click.Choice(["uint16", "uint32"]), help="Of the ids. [default: the smallest]")
@click.option("--force", is_flag=True, help="Replace what is in the folder.")
@click.option("--verify", is_flag=True, help="PATH is a prepared folder: check every byte, id and count.")
@click.option("--template", type=click.Path(path_type=Path), metavar="PATH", help="A model's, or .jinja. [ChatML]")
@click.option("--show", type=click.IntRange(1), metavar="N", help="Print N documents, learnt tokens marked.")
@click.option("--json", "as_json", is_flag=True, help="The manifest as JSON.")
def command(
    paths: tuple[str, ...],
    out: Path | None,
    tokenizer: str,
    val: tuple[str, ...],
    val_fraction: float | None,
    clean: str,
    workers: int,
    domains: str,
    documents: int | None,
    tokens: int | None,
    seed: int,
    special: tuple[str, ...],
    npy: bool,
    dtype: str | None,
    force: bool,
    verify: bool,
    template: Path | None,
    show: int | None,
    as_json: bool,
) -> None:
    """Turn text or conversations into tokens to train on.

    PATH is a file, a folder or a pattern: .txt, .md, .jsonl, .json, .parquet, or tokens as .npy and .bin. Conversations
    are recognised by their first line. Or PATH is a corpus: shakespeare, tinystories, openwebtext, wikipedia, c4,
    c4-news, fineweb-edu, dailydialog, alpaca, any hub:org/name[:config][:split][#column], or the address of a file.

    `mix data/a=0.7 data/b=0.3` makes one folder of several, each with its share of the tokens. --show and --verify also
    take a folder that is prepared already. Without any file, `demo` writes a small world: stories into data/demo, and
    chats about them into data/demo-chat.
    """
    if not paths:
        raise click.UsageError("name a file, a folder or a pattern to prepare", click.get_current_context())
    if show and as_json:
        raise click.UsageError("--show prints text; leave --json out", click.get_current_context())
    prepared = len(paths) == 1 and (Path(paths[0]) / "manifest.json").is_file()
    if verify:
        for line in chain(*map(data.verify, paths)):
            click.echo(line)
        return
    say = partial(click.echo, err=True)
    todo: list[Preparation] = []
    if is_called(paths, "mix"):
        refuse(*TEXTUAL, why="the folders of a mixture are prepared already")
        mixture = out or Path("data/mix")
        data.mix(data.parts_of(paths[1:]), mixture, tokens, seed, say, force)
        paths = (str(mixture),)
    elif not (show and prepared):
        refuse("tokens", "seed", why="they are those of mix")
        wanted = Wanted(tuple(filter(None, clean.split(","))), data.domains_of(domains), documents, workers)
        first = Preparation(
            paths, out or Path("data") / name_of(paths), file_of(tokenizer), val, val_fraction, special, npy, dtype
        )
        todo = preparations(replace(first, wanted=wanted, template=template_of(template) if template else None))
    for one in todo:
        with progress_bar() as progress:
            data.prepare(one, say, progress, force)
    tell([one.out for one in todo] or [Path(paths[0])], show or 0, as_json)


def tell(folders: list[Path], show: int, as_json: bool) -> None:
    """Print what is in prepared folders, and their first documents."""
    manifests = [data.open(folder).manifest for folder in folders]
    if as_json:
        click.echo(json.dumps(manifests[0] if len(manifests) == 1 else manifests, indent=2))
    else:
        click.echo("\n".join(chain(*map(summary, folders, manifests))))
    if show:
        click.echo("\n".join(line for folder in folders for line in shown(data.open(folder), show)))


def preparations(one: Preparation) -> list[Preparation]:
    """The one that is asked for, or those of the data of a name."""
    if len(one.paths) > 1 or not is_called(one.paths, *data.NAMES):
        return [one]
    refuse(
        "val",
        "val_fraction",
        "clean",
        "domains",
        "template",
        why="the data of a name are validated on others of their kind",
    )
    own = {"tokenizer": one.tokenizer} if is_given("tokenizer") else {}
    return data.named(
        one.paths[0], one.out, one.wanted.documents, special=one.special, npy=one.npy, dtype=one.dtype, **own
    )


def file_of(tokenizer: str) -> str:
    """As named, or that of a run's checkpoint where a run or RUN@best, RUN@1000 is named."""
    path = Path(tokenizer)
    run = path if path.is_dir() else path.with_name(path.name.rpartition("@")[0] or path.name)
    return str(locate(path) / "tokenizer.json") if (run / "checkpoints").is_dir() else tokenizer


def template_of(path: Path) -> str:
    """The chat template of a run, of a folder of Hugging Face's, or a file. Raises ValueError where there is none."""
    if path.is_file():
        return vocabulary.text_of(path)
    found = vocabulary.template_of(path)
    if found is None and (path / "config.json").is_file():
        found = read_json(path / "config.json").get("interop", {}).get("template")
    if found is None:
        raise ValueError(f"{path} has no chat template; give a run, a folder of Hugging Face's, or a .jinja file")
    return str(found)


def is_called(paths: tuple[str, ...], *names: str) -> bool:
    """Whether the first word is one of these names, and no file is called so."""
    return paths[0] in names and not Path(paths[0]).exists()


def is_given(option: str) -> bool:
    """Whether it is on the command line."""
    return click.get_current_context().get_parameter_source(option) is ParameterSource.COMMANDLINE


def refuse(*options: str, why: str) -> None:
    """Raises UsageError where one of these is on the command line."""
    for option in filter(is_given, options):
        raise click.UsageError(f"--{option.replace('_', '-')} has no meaning here: {why}", click.get_current_context())


def name_of(paths: tuple[str, ...]) -> str:
    """The name of the folder: that of the first path, without its suffix. Raises ValueError for a pattern."""
    name = corpora.name_of(paths[0]) or Path(paths[0]).stem
    name = Path(paths[0]).resolve().name if name in ("", "..") else name
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
        yield lambda done, total: bar.update(task, completed=done, total=total or None)
