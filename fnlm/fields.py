"""What the frozen records of settings share: a copy with changes, and the errors of their fields."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import fields
from typing import Any, TypeVar

C = TypeVar("C")


def override(config: C, **changes: Any) -> C:
    """A copy of a config with fields changed; an unknown name is a ValueError with the nearest one."""
    names = [f.name for f in fields(config)]  # type: ignore[arg-type]
    for name in changes:
        if name not in names:
            raise ValueError(f"{type(config).__name__} has no field {name!r}{did_you_mean(name, names)}")
    current = {name: getattr(config, name) for name in names}
    return type(config)(**{**current, **changes})


def did_you_mean(word: str, known: Sequence[str]) -> str:
    """The end of an error message: the nearest known word, or all of them."""
    spelled = {name.casefold(): name for name in known}
    near = difflib.get_close_matches(word.casefold(), spelled, n=1)
    return f"; did you mean {spelled[near[0]]!r}?" if near else f"; choose from {', '.join(known)}"


def at_least(config: Any, name: str, least: int) -> None:
    """Raises ValueError unless a field is a whole number of at least so much."""
    value = getattr(config, name)
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name}={value!r} must be a whole number of at least {least}")


def divisors(n: int) -> str:
    """The divisors of n, for a message."""
    return ", ".join(str(d) for d in range(1, n + 1) if n % d == 0)


def check_ramp(ramp: Sequence[Sequence[int]], name: str = "ramp") -> None:
    """Raises ValueError unless `ramp` is made of (until step, size) pairs of whole numbers, the steps rising."""
    before = 0
    for pair in ramp:
        if len(pair) != 2 or any(isinstance(n, bool) or not isinstance(n, int) for n in pair):
            raise ValueError(f"{name} has {pair!r}; write (until step, sequences) pairs such as [[100, 4], [300, 8]]")
        until, size = pair
        if until <= before or size < 1:
            raise ValueError(f"{name} has ({until}, {size}) after step {before}; choose a later step and a size >= 1")
        before = until
