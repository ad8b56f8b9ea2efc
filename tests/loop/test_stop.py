"""SIGINT and SIGTERM, memory that runs out, and a disk that is full: nothing is lost, and each says what to do."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fnlm import checkpoint
from fnlm.checkpoint import CheckpointError, Saver
from fnlm.data import Dataset
from fnlm.loop import DoesNotFit, Stop, memory, session, team
from tests import tiny_runs as tiny


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return tiny.corpus(tmp_path_factory.mktemp("corpus"))


def signalling(call: Callable[..., Any], number: int) -> Callable[..., Any]:
    """The same call, at whose beginning a signal comes."""

    def inner(*args: Any, **kwargs: Any) -> Any:
        os.kill(os.getpid(), number)
        return call(*args, **kwargs)

    return inner


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("where", ["step", "evaluation", "save", "sample"])
def test_a_signal_saves_and_the_run_goes_on_as_it_was(
    dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, where: str
) -> None:
    whole = tiny.fit(tiny.job(dataset, tmp_path / "whole", sample_every=4))
    job = tiny.job(dataset, tmp_path / "cut", sample_every=4)
    with monkeypatch.context() as patch:
        if where == "step":
            patch.setattr(session, "pieces", signalling(session.pieces, number))
        elif where == "evaluation":
            patch.setattr(team, "evaluate", signalling(team.evaluate, number))
        elif where == "save":
            patch.setattr(Saver, "save", signalling(Saver.save, number))
        else:
            patch.setattr(session.Sampler, "write", signalling(session.Sampler.write, number))
        stopped = tiny.fit(job)
    assert (stopped.reason, stopped.signal) == ("signal", number)
    assert stopped.step == {"step": 1, "evaluation": 4, "save": 4, "sample": 5}[where]
    checkpoint.verify(stopped.checkpoint)
    assert checkpoint.newest_good(job.folder / "checkpoints") == stopped.checkpoint
    resumed = tiny.fit(replace(job, resume=stopped.checkpoint))
    a, b = tiny.state_of(whole.checkpoint), tiny.state_of(resumed.checkpoint)
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert [row["step"] for row in tiny.rows(job, "val/loss")] == [4, 8, 12]


def test_handlers_are_given_back(dataset: Dataset, tmp_path: Path) -> None:
    before = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    tiny.fit(tiny.job(dataset, tmp_path, tiny.training(steps=1)))
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == before


def test_another_thread_catches_nothing(dataset: Dataset, tmp_path: Path) -> None:
    outcomes: list[Any] = []
    job = tiny.job(dataset, tmp_path, tiny.training(steps=2))
    thread = threading.Thread(target=lambda: outcomes.append(tiny.fit(job)))
    thread.start()
    thread.join()
    assert outcomes[0].reason == "finished"


def test_the_second_signal_quits_at_once(tmp_path: Path) -> None:
    pid = os.fork()
    if pid == 0:  # a child, so that the test survives it
        with Stop():
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGINT)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 130


def test_memory_that_runs_out_says_what_would_fit(
    dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*unused: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    job = tiny.job(dataset, tmp_path, tiny.training(batch_size=64))
    monkeypatch.setattr(session, "pieces", full)
    monkeypatch.setattr("fnlm.loop.run.memory_available", lambda: memory.BESIDE * 10 // 9 + 2_000_000)
    with pytest.raises(DoesNotFit, match=r"batch_size=\d+ micro_batches=\d+ would take .* and learn the same"):
        tiny.fit(job)


def test_another_error_is_not_taken_for_memory(
    dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(*unused: Any) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr(session, "pieces", wrong)
    with pytest.raises(RuntimeError, match="a bug"):
        tiny.fit(tiny.job(dataset, tmp_path))


def test_the_largest_micro_batch_keeps_the_global_batch(dataset: Dataset) -> None:
    cfg, train = tiny.model(dataset), tiny.training(batch_size=12, micro_batches=2)
    for n in (1, 3, 8, 24):
        limit = memory.needed(cfg, tiny.training(batch_size=n, micro_batches=24 // n))
        found = memory.largest(cfg, train, int(limit / memory.SHARE) + 1)
        assert found.batch_size * found.micro_batches == 24
        assert memory.needed(cfg, found) <= limit
    with pytest.raises(DoesNotFit, match="even batch_size=1 takes"):
        memory.largest(cfg, train, 1000)


def test_a_trial_goes_down_until_it_fits() -> None:
    tried = []

    def attempt(train: Any) -> None:
        tried.append(train.batch_size)
        if train.batch_size > 6:
            raise torch.OutOfMemoryError("out of memory")

    assert memory.tried(tiny.training(batch_size=24), attempt).batch_size == 6
    assert tried == [24, 12, 8, 6]
    with pytest.raises(RuntimeError, match="a bug"):
        memory.tried(tiny.training(), lambda train: (_ for _ in ()).throw(RuntimeError("a bug")))


def test_a_trial_step_runs(dataset: Dataset) -> None:
    train = tiny.training(batch_size=2, micro_batches=3, optimizer="muon")
    memory.one_step(tiny.model(dataset), train, tiny.Compute(), torch.device("cpu"))


def test_a_disk_that_is_full_for_a_while_does_not_stop_training(
    dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job, left, save = tiny.job(dataset, tmp_path), [CheckpointError("no space left")] * 2, Saver.save

    def sometimes(self: Saver, *args: Any, **kwargs: Any) -> Any:
        if left:
            raise left.pop()
        return save(self, *args, **kwargs)

    monkeypatch.setattr(Saver, "save", sometimes)
    outcome = tiny.fit(job)
    assert outcome.reason == "finished"
    assert [row["event"] for row in tiny.rows(job, "event")] == ["save failed", "save failed", "finished"]
    assert checkpoint.newest_good(job.folder / "checkpoints") == outcome.checkpoint


@pytest.mark.parametrize("snapshot_every", [None, 4])
def test_a_failure_in_the_background_does_not_cost_the_next_save(
    dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, snapshot_every: int | None
) -> None:
    """It is told when the next one begins, which is made all the same; also where snapshots are written between."""
    left, write = [CheckpointError("no space left")], Saver._write

    def sometimes(self: Saver, *args: Any) -> None:
        if left:
            raise left.pop()
        write(self, *args)

    monkeypatch.setattr(Saver, "_write", sometimes)
    job = tiny.job(dataset, tmp_path, eval_every=0, snapshot_every=snapshot_every, keep=9)
    assert tiny.fit(job).reason == "finished"
    assert [row["event"] for row in tiny.rows(job, "event")] == ["save failed", "finished"]
    there = {path.name for path in (job.folder / "checkpoints").iterdir() if path.is_dir()}
    assert there >= {"00000008", "00000012"}


def test_a_disk_that_stays_full_ends_the_run(dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any, **kwargs: Any) -> None:
        raise CheckpointError("no space left")

    monkeypatch.setattr(Saver, "save", full)
    with pytest.raises(CheckpointError, match="no space left"):
        tiny.fit(tiny.job(dataset, tmp_path))
