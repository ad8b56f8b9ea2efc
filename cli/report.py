"""`fnlm report`: runs as one HTML page."""

from __future__ import annotations

import os
import webbrowser
from pathlib import Path

import click

from fnlm.report import report


@click.command()
@click.argument("runs", nargs=-1, metavar="RUN...", type=click.Path(path_type=Path))
@click.option(
    "--out", default="report.html", show_default=True, type=click.Path(path_type=Path), metavar="FILE", help="Where to."
)
@click.option("--open", "shown", is_flag=True, help="Open it in the browser.")
def command(runs: tuple[Path, ...], out: Path, shown: bool) -> None:
    """Show runs as one HTML page.

    Curves, samples, settings, events and environment of each RUN, several beside each other with their differences
    marked. The page is one file that needs no network. A run that is going on can be shown as well.
    """
    if not runs:
        raise click.UsageError("name a run, such as runs/demo", click.get_current_context())
    page = report(runs).encode("utf-8")
    if out.is_dir():
        raise ValueError(f"--out {out} is a folder; name a file in it, such as {out / 'report.html'}")
    out.parent.mkdir(parents=True, exist_ok=True)
    beside = out.with_name(f".{out.name}.{os.getpid()}")  # so that a browser never loads half a page
    try:
        beside.write_bytes(page)
        beside.replace(out)
    except OSError as error:
        beside.unlink(missing_ok=True)
        raise OSError(error.errno, error.strerror, str(out)) from error
    click.echo(out)
    if shown and not webbrowser.open(out.resolve().as_uri()):
        click.echo(f"no browser was found; open {out.resolve().as_uri()}", err=True)
