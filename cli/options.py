"""What every command that trains is given: its options, each listed once, and the settings among its words."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import wraps
from pathlib import Path
from typing import Any, NamedTuple

import click

from cli import ranks
from cli import settings as gather
from cli.settings import Pair
from fnlm import overrides
from fnlm.sharding import processes
from fnlm.track import TRACKERS


class Options(NamedTuple):
    """The options that `train` and `finetune` share, by click's names; `--nproc` is read where a command starts."""

    data: Path | None
    out: Path | None
    resume: str | None
    config: Path | None
    track: tuple[str, ...]
    strategy: str | None
    mesh: str | None
    simulate: int | None
    force: bool
    partial: bool
    dry_run: bool
    quiet: bool
    as_json: bool


class Wish(NamedTuple):
    """What is wanted of a run: its settings as pairs, the weightiest last, and where it lies and goes on."""

    pairs: list[Pair]
    data: Path | None
    out: Path | None
    resume: str | None
    force: bool
    quiet: bool
    as_json: bool
    dry_run: bool
    partial: bool
    simulate: int | None = None

    @property
    def world(self) -> int:
        """The ranks that take part: processes, or threads of this one."""
        here = processes.place()
        return here.world if here else self.simulate or 1


OPTIONS = (
    click.option("--data", type=click.Path(path_type=Path), metavar="FOLDER", help="Prepared data."),
    click.option("--out", type=click.Path(path_type=Path), metavar="FOLDER", help="Of the run. [default: runs/NAME]"),
    click.option(
        "--resume", is_flag=False, flag_value="auto", metavar="[auto|PATH]",
        help="Go on: with the run in --out where there is one, or with the run or checkpoint PATH.",
    ),
    click.option("--config", type=click.Path(path_type=Path, dir_okay=False), metavar="FILE", help="TOML or YAML."),
    click.option("--track", multiple=True, type=click.Choice(list(TRACKERS)), help="Also log there."),
    click.option("--strategy", metavar="NAME", help="How several ranks share the work: ddp_bucketed, zero3, ..."),
    click.option("--mesh", metavar="AXIS=N,...", help="Ranks by axis: data=2,tensor=2. [default: the strategy's own]"),
    click.option("--nproc", metavar="N|auto", help="Start N processes; auto: one for each GPU."),
    click.option("--simulate", type=click.IntRange(1), metavar="N", help="N ranks as threads of this process."),
    click.option("--force", is_flag=True, help="Replace the run that is in the folder."),
    click.option("--partial", is_flag=True, help="Of another shape: take what fits, the rest starts anew."),
    click.option("--dry-run", is_flag=True, help="Print all settings and stop."),
    click.option("--quiet", is_flag=True, help="No progress on stderr."),
    click.option("--json", "as_json", is_flag=True, help="How it ended, as JSON."),
)  # fmt: skip


class RunCommand(click.Command):
    """A command of which `--resume`, with no path, may also stand before a setting: `--resume steps=700`."""

    def invoke(self, ctx: click.Context) -> Any:
        """The command, in as many processes as `--nproc` asks for."""
        world = processes_wanted(ctx.params.pop("nproc"), ctx.params["simulate"])
        return ranks.launch(ctx.obj, world) if world > 1 else super().invoke(ctx)

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        bare = [
            word == "--resume" and "=" in after and not Path(after).exists()
            for word, after in zip(args, [*args, ""][1:], strict=True)
        ]
        return super().parse_args(ctx, ["--resume=auto" if it else word for word, it in zip(args, bare, strict=True)])


def run_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """The shared options; the command gets them as one argument, `options`."""

    @wraps(command)
    def gathered(**given: Any) -> Any:
        own = Options(**{name: given.pop(name) for name in Options._fields})
        return command(options=own, **given)

    for option in reversed(OPTIONS):
        gathered = option(gathered)
    return gathered


NAMES = tuple(name for option in click.command()(run_options(lambda: None)).params for name in option.opts)


def processes_wanted(nproc: str | None, simulate: int | None) -> int:
    """The processes that `--nproc` asks for; 1 for a process that is a rank already."""
    if simulate is not None and (nproc is not None or ranks.is_rank()):
        raise ValueError("--simulate makes threads of one process; leave it out where processes are started")
    return 1 if nproc is None or ranks.is_rank() else ranks.count(nproc)


def wished(
    words: Sequence[str], options: Options, names: tuple[str, ...] = ()
) -> tuple[list[str], dict[str, str], Wish]:
    """The words that are no settings, those settings that stand for the options `names`, and what is wanted.

    Data and folder may also be given as nanoGPT does: `dataset=data/x out_dir=runs/x`.
    """
    plain, given = overrides.split(words)
    if "" in plain:
        raise ValueError("an empty word ('') names nothing; leave it out, or write what is meant")
    given, meant = separated(given, names)
    pairs = pairs_of(given, options.config, options.track, strategy=options.strategy, mesh=options.mesh)
    data = options.data or (Path(meant["data"]) if "data" in meant else None)
    out = options.out or (Path(meant["out"]) if "out" in meant else None)
    same = {name: getattr(options, name) for name in Wish._fields if name not in ("pairs", "data", "out")}
    return plain, meant, Wish(pairs, data, out, **same)


def pairs_of(words: list[Pair], file: Path | None, track: tuple[str, ...], **options: str | None) -> list[Pair]:
    """All settings that were given, the weightiest last; `options` are those that have an option of their own."""
    named = [(name, value) for name, value in options.items() if value is not None]
    pairs = [*(gather.from_file(file) if file else []), *gather.from_environment(), *words, *named]
    return [*pairs, ("trackers", json.dumps(list(track)))] if track else pairs


def separated(words: list[Pair], names: tuple[str, ...]) -> tuple[list[Pair], dict[str, str]]:
    """Pairs that stand for options, such as nanoGPT's `out_dir=runs/x`, apart from the settings."""
    known = {"out_dir": "out", "dataset": "data", **{name: name for name in names}}
    options = {known[key]: value for key, value in words if key in known and value is not None}
    return [(key, value) for key, value in words if key not in known], options
