"""The option --quantize: alone it means int8, and what follows it may still be an argument."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, TypeVar

import click

from fnlm.quantize import Bits

Quantized = Literal["int8", "int4"]
BITS: dict[Quantized, Bits] = {"int8": 8, "int4": 4}
F = TypeVar("F", bound=Callable[..., Any])


class Command(click.Command):
    """A command with the option."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        pairs = itertools.zip_longest(args, args[1:])
        said = [f"{a}=int8" if a == "--quantize" and not _means_bits(after) else a for a, after in pairs]
        return super().parse_args(ctx, said)


def _means_bits(word: str | None) -> bool:
    """Whether what follows is meant for the option: one of its values, or what only a mistaken value looks like."""
    return word in BITS or (
        re.fullmatch(r"u?(int|fp|nf|q)?\d+", word or "") is not None and not Path(word or "").exists()
    )


def option(text: str) -> Callable[[F], F]:
    """`--quantize [int8|int4]`."""
    return click.option("--quantize", type=click.Choice(list(BITS)), metavar="[int8|int4]", help=text)
