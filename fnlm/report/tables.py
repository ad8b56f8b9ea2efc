"""What a report says in words and numbers: runs side by side, settings with their differences, events, samples."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from datetime import datetime, timezone
from typing import Any

from fnlm.report.chart import Line, swatch
from fnlm.report.markup import table, tag, text
from fnlm.report.run import Facts, Row, Run, Sample, Series, number
from fnlm.report.scale import duration, large, said

ABSENT = object()
SAMPLES = 12  # of a run that are shown: the first, and the last ones
SAMPLE_CHARACTERS = 20_000
EVENTS = 200
FEW = 24  # settings that need not be folded away


def comparison(runs: Sequence[Run], found: Sequence[Facts], colours: Sequence[str], empty: Series) -> str:
    """One run as tiles, several as a table with a line for each; the best loss is marked if all data are the same."""
    if len(runs) == 1:
        return tag(
            "dl", *(tag("div", tag("dt", name), tag("dd", value)) for name, value in tiles(found[0])), class_="tiles"
        )
    data = {json.dumps([run.config.get("data"), run.config.get("tokenizer")]) for run in runs}
    best = min((f.best_loss for f in found if f.best_loss is not None), default=None) if len(data) == 1 else None
    caption = "★ the best" if len(data) == 1 else "losses of different data or tokenizers do not compare"
    rows = []
    for run, fact, colour in zip(runs, found, colours, strict=True):
        first = swatch(Line(run.name, colour, empty)) + " " + text(run.name)
        values = dict(tiles(fact))
        if fact.best_loss is not None and fact.best_loss == best:
            values["Best validation loss"] = tag("strong", values["Best validation loss"]) + " ★"
        rows.append([first, *values.values()])
    return table(["Run", *(name for name, _ in tiles(found[0]))], rows, caption=caption)


def tiles(fact: Facts) -> list[tuple[str, str]]:
    """Names and figures of a run."""
    of = f" of {said(fact.steps)}" if fact.steps is not None and fact.steps != fact.step else ""
    at = tag("small", f" at step {said(fact.best_step)}") if fact.best_step is not None else ""
    return [
        ("State", fact.state),
        ("Steps", said(fact.step) + tag("small", of) if of else said(fact.step)),
        ("Best validation loss", _loss(fact.best_loss) + at),
        ("Final validation loss", _loss(fact.val_loss)),
        ("Final training loss", _loss(fact.train_loss)),
        ("Tokens", large(fact.tokens)),
        ("Time", duration(fact.seconds)),
        ("Tokens per second", large(fact.tokens_per_second)),
        ("Parameters", large(fact.parameters)),
    ]


def _loss(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"


def flattened(values: Row, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted names and values of nested objects; an empty one is a value."""
    for key, value in values.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict) and value:
            yield from flattened(value, f"{name}.")
        else:
            yield name, value


def settings(runs: Sequence[Run], chosen: str, title: str) -> str:
    """The `config` or `environment` of all runs, a line for each field, those that differ first and marked with ≠."""
    flat = [dict(flattened(getattr(run, chosen))) for run in runs]
    names = list(dict.fromkeys(name for values in flat for name in values))
    if not names:
        return tag("p", f"No {chosen}.json was found.", class_="none")
    unlike = [name for name in names if differs([values.get(name, ABSENT) for values in flat])]
    alike = [name for name in names if name not in unlike]
    head = ["Setting", *(text(run.name) for run in runs)] if len(runs) > 1 else ["Setting", "Value"]
    parts = []
    if unlike:
        rows = [_row(name, flat, "≠ ") for name in unlike]
        parts.append(table(head, rows, ["differs"] * len(rows), f"{title} that differ"))
    elif len(runs) > 1:
        parts.append(tag("p", f"{title}: no differences.", class_="none"))
    if alike:
        rows = [_row(name, flat) for name in alike]
        same = table(head, rows, caption=f"{title} that are the same" if unlike else title)
        summary = tag("summary", f"{len(alike)} {'the same' if len(runs) > 1 else 'entries'}")
        parts.append(tag("details", summary, same, open=len(runs) == 1 and len(alike) <= FEW))
    return "".join(parts)


def differs(values: Sequence[Any]) -> bool:
    """Whether not all are the same; 1 and True are not, 1 and 1.0 are."""
    return (
        len({written(v) if isinstance(v, (bool, str)) or not isinstance(v, (int, float)) else float(v) for v in values})
        > 1
    )


def _row(name: str, flat: Sequence[Row], mark: str = "") -> list[str]:
    return [mark + tag("code", text(name)), *(text(written(values.get(name, ABSENT))) for values in flat)]


def written(value: Any) -> str:
    """A setting as people write it."""
    if value is ABSENT:
        return "–"
    return value if isinstance(value, str) else "none" if value is None else json.dumps(value)


def samples(run: Run) -> str:
    """What the model wrote, the newest open, the earlier ones below it; of many the first and the last ones."""
    shown = run.samples if len(run.samples) <= SAMPLES else [run.samples[0], *run.samples[1 - SAMPLES :]]
    *earlier, newest = shown
    left = len(run.samples) - len(shown)
    more = tag("p", f"{left} more in the run's folder.", class_="none") if left else ""
    folded = "".join(_sample(sample, False) for sample in reversed(earlier)) + more
    below = tag("details", tag("summary", f"{len(earlier)} earlier"), folded) if earlier else ""
    return _sample(newest, True) + below


def _sample(sample: Sample, newest: bool) -> str:
    step = said(int(sample.name)) if sample.name.isdecimal() else text(sample.name)
    cut = sample.text[:SAMPLE_CHARACTERS]
    rest = "\n…" if len(sample.text) > len(cut) else ""
    return tag("details", tag("summary", f"Step {step}"), tag("pre", text(cut) + rest), open=newest)


def events(run: Run) -> str:
    """What happened, in order; saved checkpoints are folded away, and of many events the last ones are shown."""
    told, saved = ([row for row in run.events if (row["event"] == "saved") == is_saved] for is_saved in (False, True))
    parts = [_events(told) if told else "", tag("details", tag("summary", f"{len(saved)} saved"), _events(saved))]
    return "".join(parts[: 1 + bool(saved)])


def _events(found: Sequence[Row]) -> str:
    rows = [
        [said(number(row.get("step"))), text(row["event"]), text(row.get("message") or ""), _when(row.get("time"))]
        for row in found[-EVENTS:]
    ]
    left = f"{len(found) - len(rows)} earlier ones are in metrics.jsonl" if len(found) > len(rows) else ""
    return table(["Step", "Event", "Message", "Time (UTC)"], rows, caption=left)


def _when(time: Any) -> str:
    try:
        return datetime.fromtimestamp(number(time), timezone.utc).strftime("%Y-%m-%d %H:%M:%S")
    except (ValueError, OverflowError, OSError):
        return "–"
