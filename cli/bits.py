"""The option --quantize: alone it means int8, and what follows it may still be an argument."""

from __future__ import annotations

import itertools
from collections.abc import Callable
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
        said = [f"{a}=int8" if a == "--quantize" and after not in BITS else a for a, after in pairs]
        return super().parse_args(ctx, said)


def option(text: str) -> Callable[[F], F]:
    """`--quantize [int8|int4]`."""
    return click.option("--quantize", type=click.Choice(list(BITS)), metavar="[int8|int4]", help=text)
