"""A run that is killed and goes on elsewhere, on processes under torchrun: the losses of the run that never moved."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fnlm import checkpoint
from tests import tiny_runs as tiny
from tests.sharding.cases import adamw, alone, config
from tests.sharding.elastic_worker import ROWS
from tests.sharding.torchrun import ended, kill, standalone, torchrun, until

LEGS = [(4, "zero3", "data=4"), (4, "zero1", "data=2,tensor=2"), (3, "ddp_bucketed", "data=3"), (1, "single", "")]
TRAIN = (
    "n_layers=2", "n_heads=2", "d_model=16", "seq_len=16", "batch_size=8", "precision=fp32", "dropout=0.1", "steps=40",
    "eval_every=0", "save_every=10", "sample_every=0", "health_every=0", "log_every=1", "--quiet",
)  # fmt: skip


def saved(folder: Path, step: int) -> bool:
    return checkpoint.layout.is_committed(folder / "checkpoints" / f"{step:08d}")


@pytest.mark.slow
def test_killed_and_moved_in_float64(tmp_path: Path) -> None:
    """Ten steps on each mesh, kill -9 after each save, batches of 8 rows on 3 ranks, dropout: within 1e-10."""
    for leg, (ranks, how, mesh) in enumerate(LEGS):
        words = ["tests.sharding.elastic_worker", str(tmp_path), how, mesh, "40"]
        process = torchrun(standalone(ranks), words, tmp_path)
        if leg < len(LEGS) - 1:
            until(lambda leg=leg: saved(tmp_path, 10 * leg + 10), process)
            kill(process)
        else:
            code, _, err = ended(process)
            assert code == 0, err
    rows = [line.split() for line in (tmp_path / "losses").read_text().splitlines()]
    got = {int(step): float.fromhex(loss) for step, loss in rows}  # steps behind a save were made twice
    want = [loss for loss, _ in alone(config(), adamw(), 40, ROWS)[1]]
    assert sorted(got) == list(range(40))
    assert max(abs(got[i] - want[i]) for i in range(40)) < 1e-10


@pytest.mark.slow
def test_killed_and_moved_in_float32(tmp_path: Path) -> None:
    """The same with `fnlm train` and the corpus: within 1e-5."""
    tiny.corpus(tmp_path)
    words = ["cli", "train", "shakespeare-char", "data", *TRAIN]
    code, _, err = ended(torchrun(standalone(1), [*words, "--out", "one"], tmp_path))
    assert code == 0, err
    for leg, (ranks, how, mesh) in enumerate(LEGS):
        given = ["--out", "many", "--resume", "auto", "--strategy", how, *(["--mesh", mesh] if mesh else [])]
        process = torchrun(standalone(ranks), [*words, *given], tmp_path)
        if leg < len(LEGS) - 1:
            until(lambda leg=leg: saved(tmp_path / "many", 10 * leg + 10), process)
            kill(process)
        else:
            code, _, err = ended(process)
            assert code == 0, err
    one, many = (logged(tmp_path / name) for name in ("one", "many"))
    assert sorted(one) == sorted(many) == list(range(1, 41))
    assert max(abs(one[i] - many[i]) for i in one) < 1e-5


def logged(folder: Path) -> dict[int, float]:
    rows = (json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines())
    return {row["step"]: row["train/loss"] for row in rows if "train/loss" in row}
