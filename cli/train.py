"""`fnlm train`: a preset and prepared data to a trained model; interrupted, it goes on where it was."""

from __future__ import annotations

from pathlib import Path

import click

from cli.options import Options, RunCommand, run_options, wished
from cli.resuming import continued, to_resume
from cli.training import begun, open_data, preset_and_data
from fnlm import PRESETS, TRAINING, trained
from fnlm.config import Compute, TrainConfig
from fnlm.loop import RunConfig


@click.command(cls=RunCommand, context_settings={"ignore_unknown_options": True})
@click.argument("words", nargs=-1, type=click.UNPROCESSED, metavar="[PRESET] [FOLDER] [KEY=VALUE]...")
@click.option("--init-from", type=click.Path(path_type=Path), metavar="MODEL", help="Start from a run or checkpoint.")
@run_options
def command(words: tuple[str, ...], init_from: Path | None, options: Options) -> int:
    """Train a model on prepared data.

    PRESET is a name that `fnlm inspect` lists, `demo` by default; FOLDER is data that `fnlm prepare` made,
    `data/PRESET` by default. KEY=VALUE, or --KEY VALUE, changes any field of the model, of training and of the run,
    by our names or nanoGPT's; batch=auto finds the largest micro-batch that fits.

        fnlm train shakespeare-char data/shakespeare steps=2000 --lr 3e-4

    SIGINT and SIGTERM save first; `--resume` goes on, bit for bit.
    """
    plain, meant, wish = wished(words, options, ("init_from",))
    name, folder = preset_and_data(plain, list(PRESETS))
    wish = wish._replace(data=options.data or folder or wish.data)
    if meant.get("init_from") == "resume":
        wish = wish._replace(resume=wish.resume or "auto")
    elif meant.get("init_from", "scratch") != "scratch":
        init_from = init_from or Path(meant["init_from"])
    default = Path("runs") / (name or "demo")
    if found := to_resume(wish, default):
        was = found.config.get("preset")
        if name and was != name:
            raise ValueError(
                f"{found.folder} is a run of {was}, not of {name}; leave the preset out, or give another --out"
            )
        return continued(found, wish)
    model = trained.load(init_from) if init_from else None
    preset = name or (model.config.get("preset") if model else "demo")
    base = PRESETS[preset] if model is None else model.cfg
    train = TRAINING.get(preset, TrainConfig(steps=1000, batch_size=16, lr=3e-4))
    dataset = open_data(wish.data, Path("data") / (preset or "demo"))
    return begun((base, train, RunConfig(), Compute()), wish, wish.out or default, dataset, model, preset=preset)
