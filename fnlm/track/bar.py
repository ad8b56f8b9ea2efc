"""The bar of `Progress`, drawn by rich in its own thread; imported only where stderr is a terminal."""

from __future__ import annotations

from typing import IO, TYPE_CHECKING, cast

from rich.console import Console
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from fnlm.track.progress import Progress, Steady

WIDTH = 24


def live(progress: Progress, stream: Steady, redraws_s: float) -> Live:
    """A display of one line that follows `progress` until it is stopped; what others print to stderr goes above it."""
    return Live(
        get_renderable=lambda: drawn(progress),
        console=Console(file=cast(IO[str], stream)),
        refresh_per_second=redraws_s,
        redirect_stdout=False,  # stdout is for results
    )


def drawn(progress: Progress) -> Table:
    """Step, bar, and what `progress.state` tells, cut where the terminal ends."""
    line = Table.grid(padding=(0, 1))
    line.add_column(no_wrap=True)
    line.add_column(width=WIDTH)
    line.add_column(no_wrap=True, overflow="ellipsis")
    line.add_row(
        Text(f"{progress.step}/{progress.total}"),
        ProgressBar(total=progress.total, completed=progress.step, width=WIDTH),
        Text(" | ".join(progress.state()), style="cyan"),
    )
    return line
