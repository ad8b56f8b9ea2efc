"""`fnlm plan`: what a training step will hold and send on a mesh, without the hardware."""

from __future__ import annotations

import gc
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from math import prod
from typing import Any, get_args

import click

from cli.tables import columns, in_bytes, in_si, wrapped
from fnlm import PRESETS, TRAINING, count, override, overrides
from fnlm.config import ModelConfig, Optimizer, Precision, TrainConfig, did_you_mean
from fnlm.forecast import Forecast, checkpoint_bytes, forecast, same
from fnlm.sharded import check_model
from fnlm.sharding import STRATEGIES, Strategy, mesh_for, parse_mesh, planned, strategy
from fnlm.sharding.mesh import Shape, describe
from fnlm.sharding.shapes import Remembered
from fnlm.trainable import subset_of

DOES_NOT_FIT = 3
OPTIONS = ("--model", "--mesh", "--strategy", "--micro-batch", "--micro-batches", "--memory", "--precision",
           "--optimizer", "--seq-len", "--json")  # fmt: skip
PART = ("lora", "lora_alpha", "lora_targets", "freeze")  # fields of the training that say what is trained
UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}
LEFT_OUT = (
    "the allocator's slack", "workspaces of libraries", "torch itself", "temporaries of the optimizer",
    "evaluation and logging",
)  # fmt: skip


class Memory(click.ParamType):
    """80GB, 24GiB, or a number of bytes."""

    name = "memory"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        found = re.fullmatch(r"([\d.]+)\s*([kmgt]i?b)?", str(value).strip(), re.I)
        if found is None or found[1].count(".") > 1 or not float(found[1].strip(".") or 0):
            self.fail(f"{value!r} is no amount of memory; write e.g. 80GB or 24GiB", param, ctx)
        return int(float(found[1]) * UNITS.get((found[2] or "").upper(), 1))


@click.command(context_settings={"ignore_unknown_options": True})
@click.argument("words", nargs=-1, type=click.UNPROCESSED, metavar="[KEY=VALUE]...")
@click.option("--model", "name", metavar="PRESET", required=True, help="Of those that `fnlm inspect` lists.")
@click.option("--mesh", metavar="AXIS=N,...", required=True, help="For example data=64,tensor=8.")
@click.option(
    "--strategy",
    "names",
    metavar="NAME",
    multiple=True,
    help="Repeat it for several; all: those that can use the mesh. [default: all]",
)
@click.option("--micro-batch", type=click.IntRange(1), default=1, show_default=True, help="Rows of a rank at once.")
@click.option("--micro-batches", type=click.IntRange(1), default=1, show_default=True, help="Of them in a step.")
@click.option("--seq-len", type=click.IntRange(1), metavar="N", help="Tokens in a row. [default: the model's]")
@click.option("--memory", type=Memory(), metavar="80GB", help="Of each rank: says what fits.")
@click.option("--precision", type=click.Choice(get_args(Precision)), help="[default: the preset's]")
@click.option("--optimizer", type=click.Choice(get_args(Optimizer)), help="[default: the preset's]")
@click.option("--json", "as_json", is_flag=True, help="Everything as JSON.")
def command(
    words: tuple[str, ...],
    name: str,
    mesh: str,
    names: tuple[str, ...],
    micro_batch: int,
    micro_batches: int,
    seq_len: int | None,
    memory: int | None,
    precision: str | None,
    optimizer: str | None,
    as_json: bool,
) -> None:
    """Say what a training step will hold and send on a mesh.

    No hardware is needed: the step itself runs on tensors without storage, as the first and the last rank, and is
    counted. KEY=VALUE changes fields of the model as in `fnlm inspect`, or says what is trained of it: lora=8,
    freeze=embed. The exit code is 3 if nothing fits --memory.
    """
    if name not in PRESETS:
        raise ValueError(f"there is no preset {name!r}{did_you_mean(name, list(PRESETS))}")
    free, changes = overrides.split(words)
    if free:
        raise ValueError(f"{free[0]!r} is one word too many; a change is written key=value, for example n_layers=6")
    cfg = overrides.apply([c for c in changes if c[0] not in PART], ModelConfig, PRESETS[name], also=(*OPTIONS, *PART))
    if seq_len is not None:
        if seq_len > cfg.seq_len:
            raise ValueError(f"--seq-len {seq_len} is more than the model's seq_len={cfg.seq_len}; add seq_len=N")
        cfg = replace(cfg, seq_len=seq_len)
    given = {"precision": precision, "optimizer": optimizer}
    train = override(TRAINING.get(name, TrainConfig(steps=1, batch_size=1)), **{k: v for k, v in given.items() if v})
    train = replace(train, batch_size=micro_batch, micro_batches=micro_batches, ramp=())
    train = overrides.apply([c for c in changes if c[0] in PART], TrainConfig, train)
    subset_of(cfg, train)
    shape = parse_mesh(mesh)
    check_model(cfg, planned(shape))
    gc.disable()  # millions of small objects in no cycles: looking for those takes a fifth of the time
    try:
        rows = planned_rows(cfg, train, chosen(names, shape), shape)
    finally:
        gc.enable()
    report = account(name, cfg, train, shape, rows, memory)
    click.echo(json.dumps(report, indent=2) if as_json else "\n".join(text(report, rows)))
    if memory is not None and not report["fits"]:
        raise DoesNotFit(refusal(cfg, train, shape, rows, memory))


