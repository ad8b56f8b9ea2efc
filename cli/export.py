"""`fnlm export`: a model in the files of other software, with a proof that it is the same."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click
import torch

from cli.choosing import which_parameters
from cli.eval import checkpoint_of
from fnlm import trained
from fnlm.interop import TARGETS, Model, homes, parity, to_gguf, to_hf, to_peft
from fnlm.interop.shards import size_of
from fnlm.params import cast
from fnlm.trained import Which

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
DTYPES_OF = {"hf": tuple(DTYPES), "gguf": ("fp32", "fp16", "q8_0"), "peft": tuple(DTYPES)}


@click.command()
@click.argument("model", metavar="MODEL")
@click.option("--to", "target", type=click.Choice(TARGETS), default="hf", show_default=True, help="Whose files.")
@click.option("--out", type=click.Path(path_type=Path), metavar="PATH", help="[default: exports/NAME]")
@click.option("--dtype", type=click.Choice([*DTYPES, "q8_0"]), help="Of the weights. [default: as saved; gguf: fp16]")
@click.option("--shard-size", metavar="SIZE", help="Of a file of weights at most, such as 2GB. [default: one file]")
@which_parameters
@click.option("--no-parity", is_flag=True, help="Do not run both sides to compare them.")
@click.option("--force", is_flag=True, help="Replace what is there.")
@click.option("--json", "as_json", is_flag=True, help="What was written and compared, as JSON.")
def command(
    model: str,
    target: str,
    out: Path | None,
    dtype: str | None,
    shard_size: str | None,
    checkpoint: str,
    no_ema: bool,
    no_parity: bool,
    force: bool,
    as_json: bool,
) -> None:
    """Write a model in the files of other software.

    MODEL is a run, a checkpoint, or what `fnlm import` takes. hf is a folder that AutoModelForCausalLM and
    AutoTokenizer read; gguf a file of llama.cpp's, for the Llama family;
    peft the adapters alone of a run with lora, for the model it began with. Where transformers is installed a folder is
    compared with the model, and its PARITY.json says how far they agree.
    """
    if dtype and dtype not in DTYPES_OF[target]:
        raise ValueError(f"--dtype {dtype} is not for {target}; choose from {', '.join(DTYPES_OF[target])}")
    if shard_size and target != "hf":
        raise ValueError(f"--shard-size is for hf; {target} is one file")
    most = size_of(shard_size) if shard_size else None
    which: Which = "newest" if checkpoint == "newest" else "best"
    if target == "peft":
        folder = out or Path("exports") / f"{Path(model).resolve().name}-peft"
        told_of = adapters_to(checkpoint_of(model, checkpoint), which, not no_ema, folder, dtype, force)
        click.echo(json.dumps(told_of, indent=2) if as_json else f"{folder}: adapters of {told_of['base']}")
        return
    found = trained.load(checkpoint_of(model, checkpoint), which, average=not no_ema, dtype="saved")
    name = Path(model).stem if Path(model).is_file() else Path(model).resolve().name
    if target == "gguf":
        file = out or Path("exports") / f"{name}.gguf"
        to_gguf(Model(found.cfg, found.params, found.tokenizer, found.config), file, dtype or "fp16", force)
        click.echo(json.dumps({"path": str(file), "to": target}, indent=2) if as_json else str(file))
        return
    params = cast(found.params, DTYPES[dtype]) if dtype else found.params
    leaving = Model(found.cfg, params, found.tokenizer, found.config)
    folder = out or Path("exports") / name
    comparing = parity.is_possible() and not no_parity
    said = to_hf(leaving, folder, force, parity.parity if comparing else None, most)
    architecture = homes.home(found.cfg).architecture
    report = {"path": str(folder), "to": target, "architecture": architecture, "parity": said}
    click.echo(json.dumps(report, indent=2) if as_json else f"{folder}: {architecture}, {told(said)}")
    if not comparing and not no_parity:
        click.echo("transformers is not installed, so nothing was compared: pip install 'fnlm[hub]'", err=True)
    if comparing and not said["passed"]:
        raise click.ClickException(
            f"{folder} is not the same model: {failed(said)}; {folder / 'PARITY.json'} says more"
        )


def adapters_to(
    path: str | Path, which: Which, average: bool, folder: Path, dtype: str | None, force: bool
) -> dict[str, Any]:
    """Write a run's adapters for `peft`; returns what there is to say."""
    found = trained.adapters(path, which, average)
    came = found.config.get("interop", {})
    base = str(came["source"] if came.get("format") == "hf" else found.config.get("init_from"))
    params = cast(found.params, DTYPES[dtype]) if dtype else found.params
    to_peft(found.cfg, params, found.rank, found.scale, base, folder, force)
    return {"path": str(folder), "to": "peft", "base": base, "rank": found.rank, "scale": found.scale}


def told(said: dict[str, Any]) -> str:
    """What a comparison found, in a few words."""
    if not said["checked"]:
        return "not compared"
    return f"logits within {said['logits']['max_difference']:.1e} of transformers {said['transformers']}"


def failed(said: dict[str, Any]) -> str:
    """What differs."""
    logits, tokenizer = said["logits"], said["tokenizer"]
    parts = {
        f"logits differ by {logits['max_difference']:.1e}, more than {logits['tolerance']:.1e}": logits[
            "max_difference"
        ]
        <= logits["tolerance"],
        "greedy tokens differ": said["greedy_equal"],
        f"{tokenizer['differing']} of {tokenizer['texts']} texts have other ids": not tokenizer["differing"],
        "chats are written differently": said["template_equal"],
    }
    return ", ".join(text for text, fine in parts.items() if not fine)
