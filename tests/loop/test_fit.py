"""A run from start to end: what it writes, what it measures, when it stops by itself, and what it resumes to."""

from __future__ import annotations

import json
import math
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import fnlm
from fnlm import checkpoint, loop, trained
from fnlm.data import Dataset
from fnlm.evaluate import evaluate
from tests import tiny_runs as tiny


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return tiny.corpus(tmp_path_factory.mktemp("corpus"))


def same(a: Path, b: Path) -> bool:
    x, y = tiny.state_of(a), tiny.state_of(b)
    return x.keys() == y.keys() and all(torch.equal(x[k], y[k]) for k in x)


def test_a_run_learns_and_writes_its_folder(dataset: Dataset, tmp_path: Path) -> None:
    job = tiny.job(dataset, tmp_path, tiny.training(steps=40), health_every=10, sample_every=20, eval_every=10)
    outcome = tiny.fit(job)
    assert (outcome.step, outcome.reason) == (40, "finished")
    losses = [row["train/loss"] for row in tiny.rows(job, "train/loss")]
    assert len(losses) == 40
    assert losses[-1] < losses[0] - 0.5
    assert [row["step"] for row in tiny.rows(job, "val/loss")] == [10, 20, 30, 40]
    assert {p.name for p in (job.folder / "samples").iterdir()} == {"00000020.txt", "00000040.txt"}
    last = tiny.rows(job, "train/loss")[-1]
    assert last["tokens"] == 40 * 4 * 16
    assert set(last) >= {"train/lr", "train/grad_norm", "train/clip_frac", "train/skipped", "perf/tok_per_sec"}
    assert set(last) >= {"perf/step_ms", "perf/data_frac", "perf/mfu", "mem/peak_bytes", "time"}
    assert last["perf/mfu"] is None  # the peak of a CPU is not known


def test_the_validation_loss_is_that_of_the_checkpoint(dataset: Dataset, tmp_path: Path) -> None:
    job = tiny.job(dataset, tmp_path)
    outcome = tiny.fit(job)
    model = trained.load(job.folder, which="newest")
    assert model.step == 12
    assert evaluate(model.params, model.cfg, dataset.val).loss == pytest.approx(outcome.val.loss, abs=1e-6)
    assert tiny.rows(job, "val/loss")[-1]["val/loss"] == pytest.approx(outcome.val.loss)


class Removal:
    """A tracker that removes a folder when it is told of a step."""

    def __init__(self, folder: Path, step: int) -> None:
        self.folder, self.step = folder, step

    def log(self, row: dict[str, Any]) -> None:
        if row["step"] == self.step:
            shutil.rmtree(self.folder, ignore_errors=True)

    def close(self) -> None:
        pass


@pytest.mark.skipif(os.name == "nt", reason="Windows removes no file that is mapped")
def test_a_run_outlives_its_data_folder(tmp_path: Path) -> None:
    data = tiny.corpus(tmp_path)
    job = tiny.job(data, tmp_path, save_every=2)
    outcome = tiny.fit(job, [Removal(data.folder, 5)])
    assert (outcome.step, outcome.reason, data.folder.exists()) == (12, "finished", False)
    assert trained.load(job.folder, which="newest").tokenizer.sha256 == data.tokenizer.sha256


def test_the_log_says_the_rate_that_was_used(dataset: Dataset, tmp_path: Path) -> None:
    job = tiny.job(dataset, tmp_path, tiny.training(warmup=4, schedule="cosine", min_lr=1e-3))
    tiny.fit(job)
    rates = [row["train/lr"] for row in tiny.rows(job, "train/lr")]
    rate = fnlm.presets.schedule_of(job.train, job.train.lr)
    assert rates == pytest.approx([float(rate(i)) for i in range(12)])


def test_a_ramp_and_micro_batches_see_the_samples_in_one_order(dataset: Dataset, tmp_path: Path) -> None:
    train = tiny.training(steps=6, batch_size=2, micro_batches=2, ramp=((2, 1), (4, 2)))
    job = tiny.job(dataset, tmp_path, train)
    tiny.fit(job)
    assert [row["train/batch_size"] for row in tiny.rows(job, "train/loss")] == [1, 1, 2, 2, 4, 4]
    assert [row["tokens"] for row in tiny.rows(job, "train/loss")] == [16 * n for n in (1, 2, 4, 6, 10, 14)]


def test_micro_batches_change_nothing_but_rounding(dataset: Dataset, tmp_path: Path) -> None:
    whole = tiny.fit(tiny.job(dataset, tmp_path / "a", tiny.training(steps=3)))
    parts = tiny.fit(tiny.job(dataset, tmp_path / "b", tiny.training(steps=3, batch_size=1, micro_batches=4)))
    a, b = tiny.state_of(whole.checkpoint), tiny.state_of(parts.checkpoint)
    assert max(float((a[k].float() - b[k].float()).abs().max()) for k in a if k.startswith("params")) < 1e-4


def test_an_average_is_what_is_evaluated_and_loaded(dataset: Dataset, tmp_path: Path) -> None:
    job = tiny.job(dataset, tmp_path, tiny.training(ema=0.9), snapshot_every=12)
    outcome = tiny.fit(job)
    average = trained.load(outcome.checkpoint).params
    raw = trained.load(outcome.checkpoint, average=False).params
    assert any(not torch.equal(average[k], raw[k]) for k in raw)
    assert evaluate(average, job.cfg, dataset.val).loss == pytest.approx(outcome.val.loss, abs=1e-6)
    snapshot = checkpoint.load_params(outcome.checkpoint.with_name("00000012.params"))[1]
    assert all(torch.equal(snapshot[k], average[k]) for k in average)


