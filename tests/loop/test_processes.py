"""`fnlm train --nproc`: processes over gloo learn what one learns; one that dies, hangs or is told to end ends all."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from tests import tiny_runs as tiny

ROOT = Path(__file__).parents[2]
SMALL = (
    "n_layers=2", "n_heads=2", "d_model=16", "seq_len=16", "batch_size=6", "precision=fp32", "dropout=0.1",
    "eval_every=10", "save_every=10", "sample_every=0", "health_every=0", "log_every=1", "--quiet",
)  # fmt: skip


@pytest.fixture
def place(tmp_path: Path) -> Path:
    tiny.corpus(tmp_path)
    return tmp_path


def started(place: Path, out: str, *words: str) -> subprocess.Popen[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "error", "-m", "cli", "train", "shakespeare-char", "data", *SMALL]
    return subprocess.Popen(
        [*command, "--out", out, *words], cwd=place, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True,
    )  # fmt: skip


def ended(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    try:
        out, err = process.communicate(timeout=120)
    finally:
        process.kill()
    return process.returncode, out, err


def logged(place: Path, out: str, key: str) -> dict[int, float]:
    rows = (json.loads(line) for line in (place / out / "metrics.jsonl").read_text().splitlines())
    return {row["step"]: row[key] for row in rows if key in row}


def rank(launcher: int, number: int) -> int:
    """The process id of a rank."""
    for entry in Path("/proc").iterdir():
        try:
            parent = (entry / "stat").read_text().rpartition(")")[2].split()[1]
            said = (entry / "environ").read_text().split("\0")
        except OSError:
            continue
        if int(parent) == launcher and f"RANK={number}" in said:
            return int(entry.name)
    raise AssertionError(f"there is no rank {number}")


def going(place: Path, out: str, steps: int = 12) -> None:
    """Wait until a run has made some steps."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        file = place / out / "metrics.jsonl"
        if file.is_file() and len(file.read_text().splitlines()) > steps:
            return
        time.sleep(0.05)
    raise AssertionError("the run does not go")


@pytest.mark.slow
def test_two_processes_learn_what_one_learns(place: Path) -> None:
    assert ended(started(place, "one", "steps=20"))[0] == 0
    code, out, err = ended(started(place, "two", "steps=20", "--strategy", "zero3", "--nproc", "2"))
    assert (code, err) == (0, "")
    assert len(out.splitlines()) == 1, "only rank 0 speaks"
    for key in ("train/loss", "val/loss"):
        a, b = logged(place, "one", key), logged(place, "two", key)
        assert a.keys() == b.keys()
        assert max(abs(a[k] - b[k]) for k in a) < 1e-5
    x, y = (tiny.state_of(place / name / "checkpoints" / "00000020") for name in ("one", "two"))
    assert max(float((x[k].double() - y[k].double()).abs().max()) for k in x) < 1e-4
    assert all(x[k].shape == y[k].shape and x[k].dtype == y[k].dtype for k in x)
    assert not torch.equal(x["params/embed.tokens.weight"], torch.zeros(()))


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="finds ranks in /proc")
@pytest.mark.parametrize("strategy", ["ddp", "zero3"])
def test_a_signal_to_one_rank_saves_on_all(place: Path, strategy: str) -> None:
    process = started(place, "run", "steps=250", "--strategy", strategy, "--nproc", "2")
    going(place, "run")
    os.kill(rank(process.pid, 1), signal.SIGTERM)
    code, _, err = ended(process)
    assert code == 143
    assert "SIGTERM: saved step" in err
    step = int((place / "run" / "checkpoints" / "latest").read_text())
    assert step < 250
    code, _, err = ended(started(place, "run", "--resume", "auto", "--strategy", "ddp_bucketed", "--nproc", "3"))
    assert (code, err) == (0, "")


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="finds ranks in /proc")
@pytest.mark.parametrize(
    ("number", "code", "said"),
    [
        (signal.SIGKILL, 137, r"error: rank 1 ended the run: it was killed by SIGKILL; is memory full?"),
        (signal.SIGSTOP, 1, r"error: rank 1 did not answer the others in time; all were ended"),
    ],
)
def test_a_rank_that_is_gone_ends_the_others(place: Path, number: int, code: int, said: str) -> None:
    process = started(place, "run", "steps=100000", "timeout=3", "--strategy", "zero2", "--nproc", "3")
    going(place, "run")
    began = time.monotonic()
    os.kill(rank(process.pid, 1), number)
    got, _, err = ended(process)
    assert (got, err.strip()) == (code, said)
    assert time.monotonic() - began < 20


@pytest.mark.slow
def test_a_mesh_that_does_not_fit_is_one_line(place: Path) -> None:
    words = "steps=4", "--strategy", "zero3", "--mesh", "data=3", "--nproc", "2"
    code, _, err = ended(started(place, "run", *words))
    assert (code, err.strip().splitlines()[-1].startswith("error: mesh data=3 is 3 = 3 ranks, but 2 run")) == (2, True)
    assert not (place / "run").exists()
