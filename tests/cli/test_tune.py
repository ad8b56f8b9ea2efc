"""`fnlm tune`: what it costs, what it finds, and that a search which was killed goes on."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from cli.main import cli
from cli.tune import candidates
from fnlm import trained
from fnlm.checkpoint import CheckpointError
from fnlm.config import TrainConfig
from fnlm.loop import halving
from fnlm.loop.halving import Candidate, Ledger, Result, cost, rounds, search
from tests import tiny_runs as tiny

SMALL = ("n_layers=2", "n_heads=2", "d_model=16", "seq_len=16", "batch_size=4", "precision=fp32", "schedule=linear")
WORDS = ("shakespeare-char-cpu", "data", *SMALL, "steps=16", "--lrs", "1e-5,3e-4,1e-2,3e-3", "--out", "search")
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str]) -> Run:
    """Run a command in this process: its exit code, stdout and stderr."""

    def inner(*words: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as ended:
            cli.main(list(words))
        out, err = capfd.readouterr()
        return int(ended.value.code or 0), out, err

    return inner


def test_rounds_halve_and_double() -> None:
    assert [tuple(r) for r in rounds(5)] == [(0.125, 5), (0.25, 3), (0.5, 2), (1.0, 1)]
    assert rounds(1) == [(1.0, 1)]
    four = [Candidate(str(i), 1.0, 100) for i in range(4)]
    assert cost(four) == 4 * 25 + 2 * 25 + 50


def losses(by_name: dict[str, float], asked: list[tuple[str, int]]) -> Callable[[Candidate, int], Result]:
    def train(candidate: Candidate, step: int) -> Result:
        asked.append((candidate.name, step))
        return Result(
            by_name[candidate.name], step, "not finite" if math.isnan(by_name[candidate.name]) else "finished"
        )

    return train


def test_the_better_half_goes_on(tmp_path: Path) -> None:
    asked: list[tuple[str, int]] = []
    found = [Candidate(name, 1.0, 100) for name in "abcd"]
    ledger = Ledger(tmp_path, {"model": "m"}, found)
    gone: list[tuple[str, int]] = []
    train = losses({"a": 3.0, "b": 1.0, "c": math.nan, "d": 2.0}, asked)
    assert search(ledger, train, lambda name: gone.append((name, len(asked)))) == "b"
    assert gone == [("a", 4), ("c", 4), ("d", 6)]
    assert asked == [(x, 25) for x in "abcd"] + [("b", 50), ("d", 50), ("b", 100)]


def test_a_ledger_goes_on_where_it_was_and_knows_its_own(tmp_path: Path) -> None:
    found, asked = [Candidate(name, 1.0, 100) for name in "ab"], list[tuple[str, int]]()
    by_name = {"a": math.inf, "b": 1.0}
    first = Ledger(tmp_path, {"model": "m"}, found)
    train = losses(by_name, asked)
    assert search(first, lambda c, n: train(c, n) if c.name == "a" else None) is None
    again = Ledger(tmp_path, {"model": "m"}, found)
    again.read()
    assert search(again, train) == "b"
    assert asked == [("a", 50), ("b", 50), ("b", 100)]
    with pytest.raises(CheckpointError, match=r"of another search \(model differ\)"):
        Ledger(tmp_path, {"model": "other"}, found).read()
    with pytest.raises(CheckpointError, match=r"of another search \(candidates differ\)"):
        Ledger(tmp_path, {"model": "m"}, found[:1]).read()
    (tmp_path / halving.LEDGER).write_text("{")
    with pytest.raises(CheckpointError, match="is damaged"):
        again.read()


def test_candidates_fit_a_budget() -> None:
    train = TrainConfig(steps=1000, batch_size=4, lr=1e-4)
    assert [c.lr for c in candidates(train, None, None, None)] == [3.3e-5, 1e-4, 3e-4, 1e-3]
    assert [c.name for c in candidates(train, "1,2", "5,9", None)][1:3] == ["lr-1-steps-9", "lr-2-steps-5"]
    for budget in (7, 100, 1001, 5000):
        found = candidates(train, "1,2,3", None, budget)
        assert cost(found) <= budget
        assert cost([c._replace(steps=c.steps + 2) for c in found]) > budget


@pytest.mark.slow
def test_a_search_finds_a_run_and_says_how_to_have_it_again(
    tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The winner, trained in parts, is the run that its line trains alone; an interrupted search goes on."""
    tiny.corpus(tmp_path)
    monkeypatch.chdir(tmp_path)
    calls: list[int] = []
    write = Ledger.write

    def killed(self: Ledger) -> None:
        write(self)
        calls.append(1)
        if len(calls) == 4:
            raise MemoryError("as if killed")

    monkeypatch.setattr(Ledger, "write", killed)
    with pytest.raises(MemoryError):
        cli.main(["tune", *WORDS, "--quiet"])
    monkeypatch.setattr(Ledger, "write", write)
    code, out, err = run("tune", *WORDS, "--quiet")
    assert (code, "holds a search; go on with --resume" in err) == (2, True)
    code, out, err = run("tune", *WORDS, "--resume", "--quiet")
    assert code == 0, err
    lines = out.splitlines()
    assert len(lines) == 1 + 4 + 2, out
    assert "best: search/lr-0.01" in out
    others = [path for path in Path("search").glob("lr-*") if path.name != "lr-0.01"]
    assert len(others) == 3
    assert all({p.name for p in x.iterdir() if p.is_dir()} == set() and tiny_rows(x) for x in others)
    begun = [row for row in tiny_rows(Path("search/lr-0.01")) if row.get("event") == "resumed"]
    assert len(begun) == 2
    line = lines[-1].split()
    assert line[:4] == ["fnlm", "train", "shakespeare-char-cpu", "data"]
    code, out, err = run(*line[1:], "--out", "alone", "--quiet")
    assert code == 0, err
    a, b = (trained.load(name, "newest") for name in ("search/lr-0.01", "alone"))
    assert a.step == b.step == 16
    assert max(float((a.params[k] - b.params[k]).abs().max()) for k in a.params) < 1e-6
    code, out, err = run("tune", *WORDS, "--resume", "--quiet")
    assert (code, out.splitlines()) == (0, lines)


@pytest.mark.slow
def test_all_checkpoints_are_kept_where_that_is_wanted(
    tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny.corpus(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert run("tune", *WORDS, "--quiet", "--keep-all", "--lrs", "1e-3,1e-2")[0] == 0
    assert all(list((tmp_path / "search" / f"lr-{lr}" / "checkpoints").glob("0*")) for lr in ("0.001", "0.01"))


def tiny_rows(folder: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_a_search_that_is_killed_goes_on(tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """kill -9 in the midst of the second candidate: the first is not trained again, the second goes on."""
    tiny.corpus(tmp_path)
    monkeypatch.chdir(tmp_path)
    words = [*WORDS, "steps=320", "eval_every=10", "--resume", "--quiet"]
    env = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    process = subprocess.Popen([sys.executable, "-m", "cli", "tune", *words], cwd=tmp_path, env=env)
    second = tmp_path / "search" / "lr-0.0003" / "checkpoints" / "latest"
    deadline = time.monotonic() + 60
    while not second.is_file() and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    first = (tmp_path / "search" / "lr-1e-05" / "metrics.jsonl").read_text()
    code, _, err = run("tune", *words)
    assert code == 0, err
    assert (tmp_path / "search" / "lr-1e-05" / "metrics.jsonl").read_text() == first
    assert any(row.get("event") == "resumed" for row in tiny_rows(tmp_path / "search" / "lr-0.0003"))
