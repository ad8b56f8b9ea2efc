"""`fnlm eval`: the loss of models on prepared data, or how many of the demo world's questions they answer."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import torch

from cli.tables import columns
from fnlm import data, trained
from fnlm.data import DataError, Dataset
from fnlm.evaluate import evaluate, window_starts
from fnlm.quantize import dequantize
from fnlm.quantize import quantize as small
from fnlm.trained import Trained

Row = dict[str, Any]

SEED = 0  # of the questions; all of them, whatever the seed, are held out
ANSWER_TOKENS = 64  # the longest answer is a sentence
TOGETHER = 128  # questions asked at once, of about one length


@click.command()
@click.argument("models", nargs=-1, metavar="MODEL...")
@click.option("--data", "folder", metavar="FOLDER", help="Prepared data. [default: what the model was trained on]")
@click.option("--split", type=click.Choice(["val", "train"]), default="val", show_default=True, help="Of the data.")
@click.option("--seq-len", type=click.IntRange(1), metavar="N", help="Tokens in a window. [default: the model's]")
@click.option(
    "--stride",
    type=click.IntRange(1),
    metavar="N",
    help="Windows overlap and begin every N tokens; each token is counted once. [default: side by side]",
)
@click.option("--limit", type=click.IntRange(1), metavar="N", help="N windows, spread evenly. [default: all]")
@click.option(
    "--checkpoint", default="best", show_default=True, metavar="C", help="Of a run: best, newest, or a step's number."
)
@click.option("--no-ema", is_flag=True, help="The parameters themselves where the run kept their moving average.")
@click.option(
    "--precision", type=click.Choice(["fp32", "bf16"]), default="fp32", show_default=True, help="Of the products."
)
@click.option("--quantize", is_flag=True, help="With matrices rounded to int8, as 'fnlm serve --quantize' has them.")
@click.option("--device", metavar="D", help="cpu, cuda or cuda:N. [default: cuda where there is a GPU]")
@click.option("--questions", type=click.IntRange(1), metavar="N", help="Ask N questions of the demo world instead.")
@click.option("--json", "as_json", is_flag=True, help="The figures as JSON, with all digits.")
def command(
    models: tuple[str, ...],
    folder: str | None,
    split: str,
    seq_len: int | None,
    stride: int | None,
    limit: int | None,
    checkpoint: str,
    no_ema: bool,
    precision: str,
    quantize: bool,
    device: str | None,
    questions: int | None,
    as_json: bool,
) -> None:
    """Measure a model's loss on prepared data.

    MODEL is a run or a checkpoint. The loss is the mean over every token of the split, in nats; of conversations over
    the learnt tokens. --questions asks a chat model what no demo story and no demo chat has said, and counts right
    answers.
    """
    if not models:
        raise click.UsageError("name a model, such as runs/demo", click.get_current_context())
    if questions and folder:
        raise click.UsageError("--questions are asked without --data", click.get_current_context())
    rows = []
    for path in models:
        at, to = checkpoint_of(path, checkpoint), device or ("cuda" if torch.cuda.is_available() else "cpu")
        which = trained.load(at, "newest" if checkpoint == "newest" else "best", average=not no_ema, device=to)
        if quantize:
            which = rounded(which)
        if questions:
            rows.append({"model": path, "checkpoint": str(which.path), "step": which.step} | asked(which, questions))
        else:
            rows.append(measured(path, which, folder, split, seq_len, stride, limit, precision))
        click.echo(f"{path}: {rows[-1]['seconds']:.1f} s", err=True)
    lines = scores(rows) if questions else losses(rows)
    click.echo(json.dumps({"models": rows}, indent=2) if as_json else "\n".join(lines))


def rounded(model: Trained) -> Trained:
    """A model with the matrices that int8 leaves of it."""
    return model._replace(params=dequantize(small(model.params)), cfg=replace(model.cfg, tied=False))


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


def measured(
    name: str,
    model: Trained,
    folder: str | None,
    split: str,
    seq_len: int | None,
    stride: int | None,
    limit: int | None,
    precision: Any,
) -> Row:
    """The figures of one model, fit for JSON."""
    dataset = data_of(name, model, folder)
    text = getattr(dataset, split)
    found = evaluate(model.params, model.cfg, text, seq_len=seq_len, stride=stride, limit=limit, precision=precision)
    seq_len = seq_len or model.cfg.seq_len
    windows = len(window_starts(len(text.tokens), seq_len, stride or seq_len))
    return {
        "model": name,
        "checkpoint": str(model.path),
        "step": model.step,
        "data": str(dataset.folder),
        "split": split,
        "counted": "all tokens" if text.mask is None else "learnt tokens",
        "seq_len": seq_len,
        "stride": stride or seq_len,
        "windows": min(limit or windows, windows),
        "of_windows": windows,
        **found._asdict(),
    }


def data_of(name: str, model: Trained, folder: str | None) -> Dataset:
    """The data to measure on. Raises DataError where there are none, or of another tokenizer than the model's."""
    folder = folder or model.config.get("data")
    if not folder:
        raise DataError(f"{name} does not say what it was trained on; name the data with --data FOLDER")
    dataset = data.open(folder)
    if dataset.tokenizer.sha256 != model.tokenizer.sha256:
        ours, theirs = (f"{t.kind} of {t.vocab_size:,} tokens" for t in (model.tokenizer, dataset.tokenizer))
        raise DataError(
            f"{folder} was made with another tokenizer ({theirs}, sha256 {dataset.tokenizer.sha256[:8]}) than {name} "
            f"({ours}, {model.tokenizer.sha256[:8]}); prepare it with --tokenizer {model.path}"
        )
    return dataset


