"""Runs as one HTML page with curves, settings and samples: a file that needs no network and no library."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from fnlm.report.page import page
from fnlm.report.run import RunError, read_runs

__all__ = ["RunError", "report"]


def report(runs: Sequence[Path], now: float | None = None) -> str:
    """The page of one run, or of several beside each other; `now` (unix seconds) decides which of them still go on.

    What is missing or broken in a run's folder is left out, or said on the page. Raises RunError for a folder that is
    no run, ValueError for no runs at all.
    """
    if not runs:
        raise ValueError("there is nothing to report on; name a run such as runs/demo")
    return page(read_runs([Path(run) for run in runs]), time.time() if now is None else now)
