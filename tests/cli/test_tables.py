"""Numbers and tables as text."""

from __future__ import annotations

import pytest

from cli.tables import columns, in_bytes, in_si, wrapped


@pytest.mark.parametrize(
    ("n", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"), (1024, "1.00 KiB"), (1536, "1.50 KiB"),
        (12_496_960 * 4, "47.7 MiB"), (1 << 40, "1.00 TiB"), (1 << 70, "1048576 PiB"),
    ],
)  # fmt: skip
def test_bytes(n: int, text: str) -> None:
    assert in_bytes(n) == text


@pytest.mark.parametrize(
    ("n", "text"),
    [
        (0, "0"), (999, "999"), (1000, "1.00 k"), (12_496_960, "12.5 M"), (999_999, "1.00 M"),
        (99_960_000, "100 M"), (1.5e12, "1.50 T"), (2.52e20, "2.52e+20"),
    ],
)  # fmt: skip
def test_thousands(n: float, text: str) -> None:
    assert in_si(n) == text


def test_columns_are_aligned_and_end_where_their_text_ends() -> None:
    assert columns([("a", "1", "x"), ("bcd", "23", "")], left=(0, 2)) == ["  a     1  x", "  bcd  23"]
    assert columns([("", "", "")]) == [""]


def test_wrapping_keeps_every_part() -> None:
    parts = [f"part{i}" for i in range(40)]
    lines = wrapped(parts)
    assert max(map(len, lines)) <= 100
    assert len(lines) > 1
    assert ", ".join(line.strip().rstrip(",") for line in lines).split(", ") == parts
    assert wrapped(["x" * 200, "y"]) == ["  " + "x" * 200 + ",", "  y"]