def test_patience_ends_a_run_and_best_is_kept(dataset: Dataset, tmp_path: Path) -> None:
    """A rate far too high after a good start: the best evaluation is an early one, and stays on the disk."""
    train = tiny.training(steps=400, lr=0.3, schedule="linear", warmup=100)
    job = tiny.job(dataset, tmp_path, train, patience=3, guard="off", keep=1)
    outcome = tiny.fit(job)
    assert outcome.reason == "early stop"
    losses = {row["step"]: row["val/loss"] for row in tiny.rows(job, "val/loss")}
    best = min(losses, key=lambda step: losses[step])
    assert outcome.step == best + 3 * 4
    assert outcome.best == pytest.approx(losses[best])
    assert trained.load(job.folder).step == best
    assert trained.load(job.folder, which="newest").step == outcome.step
    assert tiny.rows(job, "event")[-1]["event"] == "stopped"


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_resumed_run_is_the_same_run(dataset: Dataset, tmp_path: Path, optimizer: str) -> None:
    """Also with dropout, an average, a ramp, and a guard that remembers; the log has each step once."""
    cfg = tiny.model(dataset, dropout_residual=0.2, dropout_embed=0.1)
    train = tiny.training(steps=20, optimizer=optimizer, ema=0.9, ramp=((7, 2),))
    first = tiny.job(dataset, tmp_path / "whole", train, cfg)
    second = tiny.job(dataset, tmp_path / "parts", train, cfg)
    whole = tiny.fit(first)
    resumed = tiny.fit(replace(second, resume=tiny.fit_until(second, 9)))
    assert same(whole.checkpoint, resumed.checkpoint)
    keys = ("step", "train/loss", "train/lr", "train/grad_norm", "tokens")
    logged = [[[row[k] for k in keys] for row in tiny.rows(job, "train/loss")] for job in (first, second)]
    assert logged[0] == logged[1]
    assert len(logged[0]) == 20


def test_the_evaluation_that_a_kill_cut_off_is_made_up_for(dataset: Dataset, tmp_path: Path) -> None:
    job = tiny.job(dataset, tmp_path)
    tiny.fit(job)
    metrics = job.folder / "metrics.jsonl"
    kept = [line for line in metrics.read_text().splitlines() if not ("val/loss" in line and '"step": 8' in line)]
    metrics.write_text("\n".join(kept) + "\n")
    tiny.fit(replace(job, resume=job.folder / "checkpoints" / "00000008"))
    assert [row["step"] for row in tiny.rows(job, "val/loss")] == [4, 8, 12]


def test_a_finished_run_resumed_is_finished(dataset: Dataset, tmp_path: Path) -> None:
    job = tiny.job(dataset, tmp_path)
    first = tiny.fit(job)
    before = first.checkpoint.stat().st_mtime_ns
    again = tiny.fit(replace(job, resume=first.checkpoint))
    assert (again.step, again.reason) == (12, "finished")
    assert again.checkpoint.stat().st_mtime_ns == before


def test_the_checkpoint_tells_what_the_run_was(dataset: Dataset, tmp_path: Path) -> None:
    job = tiny.job(dataset, tmp_path)
    outcome = tiny.fit(job)
    assert json.loads((outcome.checkpoint / "config.json").read_text())["train"]["steps"] == 12
    settings = loop.settings_of(loop.read_config(outcome.checkpoint), outcome.checkpoint)
    assert settings == (job.cfg, job.train, job.run, job.compute)
    notes: dict[str, Any] = checkpoint.describe(outcome.checkpoint)["extra"]
    assert notes["tokens"] == 12 * 64
    assert math.isfinite(notes["loss"])


def test_a_prompt_that_cannot_be_asked_is_said_before_training(dataset: Dataset, tmp_path: Path) -> None:
    for prompt in ("", "Mia " * 10):
        with pytest.raises(ValueError, match=r"sample_prompts has .* tokens; choose 1 to 15"):
            tiny.fit(tiny.job(dataset, tmp_path, sample_prompts=(prompt,)))


def test_a_model_that_cannot_write_is_trained_all_the_same(dataset: Dataset, tmp_path: Path) -> None:
    cfg = tiny.model(dataset)
    params = {k: torch.full(s, math.nan) for k, s in fnlm.shapes(cfg).items()}
    job = tiny.job(dataset, tmp_path, tiny.training(steps=2), cfg, params=params, guard="off", sample_every=1)
    assert tiny.fit(job).reason == "finished"
    assert [row["event"] for row in tiny.rows(job, "event")] == [*["sample failed"] * 3, "finished"]


def test_samples_of_given_prompts(dataset: Dataset, tmp_path: Path) -> None:
    job = tiny.job(dataset, tmp_path, sample_prompts=("Mia and", "Tom"), sample_every=12)
    tiny.fit(job)
    text = (job.folder / "samples" / "00000012.txt").read_text()
    assert text.startswith("Mia and⏵")
    assert "\nTom⏵" in text
