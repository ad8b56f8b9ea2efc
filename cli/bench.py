"""`fnlm bench`: times the library beside others."""

from __future__ import annotations

import json
import os
import warnings
from pathlib import Path
from typing import Any, get_args

import click

from cli.group import Group
from cli.tables import columns, in_bytes, in_si
from fnlm.benchmark import SHAPES, step_benchmark, table
from fnlm.benchmark_strategies import Row, Run, fsdp_row, strategies_benchmark
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


@command.command()
@click.option("--simulate", type=click.IntRange(1), metavar="N", help="Ranks, as threads. [default: 4]")
@click.option("--quick", is_flag=True, help="3 steps instead of 10.")
@click.option("--json", "as_json", is_flag=True, help="Everything as JSON.")
def strategies(simulate: int | None, quick: bool, as_json: bool) -> None:
    """Run every sharding strategy beside a single process.

    Ranks are threads of this process; under torchrun they are its processes, over gloo, and PyTorch's own DDP and FSDP2
    are rows: what DDP sends is counted by its hook, what FSDP2 sends where it calls torch.distributed.
    The exit code is 1 if a strategy ends elsewhere than one process, or sends other bytes than planned.
    """
    import torch.distributed as dist

    torn = dist.is_torchelastic_launched()
    if torn and simulate is not None:
        raise ValueError("--simulate runs ranks as threads of one process; leave it out under torchrun")
    world, run = joined() if torn else (simulate or 4, None)
    first = not torn or dist.get_rank() == 0
    rows = []
    for row in strategies_benchmark(world, run, quick):
        rows.append(row)
        if first:
            click.echo(f"{row.strategy} on {row.mesh or 'one rank'}", err=True)
    ok = all(r.gap < 1e-10 and r.in_sync == "yes" and r.sent == r.planned for r in rows)
    if torn:
        warnings.filterwarnings("ignore", message="FSDP2-wrapped module")  # nothing is changed in place here
        rows.append(fsdp_row(world, quick))  # PyTorch's own; beside ours, not judged
    if first:
        told = json.dumps({"ranks": world, "processes": torn, "ok": ok, "rows": [r._asdict() for r in rows]}, indent=2)
        click.echo(told if as_json else "\n".join(strategies_text(rows)))
    if torn:
        dist.destroy_process_group()
    click.get_current_context().exit(0 if ok else 1)


def joined() -> tuple[int, Run]:
    """The processes that torchrun started: how many, and how to run something on a mesh of them."""
    import torch.distributed as dist

    from fnlm.sharding import Mesh, connect

    dist.init_process_group("gloo")
    known: dict[str, Mesh] = {}

    def run(shape: dict[str, int], rank: Any) -> Any:
        text = str(shape)
        if text not in known:
            known[text] = connect(shape, timeout=60)
        return rank(known[text])

    return dist.get_world_size(), run


def strategies_text(rows: list[Row]) -> list[str]:
    """The table for people."""
    head = ("strategy", "mesh", "off by", "in sync", "loss", "at rest", "peak", "sent", "planned", "tok/s")
    lines = [
        (r.strategy, r.mesh, f"{r.gap:.0e}", r.in_sync if r.in_sync == "yes" else "NO", f"{r.loss:.4f}",
         in_bytes(r.held), "-" if r.peak is None else in_bytes(r.peak), in_bytes(r.sent), in_bytes(r.planned),
         in_si(r.tokens_per_s))
        for r in rows
    ]  # fmt: skip
    apart = [f"{r.strategy}: {r.in_sync}" for r in rows if r.in_sync != "yes"]
    return [*columns([head, *lines], left=(0, 1), indent=""), *apart]


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
