"""A chart as HTML and SVG: axes that keep their text size at any width, curves with gaps, a table of numbers.

The plot is stretched to the width there is, its lines are not (`non-scaling-stroke`), and the labels stand outside it.
Colours are classes (c0, c1, ...; h0, ... by depth), so that the page's style decides them, for light and for dark.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from fnlm.report.curve import smoothed, thinned
from fnlm.report.markup import tag, text
from fnlm.report.run import Floats, Series
from fnlm.report.scale import Scale, domain, labels, linear, logarithmic, said

SIZE = 1000  # of the plot's own units, both ways
NUMBERS = 12  # rows in the table of a chart
LAST = 0.96  # of the width, from which on a word would stand out of it


class Line(NamedTuple):
    """A curve: `name` in the legend, its colour's class; `dots` marks each point, `smooth` adds a moving mean.

    `mean` and its `window` of points are filled in by `figure`.
    """

    name: str
    colour: str
    series: Series
    dots: bool = False
    smooth: bool = False
    mean: Series | None = None
    window: int = 0


class Chart(NamedTuple):
    """What to draw, from `steps[0]` to `steps[1]`. `marks` are steps with what happened there.

    `log_from`: the ratio of greatest and least from which the axis is logarithmic, None for never; `from_zero`: a
    linear one begins at 0; `trimmed`: smoothed curves do not widen it by their outermost hundredth, which ends at its
    edge.
    """

    title: str
    unit: str
    lines: Sequence[Line]
    steps: tuple[float, float]
    log_from: float | None = None
    from_zero: bool = False
    trimmed: bool = False
    marks: Sequence[tuple[float, str]] = ()
    wide: bool = False


def figure(chart: Chart) -> str:
    """The chart, or nothing where no curve has a value. Values outside its steps are not drawn."""
    lines = [_cut(line, chart.steps) for line in chart.lines]
    lines = [line for line in lines if np.isfinite(line.series.values).any()]
    log = chart.log_from is not None and _wants_log([line.series for line in lines], chart.log_from)
    lines = [_positive(line) for line in lines] if log else lines
    outer = [trimmed(v) if chart.trimmed and line.smooth else v for line in lines for v in (line.series.values,)]
    span = domain(outer)
    if span is None:
        return ""
    x = linear(*chart.steps, count=6, rounded=False)
    y = logarithmic(*span) if log else linear(min(0.0, span[0]) if chart.from_zero else span[0], span[1])
    beyond = sum(int(((line.series.values < y.low) | (line.series.values > y.high)).sum()) for line in lines)
    notes = [*_notes(lines, log), *([f"{beyond} beyond the axis"] if beyond else [])]
    return tag(
        "figure",
        tag(
            "figcaption",
            tag("b", text(chart.title)),
            " ",
            tag("span", text(", ".join([*([chart.unit] if chart.unit else []), *notes]))),
        ),
        _legend(lines) if len(lines) > 1 else "",
        tag(
            "div",
            _y_axis(y),
            tag("div", _plot(chart, lines, x, y), tag("div", class_="tip", hidden=True), class_="field", **_range(x)),
            _x_axis(x),
            class_="plot",
        ),
        _numbers(chart, lines),
        tag("script", _data(lines), type="application/json"),
        class_="chart wide" if chart.wide else "chart",
    )


def _wants_log(series: Sequence[Series], ratio: float) -> bool:
    """Whether positive values lie so far apart, and hardly any others are among them."""
    values = np.concatenate([s.values[np.isfinite(s.values)] for s in series]) if series else np.zeros(0)
    positive = values[values > 0]
    return len(positive) > 0.9 * len(values) and bool(positive.max() / positive.min() >= ratio)


def _positive(line: Line) -> Line:
    """The line with gaps for what a logarithmic axis cannot show."""

    def of(series: Series) -> Series:
        return Series(series.steps, np.where(series.values > 0, series.values, np.nan))

    return line._replace(series=of(line.series), mean=None if line.mean is None else of(line.mean))


def _cut(line: Line, steps: tuple[float, float]) -> Line:
    """The line between two steps; its mean there is that of the whole line."""
    found = smoothed(line.series) if line.smooth else None
    cut = line._replace(series=within(line.series, steps))
    return cut if found is None else cut._replace(mean=within(found[0], steps), window=found[1])


def within(series: Series, steps: tuple[float, float]) -> Series:
    """The part of a series between two steps, both included."""
    there = (series.steps >= steps[0]) & (series.steps <= steps[1])
    return Series(series.steps[there], series.values[there])


def trimmed(values: Floats) -> Floats:
    """The finite values without the least and the greatest half percent."""
    finite = np.sort(values[np.isfinite(values)])
    cut = len(finite) // 200
    return finite[cut : len(finite) - cut]


def _notes(lines: Sequence[Line], log: bool) -> Iterator[str]:
    if log:
        yield "log scale"
    windows = sorted({line.window for line in lines if line.mean is not None})
    if windows:
        yield f"bold: mean over {'–'.join(map(str, [windows[0], windows[-1]][: len(windows)]))} points"
    if gaps := sum(int(np.isnan(line.series.values).sum()) for line in lines):
        yield f"{gaps} {'value' if gaps == 1 else 'values'} missing or not finite" + (", or 0" if log else "")


def _legend(lines: Sequence[Line]) -> str:
    return tag("ul", *(tag("li", swatch(line), text(line.name)) for line in lines), class_="legend")


def swatch(line: Line) -> str:
    """A short piece of the line, for a legend or a table."""
    dots = tag("path", d="M11 5h0", class_="dot") if line.dots else ""
    path = tag("path", d="M1 5h20", class_="line dashed" if line.dots else "line")
    return tag("svg", path, dots, class_=f"key {line.colour}", width="22", height="10", aria_hidden="true")


def _y_axis(y: Scale) -> str:
    at = y.at(np.array(y.ticks))
    words = (
        tag("text", text(word), x="100%", y=f"{100 - 100 * p:.2f}%", dy="0.32em")
        for word, p in zip(labels(y), at, strict=True)
    )
    return tag("svg", *words, class_="y-axis", aria_hidden="true")


def _x_axis(x: Scale) -> str:
    at = x.at(np.array(x.ticks))
    words = (
        tag("text", text(word), x=f"{100 * p:.2f}%", y="17", **({"class_": "last"} if p > LAST else {}))
        for word, p in zip(labels(x), at, strict=True)
    )
    return tag("svg", *words, tag("text", "step", x="100%", y="32", class_="unit"), class_="x-axis", aria_hidden="true")


def _plot(chart: Chart, lines: Sequence[Line], x: Scale, y: Scale) -> str:
    grid = [_rule("grid", "y", p) for p in 1 - y.at(np.array(y.ticks))]
    grid += [_rule("grid", "x", p) for p in x.at(np.array(x.ticks))]
    marks = [_rule("mark", "x", float(x.at(np.array(step))), says) for step, says in chart.marks]
    return tag(
        "svg",
        *grid,
        *marks,
        *(part for line in lines for part in _curve(line, x, y)),
        viewBox=f"0 0 {SIZE} {SIZE}",
        preserveAspectRatio="none",
        role="img",
        aria_label=f"{chart.title} over steps. " + " ".join(_in_words(line) for line in lines),
    )


def _rule(kind: str, axis: str, part: float, title: str = "") -> str:
    at, end = f"{SIZE * part:.1f}", str(SIZE)
    ends = {"x1": at, "x2": at, "y1": "0", "y2": end} if axis == "x" else {"x1": "0", "x2": end, "y1": at, "y2": at}
    return tag("line", tag("title", text(title)) if title else "", class_=kind, **ends)


def _curve(line: Line, x: Scale, y: Scale) -> Iterator[str]:
    drawn = path(thinned(line.series), x, y)
    kind = "line raw" if line.mean is not None else "line dashed" if line.dots else "line"
    yield tag("path", d=drawn, class_=f"{kind} {line.colour}")
    if line.mean is not None:
        yield tag("path", d=path(thinned(line.mean), x, y), class_=f"line {line.colour}")
    if line.dots and len(line.series.steps) <= 100:
        there = np.isfinite(line.series.values)
        yield tag("path", d=_dots(Series(*(v[there] for v in line.series)), x, y), class_=f"dot {line.colour}")


def path(series: Series, x: Scale, y: Scale) -> str:
    """SVG path data: a line with a gap at each NaN; a point between two gaps is a dot."""
    words, pen, at = [], "M", _points(series, x, y)
    for i, (px, py) in enumerate(at):
        if np.isnan(py):
            pen = "M"
            continue
        alone = pen == "M" and (i + 1 == len(at) or np.isnan(at[i + 1][1]))
        words.append(f"{pen}{px:.1f} {py:.1f}" + ("h0" if alone else ""))
        pen = "L"
    return "".join(words)


def _dots(series: Series, x: Scale, y: Scale) -> str:
    return "".join(f"M{px:.1f} {py:.1f}h0" for px, py in _points(series, x, y))


def _points(series: Series, x: Scale, y: Scale) -> list[tuple[float, float]]:
    return list(
        zip(
            (SIZE * x.at(series.steps)).tolist(),
            (SIZE * (1 - y.at(np.clip(series.values, y.low, y.high)))).tolist(),
            strict=True,
        )
    )


def _in_words(line: Line) -> str:
    """A curve for those who do not see it."""
    there = np.isfinite(line.series.values)
    steps, values = ([said(x) for x in column[there].tolist()] for column in line.series)
    low, high = (int(i) for i in (np.nanargmin(line.series.values[there]), np.nanargmax(line.series.values[there])))
    found = {"from": 0, "to": -1, "least": low, "greatest": high}
    return f"{line.name}: {', '.join(f'{word} {values[i]} at step {steps[i]}' for word, i in found.items())}."


def _numbers(chart: Chart, lines: Sequence[Line]) -> str:
    """A table of some steps, spread evenly, the last among them; a curve without a value there has a dash."""
    steps = np.unique(np.concatenate([line.series.steps for line in lines]))
    dotted = [line.series.steps for line in lines if line.dots]
    if dotted:  # evaluations are rare: their steps are the ones to show
        steps = np.unique(np.concatenate(dotted))
    some = steps[np.unique(np.linspace(0, len(steps) - 1, NUMBERS).round().astype(int))]
    head = tag("tr", tag("th", "step", scope="col"), *(tag("th", text(line.name), scope="col") for line in lines))
    known = [dict(zip(line.series.steps.tolist(), line.series.values.tolist(), strict=True)) for line in lines]
    rows = (
        tag("tr", tag("th", said(step), scope="row"), *(tag("td", said(values.get(step))) for values in known))
        for step in some.tolist()
    )
    table = tag("table", tag("caption", text(chart.title)), tag("thead", head), tag("tbody", *rows))
    return tag("details", tag("summary", "Numbers"), tag("div", table, class_="scroll"))


def _range(x: Scale) -> dict[str, str]:
    return {"data_low": f"{x.low:g}", "data_high": f"{x.high:g}"}


def _data(lines: Sequence[Line]) -> str:
    """What the pointer shows: for each curve its name, class, steps and values as texts."""
    found = []
    for line in lines:
        series = thinned(line.series)
        there = np.isfinite(series.values)
        values = [said(v) for v in series.values[there].tolist()]
        found.append({"name": line.name, "colour": line.colour, "x": _whole(series.steps[there]), "y": values})
    # A "<" could end the script element.
    return json.dumps(found, ensure_ascii=True, separators=(",", ":")).replace("<", "\\u003c")


def _whole(steps: np.ndarray[tuple[int, ...], np.dtype[np.float64]]) -> list[float]:
    return [int(step) if step == int(step) else step for step in steps.tolist()]