class DoesNotFit(ValueError):
    """An error that ends with the exit code of what does not fit."""

    exit_code = DOES_NOT_FIT


def usable(shape: Shape) -> list[str]:
    """The strategies that a mesh is of use to, each of its axes."""
    found = []
    for name, row in STRATEGIES.items():
        try:
            mesh_for(row, planned(shape).world, shape)
        except ValueError:
            continue
        found.append(name)
    return found


def chosen(names: Sequence[str], shape: Shape) -> list[str]:
    """The strategies asked for, by the names of the table. Raises ValueError where a mesh is of no use to one."""
    if not names or "all" in names:
        if found := usable(shape):
            return found
        raise ValueError(f"no strategy can use mesh {describe(shape)}; hsdp has replica and shard, the others data")
    words = [part for name in names for part in name.split(",")]
    for word in words:
        mesh_for(strategy(word), planned(shape).world, shape)
    return list(dict.fromkeys(word if ":" in word else strategy(word).name for word in words))


def ranks_of(
    cfg: ModelConfig, train: TrainConfig, how: str, shape: Shape, shapes: Remembered | None = None
) -> list[Forecast]:
    """The first rank, and the last where it is another one; where both do the same, it is computed once."""
    first, last = forecast(cfg, train, how, shape, shapes=shapes), planned(shape).world - 1
    if not last:
        return [first]
    alike = same(cfg, how, shape, (0, last), train)
    return [first, first._replace(rank=last) if alike else forecast(cfg, train, how, shape, last, shapes=shapes)]


def planned_rows(cfg: ModelConfig, train: TrainConfig, names: Sequence[str], shape: Shape) -> dict[str, list[Forecast]]:
    """The ranks of each strategy; strategies that differ by name alone are computed once."""
    known: dict[Strategy, list[Forecast]] = {}
    shapes, rows = Remembered(), {}
    for how in names:
        kind = replace(strategy(how), name="", axes=(), also=(), reducer="own")
        if train.micro_batches == 1:  # it does not matter how several add up
            kind = replace(kind, accumulate="local")
        if kind not in known:
            known[kind] = ranks_of(cfg, train, how, shape, shapes)
        rows[how] = [r._replace(strategy=how) for r in known[kind]]
    return rows


def most(ranks: Sequence[Forecast]) -> int:
    """The highest peak among ranks."""
    return max(r.peak for r in ranks)


def account(
    name: str, cfg: ModelConfig, train: TrainConfig, shape: Shape, rows: dict[str, list[Forecast]], memory: int | None
) -> dict[str, Any]:
    """Everything, fit for JSON; bytes are whole numbers but for what leaves a rank in a ring."""
    subset = subset_of(cfg, train)
    return {
        "model": name,
        "parameters": count(cfg),
        "mesh": shape,
        "ranks": planned(shape).world,
        "micro_batch": train.batch_size,
        "micro_batches": train.micro_batches,
        "seq_len": cfg.seq_len,
        "precision": train.precision,
        "optimizer": train.optimizer,
        "trained": sum(prod(subset.sizes[k]) for k in subset.names),
        "checkpoint_bytes": checkpoint_bytes(cfg, train),
        "strategies": {how: [r._asdict() for r in ranks] for how, ranks in rows.items()},
        "memory": memory,
        "fits": None if memory is None else [how for how, ranks in rows.items() if most(ranks) <= memory],
        "not_in_it": list(LEFT_OUT),
    }


