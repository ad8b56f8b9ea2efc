"""`fnlm eval`: how well models predict a text, and what they make of tasks; a table, and a file of results."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import click

from cli import bits
from cli.choosing import which_parameters
from cli.measuring import Row, Wanted, needs_lm_eval, rows_of, tables
from cli.results import interrupted, keep, must_be_file, write
from fnlm import trained
from fnlm.checkpoint.layout import committed
from fnlm.data import DataError
from fnlm.loop.signals import Stop
from fnlm.quantize import Bits, dequantize
from fnlm.quantize import quantize as small
from fnlm.trained import Trained


@click.command(cls=bits.Command)
@click.argument("models", nargs=-1, metavar="MODEL...")
@click.option(
    "--data",
    multiple=True,
    metavar="PATH",
    help="Prepared data, or a text file or folder; several times. [default: what the model was trained on]",
)
@click.option("--split", type=click.Choice(["val", "train"]), help="Of prepared data. [default: val]")
@click.option("--seq-len", type=click.IntRange(1), metavar="N", help="Tokens in a window. [default: the model's]")
@click.option(
    "--stride",
    type=click.IntRange(1),
    metavar="N",
    help="Windows overlap and begin every N tokens; each token is counted once. [default: side by side]",
)
@click.option("--limit", type=click.IntRange(1), metavar="N", help="N windows, spread evenly, or N examples.")
@which_parameters
@click.option("--all-checkpoints", is_flag=True, help="All checkpoints of each run, a line for each.")
@click.option(
    "--precision", type=click.Choice(["fp32", "bf16"]), default="fp32", show_default=True, help="Of the products."
)
@bits.option("With matrices rounded to int8 (or int4), as 'fnlm serve --quantize' has them.")
@click.option("--device", metavar="D", help="cpu, cuda or cuda:N. [default: cuda where there is a GPU]")
@click.option("--questions", type=click.IntRange(1), metavar="N", help="Ask N questions of the demo world instead.")
@click.option("--lambada", metavar="FILE", help="Texts in LAMBADA's format: how often the last word is right.")
@click.option("--hellaswag", metavar="FILE", help="Beginnings and endings in HellaSwag's format.")
@click.option("--tasks", metavar="A,B", help="Tasks of lm-eval's by name (pip install 'fnlm[eval]').")
@click.option("--task-folder", type=click.Path(path_type=Path), metavar="DIR", help="With YAML files of such tasks.")
@click.option("--shots", type=click.IntRange(0), metavar="N", help="Examples before each question of --tasks.")
@click.option("--out", type=click.Path(path_type=Path), metavar="FILE", help="The figures as JSON in a file, too.")
@click.option("--json", "as_json", is_flag=True, help="The figures as JSON, with all digits.")
def command(
    models: tuple[str, ...],
    checkpoint: str,
    all_checkpoints: bool,
    no_ema: bool,
    quantize: bits.Quantized | None,
    device: str | None,
    out: Path | None,
    as_json: bool,
    **options: Any,
) -> int:
    """Measure models on a text, or on tasks.

    MODEL is a run, a checkpoint, or what `fnlm import` takes. The loss is the mean over every token, in nats; of
    conversations over the learnt tokens; and the same for each word and byte. --questions asks a chat model what no
    demo story and no demo chat has said. Figures are also kept in evaluations.jsonl of each run. Interrupted, it says
    what was measured until then.
    """
    wanted = Wanted(**options)
    from cli.sample import device_of  # which takes what it needs from here

    check(models, wanted)
    if all_checkpoints and checkpoint != "best":
        raise click.UsageError("--all-checkpoints takes them all; leave --checkpoint out", click.get_current_context())
    if out:
        must_be_file(out, "results.json")
    to = device_of(device)
    rows: list[Row] = []
    with Stop(lambda line: click.echo(line, err=True), "showing what is measured so far") as stop, shown(rows, as_json):
        for name, at in chosen(models, checkpoint, all_checkpoints):
            which: Literal["newest", "best"] = "newest" if checkpoint == "newest" else "best"
            model = trained.load(at, which, average=not no_ema, device=to)
            if quantize:
                model = rounded(model, bits.BITS[quantize])
            for row in (r for r in rows_of(name, model, wanted, stop) if r.get("tokens", 1)):
                rows.append({"model": name, "checkpoint": str(model.path), "step": model.step, **row})
                keep(model.path, rows[-1])
                click.echo(f"{name}: {row['seconds']:.1f} s", err=True)
            if stop():
                break
    if out:
        write(out, rows)
    if stop.signal is None:
        return 0
    click.echo(interrupted(rows, len(models)), err=True)
    return 128 + stop.signal


@contextmanager
def shown(rows: list[Row], as_json: bool) -> Iterator[None]:
    """Prints what is measured at the end; after an error, where there is something."""
    done = False
    try:
        yield
        done = True
    finally:
        if done or rows:
            click.echo(json.dumps({"models": rows}, indent=2) if as_json else "\n".join(tables(rows)))


def check(models: tuple[str, ...], wanted: Wanted) -> None:
    """Raises what is wrong with the command line, before anything is loaded."""
    context = click.get_current_context()
    if not models:
        raise click.UsageError("name a model, such as runs/demo", context)
    if wanted.questions and wanted.data:
        raise click.UsageError("--questions are asked without --data", context)
    if not wanted.tasks and (wanted.task_folder or wanted.shots is not None):
        raise click.UsageError("--task-folder and --shots are for --tasks; name some", context)
    if wanted.tasks:
        needs_lm_eval()


def chosen(models: tuple[str, ...], checkpoint: str, every: bool) -> Iterator[tuple[str, Path]]:
    """Each model's name and what to load of it; `every`: all checkpoints of a run, the first one first."""
    for path in models:
        if not every:
            yield path, checkpoint_of(path, checkpoint)
            continue
        folder = Path(path) / "checkpoints"
        found = {each.step: each.path for each in sorted(committed(folder), key=lambda each: each.what == "all")}
        if not found:
            raise DataError(f"{path} is no run with checkpoints; leave --all-checkpoints out")
        yield from ((path, found[step]) for step in sorted(found))


def rounded(model: Trained, to: Bits) -> Trained:
    """A model with the matrices that so many bits leave of it."""
    return model._replace(params=dequantize(small(model.params, to)), cfg=replace(model.cfg, tied=False))


def checkpoint_of(path: str, checkpoint: str) -> Path:
    """What to load: the path itself, or the checkpoint of that step below it. Raises DataError where it has none."""
    if checkpoint in ("best", "newest"):
        return Path(path)
    if not checkpoint.isdecimal():
        raise ValueError(f"--checkpoint {checkpoint} is not best, newest or the number of a step")
    folder = Path(path) / "checkpoints" if (Path(path) / "checkpoints").is_dir() else Path(path)
    for name in (f"{int(checkpoint):08d}", f"{int(checkpoint):08d}.params"):
        if (folder / name).is_dir():
            return folder / name
    steps = sorted({int(p.name[:8]) for p in folder.glob("[0-9]*") if p.name[:8].isdecimal()})
    known = ", ".join(map(str, steps)) or "none"
    raise DataError(f"{folder} has no checkpoint of step {int(checkpoint)}; it has {known}")
