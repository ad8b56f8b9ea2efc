"""The page: summary, curves, samples, settings, events, environment; one file that needs nothing else."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from datetime import datetime, timezone
from importlib import resources

import numpy as np

from fnlm.report import tables
from fnlm.report.chart import Chart, Line, figure, trimmed, within
from fnlm.report.markup import page_head, tag, text
from fnlm.report.run import Run, Series, facts, number
from fnlm.report.scale import domain, linear, said

MARKED = ("resumed", "spike", "rollback", "stopped")  # events that stand in the plot of the loss
MOST_MARKS = 40
LOG_LOSS = 4.0  # how far a loss must fall for a logarithmic axis
OTHERS = (  # title, unit, metric, factor, logarithmic from which ratio, smoothed
    ("Bits per byte", "validation", "val/bpb", 1.0, LOG_LOSS, False),
    ("Learning rate", "", "train/lr", 1.0, None, False),
    ("Gradient norm", "before clipping", "train/grad_norm", 1.0, 20.0, True),
    ("Clipped steps", "%", "train/clip_frac", 100.0, None, True),
    ("Skipped steps", "", "train/skipped", 1.0, None, False),
    ("Throughput", "tokens per second", "perf/tok_per_sec", 1.0, None, True),
    ("Model FLOPs utilisation", "% of the peak", "perf/mfu", 100.0, None, True),
    ("Waiting for data", "% of a step", "perf/data_frac", 100.0, None, True),
    ("Peak memory", "GiB", "mem/peak_bytes", 2.0**-30, None, False),
)
COLOURS = 8  # of page.css, for runs and for depths
NOTHING = Series(np.zeros(0), np.zeros(0))


def page(runs: Sequence[Run], now: float) -> str:
    """The whole HTML page of these runs, as seen at `now` (unix seconds)."""
    style, script = ((resources.files(__package__) / f"page.{kind}").read_text("utf-8") for kind in ("css", "js"))
    title = "fnlm: " + ", ".join(run.name for run in runs)
    head = page_head(title, style, script)
    body = tag("body", tag("main", *_parts(runs, now)), tag("script", script))
    return "<!DOCTYPE html>\n" + tag("html", head, body, lang="en") + "\n"


def _parts(runs: Sequence[Run], now: float) -> Iterator[str]:
    made = datetime.fromtimestamp(now, timezone.utc).strftime("%Y-%m-%d %H:%M UTC")
    yield tag("header", tag("h1", text(", ".join(run.name for run in runs))), tag("p", f"as of {made}", class_="soft"))
    colours = [f"c{i % COLOURS}" for i in range(len(runs))]
    found = [facts(run, now) for run in runs]
    yield tag("section", tables.comparison(runs, found, colours, NOTHING), class_="compare")
    yield from (_warning(run) for run in runs if run.unreadable)
    curves = "".join(figure(chart) for chart in charts(runs, colours))
    yield _section(
        "Curves", tag("div", curves, class_="charts") if curves else tag("p", "No numbers yet.", class_="none")
    )
    layers = [(run, "".join(figure(chart) for chart in by_layer(run))) for run in runs]
    yield _each("By layer", [(run, tag("div", drawn, class_="charts")) for run, drawn in layers if drawn], len(runs))
    yield _each("Samples", [(run, tables.samples(run)) for run in runs if run.samples], len(runs))
    yield _section("Settings", tables.settings(runs, "config", "Settings"))
    yield _each("Events", [(run, tables.events(run)) for run in runs if run.events], len(runs))
    yield _section("Environment", tables.settings(runs, "environment", "Entries"))


def _section(title: str, inside: str) -> str:
    return tag("section", tag("h2", title), inside)


def _each(title: str, parts: Sequence[tuple[Run, str]], runs: int) -> str:
    """A section with a part for each run; nothing where there is none."""
    inside = [(tag("h3", text(run.name)) if runs > 1 else "") + part for run, part in parts]
    return _section(title, "".join(inside)) if inside else ""


def _warning(run: Run) -> str:
    lines = f"{run.unreadable} {'line' if run.unreadable == 1 else 'lines'}"
    return tag("p", f"{lines} of metrics.jsonl of {text(run.name)} could not be read.", class_="warning")


def charts(runs: Sequence[Run], colours: Sequence[str]) -> Iterator[Chart]:
    """Loss first, then what else was logged, each over all runs, all of them over the same steps."""
    steps = reach(runs)
    lines = loss_lines(runs, colours)
    yield Chart("Loss", "nats per token", lines, steps, LOG_LOSS, marks=marks(runs), wide=True)
    if late := later(lines, steps):
        yield late
    for title, unit, key, factor, log_from, smooth in OTHERS:
        series = [scaled(run.series(key), factor) for run in runs]
        if any((s.values[np.isfinite(s.values)] != 0).any() for s in series):
            parts = zip(runs, colours, series, strict=True)
            drawn = [Line(run.name, colour, s, key.startswith("val/"), smooth) for run, colour, s in parts]
            from_zero = key.startswith(("perf/", "mem/", "train/c", "train/lr"))
            yield Chart(title, unit, drawn, steps, log_from, from_zero=from_zero)


def reach(runs: Sequence[Run]) -> tuple[float, float]:
    """From 0 to the last step of any run."""
    steps = [step for run in runs for row in run.rows if np.isfinite(step := number(row.get("step")))]
    return 0.0, max(steps, default=0.0)


def later(lines: Sequence[Line], steps: tuple[float, float]) -> Chart | None:
    """The loss without its beginning, where that is so steep that the rest looks flat; None where it is not."""
    quarter = steps[0] + (steps[1] - steps[0]) / 4
    rest = (min(linear(*steps, rounded=False).ticks[1:], key=lambda t: abs(t - quarter), default=quarter), steps[1])
    whole, part = (domain([trimmed(within(line.series, s).values) for line in lines]) for s in (steps, rest))
    if whole is None or part is None or part[1] - part[0] > (whole[1] - whole[0]) / 2:
        return None
    return Chart(f"Loss from step {said(rest[0])}", "nats per token", lines, rest, trimmed=True, wide=True)


def scaled(series: Series, factor: float) -> Series:
    """The values times a factor."""
    return Series(series.steps, series.values * factor)


def loss_lines(runs: Sequence[Run], colours: Sequence[str]) -> list[Line]:
    """Training, bold where smoothed, and validation, dashed; of a single run in two colours."""
    lines = []
    for run, colour in zip(runs, colours, strict=True):
        name, other = (f"{run.name}, ", colour) if len(runs) > 1 else ("", "c1")
        lines.append(Line(f"{name}training", colour, run.series("train/loss"), smooth=True))
        lines.append(Line(f"{name}validation", other, run.series("val/loss"), dots=True))
    return lines


def marks(runs: Sequence[Run]) -> list[tuple[float, str]]:
    """Where something happened, the last times; a run's name is said where there are several."""
    found = [
        (
            number(row.get("step")),
            f"{run.name + ': ' if len(runs) > 1 else ''}{row['event']} {row.get('message') or ''}",
        )
        for run in runs
        for row in run.events
        if row["event"] in MARKED and np.isfinite(number(row.get("step")))
    ]
    return sorted(found)[-MOST_MARKS:]


def by_layer(run: Run) -> Iterator[Chart]:
    """Norms of the gradients, the parameters and the updates, a curve for each group, coloured by depth."""
    for title, unit, kind in (
        ("Gradient norm by layer", "", "grad_norm"),
        ("Parameter norm by layer", "", "param_norm"),
        ("Update ratio by layer", "|change| / |parameters|", "update_ratio"),
    ):
        prefix = f"health/{kind}/"
        groups = [key.removeprefix(prefix) for key in run.keys(prefix)]
        blocks = sorted((g for g in groups if g.startswith("blocks.")), key=lambda g: (len(g), g))
        order = [*(g for g in groups if g not in blocks), *blocks]
        lines = [Line(g, _depth(g, blocks), run.series(prefix + g)) for g in order]
        yield Chart(title, unit, lines, reach([run]), 8.0)


def _depth(group: str, blocks: Sequence[str]) -> str:
    if group not in blocks:
        return "c1"
    return f"h{blocks.index(group) * (COLOURS - 1) // max(1, len(blocks) - 1)}"
