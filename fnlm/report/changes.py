"""How far one model lies from another as an HTML page: a map of blocks by kinds of parameters, and a table."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from importlib import resources
from typing import NamedTuple

from fnlm.report.markup import page_head, table, tag, text

CELL, LEFT, TOP, GAP = 26, 190, 28, 2
STYLE = """
.map rect{fill:var(--c1)} .map rect.none{fill:none;stroke:var(--edge)} .map .row{text-anchor:end}
.map .column{text-anchor:middle} .map{display:block} td,thead th+th{text-align:right}
"""


class Change(NamedTuple):
    """Of one parameter: |b - a| / |a|, the largest |b - a| of a number, the cosine."""

    relative: float
    max_abs: float
    cosine: float


def changes(a: str, b: str, found: Mapping[str, tuple[float, float, float]], whole: tuple[float, float, float]) -> str:
    """The page of parameters' distances from model `a` to model `b`; `whole` is that of all of them together."""
    rows = {name: Change(*values) for name, values in found.items()}
    style = (resources.files(__package__) / "page.css").read_text("utf-8") + STYLE
    head = page_head(f"fnlm: {a} and {b}", style)
    said = f"All parameters together: relative change {whole[0]:.3g}, cosine {whole[2]:.6f}."
    body = tag(
        "main",
        tag("header", tag("h1", text(f"{a} → {b}")), tag("p", text(said), class_="soft")),
        tag("section", tag("h2", "Map"), _map(rows)),
        tag("section", tag("h2", "Parameters"), _table(rows)),
    )
    return "<!DOCTYPE html>\n" + tag("html", head, tag("body", body), lang="en") + "\n"


def _map(rows: Mapping[str, Change]) -> str:
    """Kinds of parameters down, blocks across; the more changed, the more colour, by its logarithm."""
    cells, kinds, blocks = _cells(rows)
    shades = _shades([c.relative for c in rows.values()])
    marks = [
        tag("text", text(block), x=str(LEFT + i * CELL + CELL // 2), y=str(TOP - 8), class_="column")
        for i, block in enumerate(blocks)
    ]
    for j, kind in enumerate(kinds):
        y = TOP + j * CELL
        marks.append(tag("text", text(kind), x=str(LEFT - 8), y=str(y + CELL // 2 + 4), class_="row"))
        marks += [_square(LEFT + i * CELL, y, name, rows[name], shades) for i, name in cells[kind].items()]
    width, height = LEFT + len(blocks) * CELL + GAP, TOP + len(kinds) * CELL + GAP
    label = "Relative change of each parameter"
    size = {"width": str(width), "height": str(height), "viewBox": f"0 0 {width} {height}"}
    shown = tag("div", tag("svg", *marks, role="img", aria_label=label, class_="map", **size), class_="scroll")
    note = "Columns are blocks, and the parameters outside of them. Full colour is the greatest relative change; "
    return shown + tag(
        "p", text(note + "the faintest a thousandth of it or less; an empty square has not changed."), class_="soft"
    )


def _cells(rows: Mapping[str, Change]) -> tuple[dict[str, dict[int, str]], list[str], list[str]]:
    """The names by kind and column, the kinds, and the columns' titles."""
    numbers = sorted({int(name.split(".")[1]) for name in rows if name.startswith("blocks.")})
    place = {n: i + 1 for i, n in enumerate(numbers)}
    cells: dict[str, dict[int, str]] = {}
    for name in rows:
        inner = name.startswith("blocks.")
        kind = name.split(".", 2)[2] if inner else name
        cells.setdefault(kind, {})[place[int(name.split(".")[1])] if inner else 0] = name
    return cells, list(cells), ["", *map(str, numbers)]


def _shades(values: Sequence[float]) -> tuple[float, float]:
    most = max((v for v in values if math.isfinite(v)), default=0.0)
    return most / 1000, most


def _square(x: int, y: int, name: str, change: Change, shades: tuple[float, float]) -> str:
    place = {"x": str(x), "y": str(y), "width": str(CELL - GAP), "height": str(CELL - GAP), "rx": "3"}
    title = tag("title", text(f"{name}: {change.relative:.3g}"))
    if not change.relative:
        return tag("rect", title, class_="none", **place)
    low, high = shades
    share = 1.0 if change.relative >= high else max(0.0, math.log(change.relative / low) / math.log(high / low))
    return tag("rect", title, fill_opacity=f"{0.08 + 0.92 * share:.2f}", **place)


def _table(rows: Mapping[str, Change]) -> str:
    order = sorted(rows, key=lambda name: -rows[name].relative)
    body = [[text(n), f"{rows[n].relative:.3e}", f"{rows[n].max_abs:.3e}", f"{rows[n].cosine:.6f}"] for n in order]
    return table(["parameter", "relative change", "largest change", "cosine"], body)
