"""`fnlm bench`: times the library beside others."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, get_args

import click

from cli.group import Group
from fnlm.benchmark import SHAPES, step_benchmark, table
from fnlm.config import Precision


@click.group(cls=Group)
def command() -> None:
    """Time the library beside others."""


@command.command()
@click.option("--against", metavar="PATH", help="A checkout of nanoGPT, to time beside ours.")
@click.option(
    "--shape",
    "shapes",
    metavar="NAME",
    multiple=True,
    help=f"Of {', '.join(SHAPES)}; repeat it for several. [default: all]",
)
@click.option("--rounds", type=click.IntRange(1), metavar="N", help="Turns of each contestant. [default: the shape's]")
@click.option("--threads", type=click.IntRange(1), metavar="N", help="Of each contestant. [default: 2, or the cores]")
@click.option("--precision", type=click.Choice(get_args(Precision)), default="bf16", show_default=True, help="Of ours.")
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True)
@click.option("--compiled", is_flag=True, help="Also ours with compiled blocks.")
@click.option("--quick", is_flag=True, help="The smallest shape, three short rounds.")
@click.option("--json", "as_json", is_flag=True, help="The whole report as JSON instead of the table.")
@click.option("--out", metavar="FILE", help="Also write the whole report there, as JSON.")
def step(shapes: tuple[str, ...], as_json: bool, out: str | None, **asked: Any) -> None:
    """Time one training step beside nanoGPT's, at the same weights, data and mathematics.

    Leave the machine alone meanwhile. Without --quick it takes about ten minutes on two cores. The exit code is 1 if
    the contestants did not do the same work: the figures then mean nothing. How they are taken: benchmarks/README.md.
    """
    if asked["device"] == "cuda":
        check_cuda()
    if asked["against"] is not None:
        check_nanogpt(Path(asked["against"]))
    if out is not None:
        check_writable(Path(out))
    try:
        report = step_benchmark(shapes=shapes or None, log=lambda line: click.echo(line, err=True), **asked)
    except RuntimeError as error:  # a contestant's process died: its log is the reason, and is many lines
        raise click.ClickException(str(error)) from error
    whole = json.dumps(report, indent=2)
    if out is not None:
        write(Path(out), whole + "\n")
    click.echo(whole if as_json else table(report))
    click.get_current_context().exit(0 if report["ok"] else 1)


def check_nanogpt(folder: Path) -> None:
    """Raises ValueError for a model.py that is not nanoGPT's; the benchmark itself asks for one to be there."""
    model = folder / "model.py"
    if model.is_file() and "class GPTConfig" not in model.read_text(encoding="utf-8", errors="replace"):
        raise ValueError(f"{model} is not nanoGPT's; clone https://github.com/karpathy/nanoGPT and name that folder")


def check_cuda() -> None:
    """Raises ValueError where torch sees no GPU."""
    import torch

    if not torch.cuda.is_available():
        raise ValueError("--device cuda: torch sees no GPU here; `fnlm doctor` says what it sees")


def check_writable(path: Path) -> None:
    """Raises ValueError for a file that could not be written, before minutes of work and not after."""
    if path.is_dir():
        raise ValueError(f"--out {path} is a folder; name a file in it")
    if not os.access(path.parent, os.W_OK):
        raise ValueError(f"--out {path}: {path.parent} is no folder that can be written to")


def write(path: Path, text: str) -> None:
    """All of the text or nothing, at the path."""
    beside = path.with_name(path.name + ".part")
    beside.write_text(text, encoding="utf-8")
    beside.replace(path)
