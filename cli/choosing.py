"""Which of a run's parameters a command takes: two options that several commands share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import click

F = TypeVar("F", bound=Callable[..., Any])


def which_parameters(command: F) -> F:
    """The options --checkpoint and --no-ema, as the arguments `checkpoint` and `no_ema`."""
    checkpoint = click.option(
        "--checkpoint",
        default="best",
        show_default=True,
        metavar="C",
        help="Of a run: best, newest, or a step's number.",
    )
    average = click.option("--no-ema", is_flag=True, help="Not the average of the parameters, where the run kept one.")
    return checkpoint(average(command))
