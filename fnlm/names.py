"""Parameters chosen by patterns of their names, as a shell's: `embed.*,blocks.[0-5].*`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase

from fnlm.fields import did_you_mean

EDGE = "*?["  # begin what stands for more than itself


def parted(patterns: str) -> list[str]:
    """The patterns between commas."""
    return [part.strip() for part in patterns.split(",") if part.strip()]


def chosen(patterns: str, names: Sequence[str], field: str, tail: bool = False) -> list[str]:
    """The names that any of the patterns stands for, in order.

    A pattern is a whole name or its beginning up to a dot (`embed`, `blocks.0`), with `tail` also its end (`attn.q`).
    ValueError, with the nearest names, for one that stands for nothing.
    """
    found: set[str] = set()
    for pattern in parted(patterns):
        mine = {name for name in names if matches(pattern, name, tail)}
        if not mine:
            raise ValueError(f"{field} has {pattern!r}, which no parameter is called{_nearest(pattern, names, tail)}")
        found |= mine
    return [name for name in names if name in found]


def _nearest(pattern: str, names: Sequence[str], tail: bool) -> str:
    """The name that was meant; where none is near, the single words, for all names would fill the screen."""
    known = list(parts(names, tail))
    near = did_you_mean(pattern.strip(EDGE + ".]"), known)
    return near if "did you mean" in near else f"; choose from {', '.join(n for n in known if '.' not in n)}"


def matches(pattern: str, name: str, tail: bool = False) -> bool:
    """Whether a pattern stands for a name."""
    ends = (pattern, f"{pattern}.*") + ((f"*.{pattern}", f"*.{pattern}.*") if tail else ())
    return any(fnmatchcase(name, end) for end in ends)


def parts(names: Iterable[str], tail: bool = False) -> dict[str, None]:
    """What may be meant: each name, its beginnings up to a dot, with `tail` its ends and its words; each once."""
    found: dict[str, None] = {}
    for name in names:
        words = name.split(".")
        found |= {".".join(words[:n]): None for n in range(1, len(words) + 1)}
        found |= dict.fromkeys([*words, *(".".join(words[n:]) for n in range(1, len(words)))]) if tail else {}
    return found


def factors(field: str, text: str) -> list[tuple[str, float]]:
    """The pairs of `embed.*=0.1,norm=2`. Raises ValueError for what is not PATTERN=FACTOR with a factor above 0."""
    found = []
    for part in parted(text):
        pattern, _, factor = part.rpartition("=")
        try:
            number = float(factor)
        except ValueError:
            number = 0.0
        if not pattern or not 0 < number < float("inf"):
            raise ValueError(
                f"{field} has {part!r}; write PATTERN=FACTOR with a factor above 0, as in embed.*=0.1 (freeze: 0)"
            )
        found.append((pattern, number))
    return found
