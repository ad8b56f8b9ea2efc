"""Numbers and tables as plain text for a terminal."""

from __future__ import annotations

from collections.abc import Sequence

import click

WIDTH = 100


def columns(rows: Sequence[Sequence[str]], left: Sequence[int] = (0,), indent: str = "  ") -> list[str]:
    """Aligned lines; the columns whose index is in `left` to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]

    def aligned(row: Sequence[str]) -> str:
        cells = zip(range(len(row)), row, widths, strict=True)
        return indent + "  ".join(cell.ljust(w) if i in left else cell.rjust(w) for i, cell, w in cells)

    return [aligned(row).rstrip() for row in rows]


def heading(title: str) -> list[str]:
    """A line to begin a section, bold on a terminal, after an empty one."""
    return ["", click.style(title, bold=True)]


def wrapped(parts: Sequence[str], joint: str = ", ", indent: str = "  ") -> list[str]:
    """The parts on as few lines as they fit on; none is cut."""
    lines: list[str] = []
    for part in parts:
        if lines and len(lines[-1] + joint + part) < WIDTH:
            lines[-1] += joint + part
        else:
            lines[-1:] = [*(line + joint.rstrip() for line in lines[-1:]), indent + part]
    return lines


def in_bytes(n: float) -> str:
    """1536 -> '1.50 KiB'; three digits and a binary unit."""
    return _scaled(n, 1024, ("B", "KiB", "MiB", "GiB", "TiB", "PiB"))


def in_si(n: float) -> str:
    """12_496_960 -> '12.5 M'; three digits and a thousands letter, or an exponent above that."""
    return _scaled(n, 1000, ("", "k", "M", "G", "T")) if n < 1e15 else f"{n:.2e}"


def _scaled(n: float, base: int, units: Sequence[str]) -> str:
    power = 0
    while n >= base * (1 - 0.0005) and power < len(units) - 1:
        n, power = n / base, power + 1
    digits = 0 if power == 0 and n == int(n) else max(0, 2 - len(str(int(n + 0.05))) + 1)
    return f"{n:.{digits}f} {units[power]}".rstrip()