def losses(rows: Sequence[Row]) -> list[str]:
    """A line for each model."""
    head = ["model", "step", "data", "loss", "perplexity", "bits/byte", "tokens", "seconds"]
    table = [[r["model"], f"{r['step']:,}", f"{r['data']} {r['split']}", *figures(r)] for r in rows]
    lines = columns([head, *table], (0, 2), "")
    if any(r["counted"] == "learnt tokens" for r in rows):
        lines.append("of conversations only the learnt tokens are counted: the answers and their ends")
    some = {f"{r['windows']:,} of {r['of_windows']:,} windows" for r in rows if r["windows"] < r["of_windows"]}
    return lines + [f"measured on {', '.join(sorted(some))}"] * bool(some)


def figures(row: Row) -> list[str]:
    """The numbers of one line."""
    bits = "-" if row["bits_per_byte"] is None else f"{row['bits_per_byte']:.4f}"
    perplexity = f"{row['perplexity']:.4g}" if row["perplexity"] < 1e4 else f"{row['perplexity']:.2e}"
    return [f"{row['loss']:.4f}", perplexity, bits, f"{row['tokens']:,}", f"{row['seconds']:.1f}"]


def asked(model: Trained, count: int) -> Row:
    """The score on `count` held-out questions of the demo world, answered greedily, and the seconds it took."""
    from fnlm import random, world
    from fnlm.generate import complete
    from fnlm.sampling import Settings

    began, questions = time.perf_counter(), world.questions(SEED, count)
    prompts = [data.prompt(model.tokenizer, q.messages) for q in questions]
    settings = Settings(temperature=0.0, max_tokens=ANSWER_TOKENS)
    answers = [""] * count
    # Rows of about one length: a batch is as long as its longest prompt.
    order = sorted(range(count), key=lambda i: len(prompts[i]))
    for at in range(0, count, TOGETHER):
        some = order[at : at + TOGETHER]
        said = complete(
            model.params, model.cfg, model.tokenizer, [prompts[i] for i in some], settings, random.key(0), chat=True
        )
        for i, answer in zip(some, said, strict=True):
            answers[i] = answer.text
    score = world.score(answers, questions)
    examples = [
        {"kind": q.kind, "question": q.messages[-1]["content"], "answer": said, "expected": q.answer}
        for said, q in zip(answers, questions, strict=True)
    ]
    return {"questions": count, "score": score, "seconds": time.perf_counter() - began, "answers": examples}


def scores(rows: Sequence[Row]) -> list[str]:
    """A column for each model, a line for each kind of question, and all of them below."""
    kinds = [kind for kind in rows[0]["score"] if kind != "overall"]
    table = [
        ["right answers", *(r["model"] for r in rows)],
        *([kind, *(f"{100 * r['score'][kind]:.1f} %" for r in rows)] for kind in kinds),
        [f"all {rows[0]['questions']:,}", *(f"{100 * r['score']['overall']:.1f} %" for r in rows)],
    ]
    return columns(table, indent="")
