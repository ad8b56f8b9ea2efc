"""Tasks in the formats of LAMBADA and HellaSwag, read from local files and scored as lm-eval scores them."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from fnlm.config import ModelConfig
from fnlm.data import DataError
from fnlm.data.sources import records
from fnlm.evaluation.scoring import Scored, pair, score
from fnlm.tokenizers import Tokenizer
from fnlm.types import Params

TOGETHER = 256  # examples between two looks at whether to stop; sorted by length among themselves
RECORDS = (".jsonl", ".json", ".parquet")


class Example(NamedTuple):
    """A context, what may follow (each with the space before it), and the index of what does."""

    context: str
    choices: tuple[str, ...]
    answer: int = 0


class Measured(NamedTuple):
    """`examples` of `of` were asked, fewer where it was stopped. `acc` the share right, with its standard error.

    LAMBADA's `acc`: the last word is the likeliest, token by token; `perplexity` is of that word. HellaSwag's: the
    likeliest ending; `acc_norm` the likeliest for each of its characters.
    """

    examples: int
    of: int
    figures: dict[str, float]


def lambada(path: str | Path) -> list[Example]:
    """Texts (`{"text"}` a line) whose last word is to be predicted, as in lambada_openai."""
    found = []
    for where, row in _rows(path):
        before, space, last = _text(row, "text", where).rpartition(" ")
        if not space or not last:
            raise DataError(f"{where}: the text must have a last word after a space")
        found.append(Example(before, (" " + last,)))
    return found


def hellaswag(path: str | Path) -> list[Example]:
    """Beginnings (`activity_label`, `ctx_a`, `ctx_b`), four `endings`, and the `label` of the right one."""
    found = []
    for where, row in _rows(path):
        label, a, b = (_text(row, name, where) for name in ("activity_label", "ctx_a", "ctx_b"))
        endings, right = row.get("endings"), str(row.get("label", ""))
        if not isinstance(endings, list) or not endings or not all(isinstance(e, str) for e in endings):
            raise DataError(f"{where} has no 'endings' that are a list of strings")
        if not right.isdecimal() or int(right) >= len(endings):
            raise DataError(f"{where}: label {right!r} is not the number of one of {len(endings)} endings")
        context = _cleaned(f"{label}: {a} {b.capitalize()}")
        found.append(Example(context, tuple(" " + _cleaned(e) for e in endings), int(right)))
    return found


def _cleaned(text: str) -> str:
    """Without what the articles it was taken from had in brackets, as the task's authors published it."""
    return re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". ")).replace("  ", " ")


def _rows(path: str | Path) -> list[tuple[str, dict[str, Any]]]:
    path = Path(path)
    if path.suffix not in RECORDS:
        raise DataError(f"{path}: examples are read from {', '.join(RECORDS)}, one object each")
    if path.is_dir() or not path.exists():
        raise DataError(f"there is no file {path}")
    rows = list(records(path))
    if not rows:
        raise DataError(f"{path} has no example")
    return rows


def _text(row: dict[str, Any], name: str, where: str) -> str:
    value = row.get(name)
    if not isinstance(value, str):
        raise DataError(f"{where} has no {name!r} that is a string; it has {', '.join(row) or 'nothing'}")
    return value


def measured(
    task: str,
    params: Params,
    cfg: ModelConfig,
    tokenizer: Tokenizer,
    examples: Sequence[Example],
    *,
    stop: Callable[[], bool] = lambda: False,
) -> Measured:
    """The figures of `task` (a name of TASKS) on the examples; `stop` is asked before each few.

    ValueError where a continuation is longer than the model's context, or its tokenizer cannot encode it.
    """
    found: list[tuple[Example, list[Scored]]] = []
    for at in range(0, len(examples), TOGETHER):
        if stop():
            break
        some = examples[at : at + TOGETHER]
        pairs = [pair(tokenizer, example.context, choice) for example in some for choice in example.choices]
        scores = iter(score(params, cfg, pairs))
        found += [(example, [next(scores) for _ in example.choices]) for example in some]
    return Measured(len(found), len(examples), TASKS[task][1](found) if found else {})


def _by_last_word(found: Sequence[tuple[Example, list[Scored]]]) -> dict[str, float]:
    right = [float(one.greedy) for _, (one,) in found]
    nats = -sum(one.logprob for _, (one,) in found) / len(found)
    return {**_share("acc", right), "perplexity": math.exp(nats) if nats < 700 else math.inf}


def _by_choice(found: Sequence[tuple[Example, list[Scored]]]) -> dict[str, float]:
    plain, normed = [], []
    for example, scores in found:
        logprobs = [one.logprob for one in scores]
        each = [lp / max(1, len(c) - 1) for lp, c in zip(logprobs, example.choices, strict=True)]
        plain.append(float(logprobs.index(max(logprobs)) == example.answer))
        normed.append(float(each.index(max(each)) == example.answer))
    return {**_share("acc", plain), **_share("acc_norm", normed)}


def _share(name: str, right: Sequence[float]) -> dict[str, float]:
    share, n = sum(right) / len(right), len(right)
    return {name: share} | ({f"{name}_stderr": math.sqrt(share * (1 - share) / (n - 1))} if n > 1 else {})


TASKS: dict[str, tuple[Callable[[str | Path], list[Example]], Callable[..., dict[str, float]]]] = {
    "lambada": (lambada, _by_last_word),
    "hellaswag": (hellaswag, _by_choice),
}
"""By name: what reads a file of it, and what makes figures of the scores."""
