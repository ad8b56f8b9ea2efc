"""A text is a function of choices. They can be drawn at random, or all be gone through, which gives the entropy."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from random import Random
from typing import Protocol, TypeVar

T = TypeVar("T")
Text = TypeVar("Text")


class Choices(Protocol):
    """Where a text takes its decisions, each uniform among options that differ.

    A `branch` may change how many options later choices have; a `fill` may not: it picks a word or a template.
    """

    def branch(self, options: Sequence[T], /) -> T: ...

    def fill(self, options: Sequence[T], /) -> T: ...


class Draw:
    """Random choices; `nats` is minus the log of the probability of all those taken so far."""

    def __init__(self, *seed: object) -> None:
        self._random = Random(" ".join(map(str, seed))).random
        self.nats = 0.0

    def branch(self, options: Sequence[T]) -> T:
        self.nats += math.log(len(options))
        return options[int(self._random() * len(options))]

    fill = branch


class Replay:
    """Choices by number along a given path, then the first of each. `sizes` are the options there were on the way."""

    def __init__(self, path: Sequence[int], fills: bool) -> None:
        self.path, self.fills = path, fills
        self.sizes: list[int] = []
        self.filled = 0.0  # nats of choices that are not gone through

    def branch(self, options: Sequence[T]) -> T:
        at = len(self.sizes)
        self.sizes.append(len(options))
        return options[self.path[at] if at < len(self.path) else 0]

    def fill(self, options: Sequence[T]) -> T:
        if self.fills:
            return self.branch(options)
        self.filled += math.log(len(options))
        return options[0]


def every(write: Callable[[Choices], Text], fills: bool = True) -> Iterator[tuple[Text, float, float]]:
    """Every text as (text, probability, nats); without `fills` one text stands for all that differ in fills only, with
    the probability of all of them and the nats of each."""
    path: list[int] = []
    while True:
        replay = Replay(path, fills)
        text = write(replay)
        taken = path + [0] * (len(replay.sizes) - len(path))
        branched = sum(map(math.log, replay.sizes))
        yield text, math.exp(-branched), branched + replay.filled
        while taken and taken[-1] == replay.sizes[len(taken) - 1] - 1:
            taken.pop()
        if not taken:
            return
        path = [*taken[:-1], taken[-1] + 1]
