"""docs/checkpoints.md: its code runs, and its layout is the one on disk."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import fnlm
from fnlm import checkpoint, tree
from fnlm.checkpoint import layout
from fnlm.checkpoint.packing import flat
from tests.checkpoint.by_ranks import save_by_ranks
from tests.checkpoint.test_faults import state_at

PAGE = (Path(__file__).parents[2] / "docs" / "checkpoints.md").read_text(encoding="utf-8")
RUNS = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)


def test_the_code_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    save_and_resume, without_fnlm, _ = RUNS
    first: dict[str, Any] = {}
    exec(save_and_resume, first)
    again: dict[str, Any] = {}
    exec(save_and_resume, again)
    assert tree.equal(again["state"], first["state"])
    assert again["extra"] == {"loss": 1.25}
    plain: dict[str, Any] = {}
    exec(without_fnlm, plain)
    assert capsys.readouterr().out == f"0 {{'loss': 1.25}} {len(first['state'].params)}\n"
    assert tree.equal(plain["params"], {k: first["state"].params[k] for k in plain["params"]})
    assert plain["mu"].shape == (32, 32)
    assert "fnlm" not in without_fnlm


def test_what_ranks_wrote_is_put_together(tmp_path: Path) -> None:
    path = save_by_ranks(tmp_path, state_at(3), config={})
    given: dict[str, Any] = {"path": path, "about": checkpoint.describe(path), "load_file": load_file}
    exec(RUNS[2], given)
    assert tree.equal(given["tensors"], flat(state_at(3)))


def test_the_layout_is_the_one_on_disk(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    params = {"w": torch.ones(2), "base": torch.ones(2)}
    state = fnlm.init_state(params, fnlm.optim.adam(1e-3))._replace(step=torch.tensor(1000))
    path = checkpoint.save(
        tmp_path / "c", state, config={}, tokenizer=tmp_path / "tokenizer.json", frozen=lambda name: name == "base"
    )
    alone = checkpoint.save(tmp_path / "c", state, config={}, what="params")
    checkpoint.mark_best(path)
    shown = set(re.findall(r"^ +([\w.]+)/? {2,}", PAGE.split("```")[1], re.MULTILINE)) | {path.name}
    there = {p.name for p in (*path.iterdir(), *path.parent.iterdir())}
    assert there == shown | {layout.FROZEN}
    assert alone.name in shown
    assert set(checkpoint.describe(path)) == {"format", "step", "key", "what", "extra", "tensors"}
