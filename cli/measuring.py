"""What `fnlm eval` measures: a row of figures for each model and text or task, and the tables that show them."""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import click

from cli.tables import columns
from fnlm import data, evaluation
from fnlm.data import DataError, Split
from fnlm.data.manifest import FILE
from fnlm.evaluate import evaluate, in_precision, window_starts
from fnlm.trained import Trained

Row = dict[str, Any]
Stopped = Callable[[], bool]

SEED = 0  # of the questions; all of them, whatever the seed, are held out
ANSWER_TOKENS = 64  # the longest answer is a sentence
TOGETHER = 128  # questions asked at once, of about one length


class Wanted(NamedTuple):
    """What to measure, as the options of the command name it."""

    data: tuple[str, ...]
    split: str | None
    seq_len: int | None
    stride: int | None
    limit: int | None
    precision: Literal["fp32", "bf16"]
    questions: int | None
    lambada: str | None
    hellaswag: str | None
    tasks: str | None
    task_folder: Path | None
    shots: int | None


class Measured(NamedTuple):
    """A text to measure on, or `part` of prepared data; its words where they are known; the tokens of all of it."""

    at: str
    part: str | None
    split: Split
    words: int | None
    whole: int


def rows_of(name: str, model: Trained, wanted: Wanted, stop: Stopped) -> Iterator[Row]:
    """All that is wanted of one model; a row that `stop` ended early has `complete` False."""
    if wanted.questions:
        yield asked(model, wanted.questions)
    for task in ("lambada", "hellaswag"):
        if file := getattr(wanted, task):
            yield of_examples(task, file, model, wanted, stop)
    if wanted.tasks:
        yield of_tasks(model, wanted, stop)
    if wanted.data or not any((wanted.questions, wanted.lambada, wanted.hellaswag, wanted.tasks)):
        for folder in wanted.data or (None,):
            yield of_text(texts(name, model, folder, wanted.split), model, wanted, stop)
            if stop():
                return


def texts(name: str, model: Trained, at: str | None, split: str | None) -> Measured:
    """Prepared data, or text files and folders. DataError where there are none, or of another tokenizer."""
    at = at or model.config.get("data")
    if not at:
        raise DataError(f"{name} does not say what it was trained on; name data or a text: --data PATH")
    if Path(at).exists() and not (Path(at) / FILE).is_file():
        if split:
            raise click.UsageError(f"--split is of prepared data, and {at} is text")
        text = evaluation.read_text([at], model.tokenizer)
        assert text.split.mask is not None
        return Measured(at, None, text.split, text.words, int(text.split.mask.sum()))
    dataset = data.open(at)
    if dataset.tokenizer.sha256 != model.tokenizer.sha256:
        ours, theirs = (f"{t.kind} of {t.vocab_size:,} tokens" for t in (model.tokenizer, dataset.tokenizer))
        raise DataError(
            f"{at} was made with another tokenizer ({theirs}, sha256 {dataset.tokenizer.sha256[:8]}) than {name} "
            f"({ours}, {model.tokenizer.sha256[:8]}); prepare it with --tokenizer {model.path}"
        )
    found: Split = getattr(dataset, split or "val")
    words = None if found.mask is not None else evaluation.words_of(found, dataset.tokenizer)
    return Measured(at, split or "val", found, words, len(found.tokens))


def of_text(text: Measured, model: Trained, wanted: Wanted, stop: Stopped) -> Row:
    """The loss, for each token, word and byte."""
    own = {"seq_len": wanted.seq_len, "stride": wanted.stride, "limit": wanted.limit, "precision": wanted.precision}
    found = evaluate(model.params, model.cfg, text.split, **own, stop=stop)  # type: ignore[arg-type]
    size = None if text.words is None else text.split.bytes
    shared = evaluation.normalised(found.loss, text.whole, text.words, size)
    seq_len = wanted.seq_len or model.cfg.seq_len
    windows = len(window_starts(len(text.split.tokens), seq_len, wanted.stride or seq_len))
    return {
        "data": text.at,
        "split": text.part,
        "counted": "learnt tokens" if text.words is None else "all tokens",
        "seq_len": seq_len,
        "stride": wanted.stride or seq_len,
        "windows": min(wanted.limit or windows, windows),
        "of_windows": windows,
        "words": text.words,
        "bytes": size,
        **found._asdict(),
        **shared._asdict(),
    }


def of_examples(task: str, file: str, model: Trained, wanted: Wanted, stop: Stopped) -> Row:
    """LAMBADA's or HellaSwag's figures on a file of its format, of the first `limit` examples."""
    began = time.perf_counter()
    examples = evaluation.TASKS[task][0](file)[: wanted.limit]
    params = in_precision(model.params, wanted.precision)
    found = evaluation.measured(task, params, model.cfg, model.tokenizer, examples, stop=stop)
    figures = {task: {**found.figures, "examples": found.examples}}
    seconds = time.perf_counter() - began
    return {"file": file, "tasks": figures, "seconds": seconds, "complete": found.examples == found.of}


def of_tasks(model: Trained, wanted: Wanted, stop: Stopped) -> Row:
    """lm-eval's tasks, by name."""
    needs_lm_eval()
    from fnlm.evaluation import harness

    began, names = time.perf_counter(), [t for t in (wanted.tasks or "").split(",") if t]
    adapter = harness.Adapter(in_precision(model.params, wanted.precision), model.cfg, model.tokenizer, stop)
    found = harness.run(
        adapter, names, wanted.task_folder, limit=wanted.limit, shots=wanted.shots,
        done=lambda task, figures: click.echo(f"{task}: {said(figures)}", err=True),
    )  # fmt: skip
    return {"tasks": found, "seconds": time.perf_counter() - began, "complete": not stop()}


