"""What a run does about a loss that is not finite or jumps; each batch that was left out is named."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fnlm import data, shapes
from fnlm.config import TrainConfig
from fnlm.data import Dataset
from fnlm.loop import Guard, keys_of
from tests import tiny_runs as tiny

STEPS = 300
NOISE = "zqxjkvwpyg!?-0123456789"


@pytest.fixture(scope="module")
def noisy(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """A text that a model soon knows by heart, with a few windows of noise at one place."""
    clean = "ab" * 1600
    noise = "".join(NOISE[(7 * i * i) % len(NOISE)] for i in range(40))
    return tiny.corpus(tmp_path_factory.mktemp("noisy"), clean[:2000] + noise + clean[2000:])


def learning(**more: Any) -> TrainConfig:
    """Slow enough not to jump by itself; two rounds of the data, the noise in batches late in the first."""
    return tiny.training(steps=STEPS, batch_size=1, lr=3e-3, warmup=10, schedule="constant", **more)


def test_what_is_not_finite_is_refused() -> None:
    guard = Guard()
    assert guard.reason(1.0, 1.0) is None
    assert guard.reason(math.nan, 1.0) == "the loss is nan"
    assert guard.reason(1.0, math.inf) == "the gradient norm is inf"


def test_a_spike_is_so_many_deviations_above_the_mean() -> None:
    guard = Guard(z=6)
    for i in range(40):
        assert guard.reason(2.0 + 0.1 * (i % 2), 1.0) is None  # mean 2.05, deviation 0.05
    assert guard.reason(2.05 + 0.29, 1.0) is None
    assert "the loss is 2.5" in (guard.reason(2.5, 1.0) or "")
    assert guard.reason(0.1, 1.0) is None  # less is never a spike


def test_a_lasting_change_is_accepted_in_the_end() -> None:
    guard = Guard(z=6)
    for i in range(100):
        guard.reason(1.0 + 0.1 * (i % 3), 1.0)
    refused = [guard.reason(3.0, 1.0) is not None for _ in range(40)]
    assert refused[0]
    assert not refused[-1]


def test_a_restored_guard_decides_alike() -> None:
    first, second = Guard(z=6), Guard(z=6)
    for i in range(50):
        first.reason(1 + 0.01 * (i % 7), 1.0 + 0.02 * (i % 5))
    second.restore(first.state())
    assert [first.reason(x, 1.0) for x in (1.1, 1.2)] == [second.reason(x, 1.0) for x in (1.1, 1.2)]


def test_skip_leaves_the_update_out_and_names_the_samples(noisy: Dataset, tmp_path: Path) -> None:
    job = tiny.job(noisy, tmp_path, learning(), guard_z=5.0, eval_every=0, save_every=0)
    outcome = tiny.fit(job)
    assert (outcome.step, outcome.reason) == (STEPS, "finished")
    spikes = tiny.rows(job, "event", "batch")
    assert any(1984 <= row["first_tokens"][0] < 2040 for row in spikes), "the noise is refused"
    for row in spikes:
        assert row["event"] == "spike"
        starts = data.window_starts(noisy.train, 16, 1, keys_of(job.train)[1], row["batch"]).tolist()
        assert row["first_tokens"] == starts
        assert "its update was left out" in row["message"]
    assert tiny.rows(job, "train/skipped")[-1]["train/skipped"] == len(spikes)


def test_stop_saves_and_a_resumed_run_goes_on_behind_it(noisy: Dataset, tmp_path: Path) -> None:
    job = tiny.job(noisy, tmp_path, learning(), guard="stop", guard_z=5.0, eval_every=0, save_every=10)
    outcome = tiny.fit(job)
    assert outcome.reason == "not finite"
    bad = tiny.rows(job, "batch")[0]["batch"]
    assert outcome.step == bad + 1
    again = tiny.fit(replace(job, run=replace(job.run, guard="skip"), resume=outcome.checkpoint))
    assert (again.step, again.reason) == (STEPS, "finished")


def test_rollback_passes_over_the_batches_since_the_checkpoint(noisy: Dataset, tmp_path: Path) -> None:
    more = {"guard_z": 5.0, "eval_every": 0, "save_every": 10, "keep": 9}
    skip = tiny.job(noisy, tmp_path / "skip", learning(), **more)
    tiny.fit(skip)
    bad = tiny.rows(skip, "batch")[0]["batch"]
    job = tiny.job(noisy, tmp_path / "back", replace(learning(), steps=bad + 1), guard="rollback", **more)
    outcome = tiny.fit(job)
    back = bad - bad % 10
    assert tiny.rows(job, "event")[-2]["message"] == f"back to step {back}; batches {back} to {bad} are passed over"
    assert outcome.step == bad + 1
    a, b = tiny.state_of(outcome.checkpoint), tiny.state_of(job.folder / "checkpoints" / f"{back:08d}")
    assert all(torch.equal(a[k], b[k]) for k in b)


@pytest.mark.parametrize("guard", ["skip", "rollback"])
def test_a_model_that_is_not_finite_ends_the_run(noisy: Dataset, tmp_path: Path, guard: str) -> None:
    cfg = tiny.model(noisy)
    params = {k: torch.full(s, math.nan) for k, s in shapes(cfg).items()}
    job = tiny.job(noisy, tmp_path, tiny.training(steps=STEPS), cfg, params=params, guard=guard, guard_limit=3)
    outcome = tiny.fit(job)
    assert outcome.reason == "not finite"
    assert outcome.step <= 4
    assert "nan" in outcome.message
