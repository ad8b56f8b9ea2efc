"""`fnlm diff`: how far the parameters of one model lie from another's, as a table and as a picture."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import click

from cli.choosing import which_parameters
from cli.eval import checkpoint_of
from cli.merge import check
from cli.results import must_be_file, write_whole
from cli.tables import columns
from fnlm import merging, trained
from fnlm.merging import Distance
from fnlm.report.changes import changes
from fnlm.trained import Which

TOP = 20


@click.command()
@click.argument("a", metavar="A")
@click.argument("b", metavar="B")
@which_parameters
@click.option("--top", type=click.IntRange(1), default=TOP, show_default=True, metavar="N", help="Lines of the table.")
@click.option("--all", "every", is_flag=True, help="A line for each parameter.")
@click.option("--out", type=click.Path(path_type=Path), metavar="FILE", help="A picture and the table as an HTML page.")
@click.option("--json", "as_json", is_flag=True, help="All figures as JSON.")
def command(
    a: str, b: str, checkpoint: str, no_ema: bool, top: int, every: bool, out: Path | None, as_json: bool
) -> None:
    """Say how far each parameter of B lies from A's.

    The relative change is |b - a| / |a|; then the largest change of a single number, and the cosine between both. The
    most changed come first.
    """
    which: Which = "newest" if checkpoint == "newest" else "best"
    if out:
        must_be_file(out, "diff.html")
    models = [
        trained.load(checkpoint_of(name, checkpoint), which, average=not no_ema, dtype="saved") for name in (a, b)
    ]
    check((a, b), models)
    found = merging.distances(models[0].params, models[1].params)
    whole = found.pop("")
    if out:
        write_whole(out, changes(a, b, found, whole))
    order = sorted(found, key=lambda name: -found[name].relative)
    if as_json:
        rows = {name: plain(found[name]) for name in order}
        click.echo(json.dumps({"a": a, "b": b, "all": plain(whole), "parameters": rows}, indent=2))
        return
    head = ["parameter", "relative", "largest", "cosine"]
    shown = order if every else order[:top]
    table = [["all of them", *figures(whole)], *([name, *figures(found[name])] for name in shown)]
    click.echo("\n".join(columns([head, *table], indent="")))
    if rest := len(order) - len(shown):
        click.echo(f"and {rest} more: --all")


def figures(one: Distance) -> list[str]:
    """The numbers of a line."""
    cosine = "-" if math.isnan(one.cosine) else f"{one.cosine:.6f}"
    return [f"{one.relative:.3e}", f"{one.max_abs:.3e}", cosine]


def plain(one: Distance) -> dict[str, Any]:
    """Fit for JSON: what is no finite number is null."""
    return {name: value if math.isfinite(value) else None for name, value in one._asdict().items()}
