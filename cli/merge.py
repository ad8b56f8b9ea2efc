"""`fnlm merge`: several models of one shape become one, and so do a model and its adapters."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
import torch

from cli.choosing import which_parameters
from cli.eval import checkpoint_of
from fnlm import __version__, interop, merging, trained
from fnlm.checkpoint import CheckpointError
from fnlm.params import cast
from fnlm.trained import Trained, Which

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
KEPT = ("preset", "data", "template", "interop")  # of the config of the first model


@click.command()
@click.argument("models", nargs=-1, metavar="MODEL...")
@click.option("--out", type=click.Path(path_type=Path), metavar="FOLDER", help="The run that comes of it.")
@click.option("--weights", metavar="W,W,...", help="One for each model. [default: the same for all]")
@click.option("--base", metavar="MODEL", help="Add the models' differences from this one to it.")
@which_parameters
@click.option("--dtype", type=click.Choice(list(DTYPES)), help="Of the parameters. [default: as saved]")
@click.option("--force", is_flag=True, help="Replace the run that is there.")
@click.option("--json", "as_json", is_flag=True, help="What was merged, as JSON.")
def command(
    models: tuple[str, ...],
    out: Path | None,
    weights: str | None,
    base: str | None,
    checkpoint: str,
    no_ema: bool,
    dtype: str | None,
    force: bool,
    as_json: bool,
) -> None:
    """Make one model of several of one shape.

    Their average (a soup), or with --base the base and the sum of the weighted differences from it (task arithmetic). A
    single run that was trained with adapters (lora=...) becomes a model without: they are added in. The result is a run
    that every command reads; its config.json says what it was made of.
    """
    if not models:
        raise click.UsageError("name the models to merge, such as runs/a runs/b", click.get_current_context())
    if out is None:
        raise click.UsageError("name the run that comes of it: --out FOLDER", click.get_current_context())
    shares = shares_of(weights, len(models))
    which: Which = "newest" if checkpoint == "newest" else "best"
    names = [*models, *([base] if base else [])]
    at = [checkpoint_of(name, checkpoint) for name in names]
    if any(path.resolve().is_relative_to(out.resolve()) for path in at):
        raise ValueError(f"--out {out} holds a model that is merged; choose another")
    found = [trained.load(path, which, average=not no_ema, dtype="saved") for path in at]
    check(names, found)
    trees = [model.params for model in found[: len(models)]]
    params = merging.add_differences(found[-1].params, trees, shares) if base else merging.average(trees, shares)
    made: dict[str, Any] = {
        "method": "task arithmetic" if base else "average",
        "models": sources(models, found, shares),
    }
    made |= {"base": sources([base], found[-1:], [1.0])[0]} if base else {}
    config = config_of(found, {**made, "fnlm": __version__})
    interop.write_run(cast(params, DTYPES[dtype]) if dtype else params, config, found[0].tokenizer, out, force)
    text = f"{out}: {made['method']} of {len(models)} {'model' if len(models) == 1 else 'models'}"
    click.echo(json.dumps({"run": str(out), **made}, indent=2) if as_json else text + (f" on {base}" if base else ""))


def shares_of(weights: str | None, models: int) -> list[float]:
    """The weights as numbers, 1 for each model where none are given. ValueError for what is none, or too few."""
    if weights is None:
        return [1.0] * models
    try:
        found = [float(word) for word in weights.split(",")]
    except ValueError as error:
        raise ValueError(f"--weights {weights} are not numbers with commas between them") from error
    if len(found) != models:
        raise ValueError(f"--weights {weights} are {len(found)}, the models {models}; give one for each")
    return found


def check(names: Sequence[str], models: Sequence[Trained]) -> None:
    """Raises CheckpointError, naming what differs, unless all models have one architecture and one tokenizer."""
    for name, model in list(zip(names, models, strict=True))[1:]:
        if lacking := merging.differing(models[0].cfg, model.cfg):
            raise CheckpointError(f"{names[0]} and {name} are not of one architecture: {', '.join(lacking)}")
        if model.tokenizer.sha256 != models[0].tokenizer.sha256:
            ours, theirs = (f"{t.kind} of {t.vocab_size:,} tokens" for t in (models[0].tokenizer, model.tokenizer))
            raise CheckpointError(f"{names[0]} and {name} have different tokenizers: {ours} and {theirs}")


def sources(names: Sequence[str], models: Sequence[Trained], shares: Sequence[float]) -> list[dict[str, Any]]:
    """What each model was: its name, checkpoint, step and weight, and the digest of its checkpoint."""
    found = []
    for name, model, share in zip(names, models, shares, strict=False):
        mark = model.path / "COMMITTED"
        digest = {"sha256": mark.read_text(encoding="utf-8").strip()} if mark.is_file() else {}
        found.append({"model": name, "checkpoint": str(model.path), "step": model.step, "weight": share, **digest})
    return found


def config_of(models: Sequence[Trained], made: dict[str, Any]) -> dict[str, Any]:
    """config.json of the run: the first model's, without how it was trained."""
    first = models[0]
    tokenizer = {"kind": first.tokenizer.kind, "sha256": first.tokenizer.sha256}
    kind = "chat" if any(model.is_chat for model in models) else "text"
    kept = {name: first.config[name] for name in KEPT if name in first.config}
    return {"model": asdict(first.cfg), "kind": kind, "init_from": None, **kept, "tokenizer": tokenizer, "merge": made}
