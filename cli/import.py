"""`fnlm import`: a model that other software wrote becomes a run."""

from __future__ import annotations

import json
from pathlib import Path

import click

from cli.prepare import file_of
from fnlm import __version__, interop, params, tokenizers
from fnlm.interop import FORMATS, Foreign
from fnlm.tokenizers import Tokenizer


@click.command()
@click.argument("source", metavar="SOURCE")
@click.option("--from", "kind", type=click.Choice(FORMATS), help="What it is. [default: as it looks]")
@click.option("--out", type=click.Path(path_type=Path), metavar="FOLDER", help="The run. [default: runs/NAME]")
@click.option("--tokenizer", metavar="T", help="Not its own: gpt2, gpt2:FOLDER, char:TEXT, a tokenizer.json, or a run.")
@click.option("--force", is_flag=True, help="Replace the run that is there.")
@click.option("--json", "as_json", is_flag=True, help="What was read, as JSON.")
def command(source: str, kind: str | None, out: Path | None, tokenizer: str | None, force: bool, as_json: bool) -> None:
    """Make a run of a model that other software wrote.

    SOURCE is a folder as Hugging Face lays them out, a name on its hub, a GGUF file, a .bin of llama2.c's, or, with
    --from nanogpt, a ckpt.pt. The run holds the parameters as they were
    stored, and everything that takes a run takes it.
    """
    at = interop.find(source) or Path(source)
    model = interop.read(at, kind)
    vocabulary = tokenizer_for(model, tokenizer)
    folder = out or Path("runs") / (Path(source).stem if Path(source).is_file() else Path(source).resolve().name)
    interop.write(model, vocabulary, folder, force, fnlm=__version__)
    count = params.count(model.cfg)
    about = {"run": str(folder), "format": model.format, "architecture": model.architecture, "parameters": count}
    click.echo(
        json.dumps(about | {"tokens": vocabulary.vocab_size}, indent=2)
        if as_json
        else f"{folder}: {model.architecture}, {count:,} parameters, {vocabulary.vocab_size:,} tokens"
    )


def tokenizer_for(model: Foreign, name: str | None) -> Tokenizer:
    """The tokenizer that is named, else the model's own. CheckpointError for one that does not fit."""
    if name is None:
        return interop.read_tokenizer(model)
    kind, _, files = name.partition(":")
    if kind == "char":
        if not files:
            raise ValueError("--tokenizer char needs the text it was trained on: char:input.txt")
        found = tokenizers.train("char", [Path(files).read_bytes().decode("utf-8")])
    else:
        made = kind in ("byte", "gpt2", "cl100k") or not Path(name).exists()  # which says what is meant
        found = tokenizers.named(kind, files or None) if made else tokenizers.load(file_of(name))
    interop.check_tokenizer(found, model.cfg, model.source)
    return found
