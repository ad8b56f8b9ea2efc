"""`fnlm finetune`: a trained model, made to fit other data; the same loop with its own schedule."""

from __future__ import annotations

from pathlib import Path

import click

from cli.resuming import continued, to_resume
from cli.training import RunCommand, Wish, begun, open_data, pairs_of, run_options, separated
from fnlm import FINETUNING, overrides, trained
from fnlm.config import Compute, TrainConfig
from fnlm.loop import RunConfig
from fnlm.trained import Trained


@click.command(cls=RunCommand, context_settings={"ignore_unknown_options": True})
@click.argument("words", nargs=-1, type=click.UNPROCESSED, metavar="MODEL [FOLDER] [KEY=VALUE]...")
@run_options
def command(
    words: tuple[str, ...],
    data: Path | None,
    out: Path | None,
    resume: str | None,
    config: Path | None,
    track: tuple[str, ...],
    strategy: str | None,
    mesh: str | None,
    simulate: int | None,
    force: bool,
    partial: bool,
    dry_run: bool,
    quiet: bool,
    as_json: bool,
) -> int:
    """Train a trained model further, on other data.

    MODEL is a run or a checkpoint; FOLDER is data that `fnlm prepare` made with the model's own tokenizer. Of
    conversations, only the assistant's words are learnt. The settings are the preset's for finetuning; KEY=VALUE
    changes them.

        fnlm finetune runs/demo data/demo-chat steps=500
    """
    plain, given = overrides.split(words)
    given, options = separated(given, ())
    out = out or (Path(options["out"]) if "out" in options else None)
    if len(plain) > 1 and data is None:
        data = Path(plain.pop(1))
    data = data or (Path(options["data"]) if "data" in options else None)
    pairs = pairs_of(given, config, track, strategy=strategy, mesh=mesh)
    wish = Wish(pairs, data, out, resume, force, quiet, as_json, dry_run, partial, simulate)
    source = Path(plain[0]) if plain else None
    default = Path("runs") / (data.name if data else f"{source.name}-chat" if source else "chat")
    if found := to_resume(wish, default):
        return continued(found, wish)
    if source is None:
        raise click.UsageError("which model? name a run or checkpoint, such as runs/demo", click.get_current_context())
    if len(plain) > 1:
        raise ValueError(f"{plain[1]!r} is one word too many; a change is written key=value, for example lr=1e-4")
    model = trained.load(source)
    dataset = open_data(data, Path("data") / f"{source.name}-chat")
    base = model.cfg, settings_for(model), RunConfig(), Compute()
    return begun(base, wish, out or default, dataset, model, preset=model.config.get("preset"))


def settings_for(model: Trained) -> TrainConfig:
    """The preset's settings for finetuning; for other models 1000 steps at a tenth of their rate."""
    preset = model.config.get("preset")
    if preset in FINETUNING:
        return FINETUNING[preset]
    before = model.config.get("train", {})
    rate, size = before.get("lr", 3e-4) / 10, before.get("batch_size", 16)
    return TrainConfig(steps=1000, batch_size=size, lr=rate, warmup=50, schedule="linear")