def text(report: dict[str, Any], rows: dict[str, list[Forecast]]) -> list[str]:
    """The report for people."""
    n, memory = report["ranks"], report["memory"]
    tokens = f"{report['micro_batch']} x {report['seq_len']:,} tokens a rank"
    batches = f", {report['micro_batches']} micro-batches" if report["micro_batches"] > 1 else ""
    where = f"on {describe(report['mesh'])}, {n} rank{'s' if n > 1 else ''}"
    lines = [f"{report['model']}, {in_si(report['parameters'])} parameters, {where}"]
    some = "" if report["trained"] == report["parameters"] else f", {in_si(report['trained'])} trained"
    lines += [f"{tokens}{batches}, {report['precision']}, {report['optimizer']}{some}", ""]
    lines += columns([HEAD + (("fits",) if memory else ()), *cells(rows, memory)], left=(0,))
    lines += ["", f"a checkpoint: {in_bytes(report['checkpoint_bytes'])}, all ranks together"]
    if memory is not None:
        lines += [f"fit {in_bytes(memory)}: {', '.join(report['fits']) or 'none'}"]
    if "ddp" in rows:
        lines += ["ddp is counted as ddp_bucketed; PyTorch's reducer holds and sends the same gradients"]
    return [*lines, *wrapped([f"not in it: {LEFT_OUT[0]}", *LEFT_OUT[1:]], indent="")]


HEAD = ("strategy", "rank", "params", "grads", "optimizer", "activations", "peak", "sent a step", "calls")


def cells(rows: dict[str, list[Forecast]], memory: int | None) -> Iterator[tuple[str, ...]]:
    """The lines of the table."""
    for how, ranks in rows.items():
        for i, r in enumerate(ranks):
            held = (r.parameters, r.gradients, r.optimizer_state, r.activations, r.peak)
            sent = ", ".join(f"{axis} {in_bytes(b)}" for axis, b in r.sent.items() if b >= 1024) or "-"
            fits = ("yes" if r.peak <= memory else "no",) if memory else ()
            yield ("" if i else how, str(r.rank), *map(in_bytes, held), sent, str(r.collectives), *fits)


def refusal(cfg: ModelConfig, train: TrainConfig, shape: Shape, rows: dict[str, list[Forecast]], memory: int) -> str:
    """That nothing fits, and the nearest that would."""
    least = min(rows, key=lambda how: most(rows[how]))
    short = f"nothing fits {in_bytes(memory)}: the least is {least} with {in_bytes(most(rows[least]))}"
    for how, mesh, few in nearest(shape, least, train.batch_size, list(rows)):
        if impossible(cfg, mesh):
            continue
        ranks = ranks_of(cfg, replace(train, batch_size=few), how, mesh)
        if most(ranks) <= memory:
            told = f"--strategy {how} --mesh {describe(mesh)} --micro-batch {few}"
            return f"{short}; the nearest that would: {told}, {in_bytes(most(ranks))}"
    return f"{short}; no smaller micro-batch would, nor 64 times as many ranks on one axis; take a smaller model"


def impossible(cfg: ModelConfig, shape: Shape) -> bool:
    """Whether the model cannot be split so."""
    try:
        check_model(cfg, planned(shape))
    except ValueError:
        return True
    return False


def nearest(shape: Shape, least: str, rows: int, tried: Sequence[str]) -> Iterator[tuple[str, Shape, int]]:
    """What to try, the least change first: another strategy, a smaller micro-batch, more ranks."""
    thrifty = [how for how in ("zero2", "zero3", "hsdp") if how in usable(shape)]
    yield from ((how, shape, rows) for how in thrifty if how not in tried)
    best = thrifty[-1] if thrifty else least
    halves = [rows >> k for k in range(1, rows.bit_length())]
    yield from ((best, shape, few) for few in halves)
    for times in (2, 4, 8, 16, 32, 64):
        for axis in ("shard", "data", "tensor"):
            how = best if axis != "tensor" or "tensor" in STRATEGIES[best].also else "tensor_parallel"
            if axis in (*STRATEGIES[how].axes, *STRATEGIES[how].also):
                yield how, {**shape, axis: shape.get(axis, 1) * times}, 1