def needs_lm_eval() -> None:
    """ValueError where lm-eval is not installed."""
    if importlib.util.find_spec("lm_eval") is None:
        raise ValueError(
            "--tasks needs lm-eval: pip install 'fnlm[eval]'; --lambada and --hellaswag read files without it"
        )


def asked(model: Trained, count: int) -> Row:
    """The score on `count` held-out questions of the demo world, answered greedily, and the seconds it took."""
    from fnlm import random, world
    from fnlm.generate import complete
    from fnlm.sampling import Settings

    began, questions = time.perf_counter(), world.questions(SEED, count)
    dialogue = model.dialogue
    prompts = [dialogue.prompt(q.messages) for q in questions]
    settings = Settings(temperature=0.0, max_tokens=ANSWER_TOKENS)
    answers = [""] * count
    # Rows of about one length: a batch is as long as its longest prompt.
    order = sorted(range(count), key=lambda i: len(prompts[i]))
    for at in range(0, count, TOGETHER):
        some = order[at : at + TOGETHER]
        said = complete(
            model.params, model.cfg, model.tokenizer, [prompts[i] for i in some], settings, random.key(0), dialogue
        )
        for i, answer in zip(some, said, strict=True):
            answers[i] = answer.text
    score = world.score(answers, questions)
    examples = [
        {"kind": q.kind, "question": q.messages[-1]["content"], "answer": said, "expected": q.answer}
        for said, q in zip(answers, questions, strict=True)
    ]
    return {"questions": count, "score": score, "seconds": time.perf_counter() - began, "answers": examples}


def tables(rows: Sequence[Row]) -> list[str]:
    """All rows, in a table for each kind of figure."""
    parts = (
        (losses, [r for r in rows if "loss" in r]),
        (scores, [r for r in rows if "score" in r]),
        (tasks, [r for r in rows if "tasks" in r]),
    )
    lines: list[str] = []
    for table, own in parts:
        if own:
            lines += [""] * bool(lines) + table(own)
    return lines


def losses(rows: Sequence[Row]) -> list[str]:
    """A line for each model and text."""
    head = ["model", "step", "data", "loss", "perplexity", "ppl/word", "ppl/byte", "bits/byte", "tokens", "seconds"]
    table = [[r["model"], f"{r['step']:,}", " ".join(filter(None, (r["data"], r["split"]))), *figures(r)] for r in rows]
    lines = columns([head, *table], (0, 2), "")
    if any(r["counted"] == "learnt tokens" for r in rows):
        lines.append("of conversations only the learnt tokens are counted: the answers and their ends")
    some = {f"{r['windows']:,} of {r['of_windows']:,} windows" for r in rows if r["windows"] < r["of_windows"]}
    return lines + [f"measured on {', '.join(sorted(some))}"] * bool(some)


def figures(row: Row) -> list[str]:
    """The numbers of one line."""
    bits = "-" if row["bits_per_byte"] is None else f"{row['bits_per_byte']:.4f}"
    perplexities = [number(row[name]) for name in ("perplexity", "word_perplexity", "byte_perplexity")]
    return [f"{row['loss']:.4f}", *perplexities, bits, f"{row['tokens']:,}", f"{row['seconds']:.1f}"]


def number(value: float | None) -> str:
    """Four digits."""
    return "-" if value is None else f"{value:.4g}" if value < 1e4 else f"{value:.2e}"


def tasks(rows: Sequence[Row]) -> list[str]:
    """A line for each task's metric, a column for each model; standard errors behind ±."""
    models = list(dict.fromkeys((r["model"], r["step"]) for r in rows))
    cells: dict[tuple[str, str], dict[tuple[str, int], str]] = {}
    for row in rows:
        for task, found in row["tasks"].items():
            for metric in (m for m in found if "_stderr" not in m):
                value, error = found[metric], found.get(f"{metric}_stderr")
                shown = f"{value:,}" if metric == "examples" else f"{value:.4f}" if value < 1e4 else f"{value:.3e}"
                cell = shown + (f" ±{error:.4f}" if error is not None else "")
                cells.setdefault((task, metric), {})[row["model"], row["step"]] = cell
    same = len({name for name, _ in models}) < len(models)
    head = ["task", "metric", *(f"{name} {step}" if same else name for name, step in models)]
    body = [[*key, *(own.get(model, "-") for model in models)] for key, own in cells.items()]
    return columns([head, *body], (0, 1), "")


def said(figures: dict[str, Any]) -> str:
    """A task's figures in a line."""
    return ", ".join(f"{name} {value:.4g}" for name, value in figures.items() if "stderr" not in name)


def scores(rows: Sequence[Row]) -> list[str]:
    """A column for each model, a line for each kind of question, and all of them below."""
    kinds = [kind for kind in rows[0]["score"] if kind != "overall"]
    table = [
        ["right answers", *(r["model"] for r in rows)],
        *([kind, *(f"{100 * r['score'][kind]:.1f} %" for r in rows)] for kind in kinds),
        [f"all {rows[0]['questions']:,}", *(f"{100 * r['score']['overall']:.1f} %" for r in rows)],
    ]
    return columns(table, indent="")
