"""`fnlm finetune`: a trained model, made to fit other data; the same loop with its own schedule."""

from __future__ import annotations

from pathlib import Path

import click

from cli import settings as gather
from cli.options import Options, RunCommand, run_options, wished
from cli.resuming import continued, to_resume
from cli.training import begun, open_data
from fnlm import FINETUNING, trained
from fnlm.config import Compute, TrainConfig, override
from fnlm.loop import RunConfig
from fnlm.trained import Trained


@click.command(cls=RunCommand, context_settings={"ignore_unknown_options": True})
@click.argument("words", nargs=-1, type=click.UNPROCESSED, metavar="MODEL [FOLDER] [KEY=VALUE]...")
@run_options
def command(words: tuple[str, ...], options: Options) -> int:
    """Train a trained model further, on other data.

    MODEL is a run or a checkpoint; FOLDER is data that `fnlm prepare` made with the model's own tokenizer. Of
    conversations, only the assistant's words are learnt. The settings are the preset's for finetuning; KEY=VALUE
    changes them.

        fnlm finetune runs/demo data/demo-chat steps=500
    """
    plain, _, wish = wished(words, options)
    if len(plain) > 1 and options.data is None:
        wish = wish._replace(data=Path(plain.pop(1)))
    source = Path(plain[0]) if plain else None
    default = Path("runs") / (wish.data.name if wish.data else f"{source.name}-chat" if source else "chat")
    if found := to_resume(wish, default):
        return continued(found, wish)
    if source is None:
        raise click.UsageError("which model? name a run or checkpoint, such as runs/demo", click.get_current_context())
    if len(plain) > 1:
        raise ValueError(f"{plain[1]!r} is one word too many; a change is written key=value, for example lr=1e-4")
    model = trained.load(source)
    dataset = open_data(wish.data, Path("data") / f"{source.name}-chat")
    train = settings_for(model, adapters=gather.given(wish.pairs, "lora"), chat=dataset.manifest["kind"] == "chat")
    base = model.cfg, train, RunConfig(), Compute()
    return begun(base, wish, wish.out or default, dataset, model, preset=model.config.get("preset"))


def settings_for(model: Trained, adapters: bool = False, chat: bool = False) -> TrainConfig:
    """The preset's settings for finetuning; for other models 1000 steps at a tenth of their rate, 3e-5 if unknown.

    For `adapters` ten times the rate: they begin at nothing (Schulman et al. 2025, "LoRA Without Regret"). No word of
    one `chat` looks into another.
    """
    preset = model.config.get("preset")
    if preset in FINETUNING:
        found = FINETUNING[preset]
    else:
        before = model.config.get("train", {})
        rate, size = before.get("lr", 3e-4) / 10, before.get("batch_size", 16)
        found = TrainConfig(steps=1000, batch_size=size, lr=rate, warmup=50, schedule="linear")
        found = override(found, documents="apart") if chat else found
    return override(found, lr=10 * found.lr, min_lr=10 * found.min_lr) if adapters else found
