"""docs/sharding.md: its table is the strategies', its pictures are there, its code runs."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import torch

import fnlm
from fnlm.sharding import ALIASES, STRATEGIES, strategy

DOCS = Path(__file__).parents[2] / "docs"
PAGE = (DOCS / "sharding.md").read_text(encoding="utf-8")


def test_the_table_has_every_strategy() -> None:
    rows = re.findall(r"^\| (`.*?) \|", PAGE, re.MULTILINE)
    names = [re.findall(r"`(\w+)`", row) for row in rows]
    assert [first for first, *_ in names] == list(STRATEGIES)
    assert {alias: first for first, *more in names for alias in more} == ALIASES


def test_every_picture_is_there() -> None:
    pictures = re.findall(r"\]\((images/\w+\.svg)\)", PAGE)
    assert len(pictures) == 7
    for picture in pictures:
        text = (DOCS / picture).read_text(encoding="utf-8")
        assert ElementTree.fromstring(text).get("aria-label")
        assert "prefers-color-scheme" in text


def test_the_code_runs() -> None:
    before = dict(STRATEGIES)
    row, module = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    try:
        exec(row, {})
        assert strategy("zero2_ahead").prefetch == 3
    finally:
        STRATEGIES.clear()
        STRATEGIES.update(before)
    names: dict[str, Any] = {}
    exec(module, names)
    state, optimizer = fnlm.init_state(names["weights"], names["optimizer"]), names["optimizer"]
    step = fnlm.make_step(names["loss"], optimizer)
    for _ in range(20):
        state, metrics = step(state, names["batch"])
    assert abs(float(metrics["train/loss"]) - names["last"]) < 1e-5
    assert all(torch.allclose(state.params[k], names["trained"][k], atol=1e-4) for k in state.params)
