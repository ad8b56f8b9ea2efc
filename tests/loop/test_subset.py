"""Runs that train part of a model: adapters, or what is not frozen. What they save, resume and are loaded as."""

from __future__ import annotations

import io
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import fnlm
from fnlm import loop, lora, trainable, trained
from fnlm.checkpoint import CheckpointError
from fnlm.data import Dataset
from fnlm.evaluate import evaluate
from fnlm.sharding import parse_mesh
from fnlm.track import Many, Progress
from tests import tiny_runs as tiny


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return tiny.corpus(tmp_path_factory.mktemp("corpus"))


def saved(checkpoint: Path) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint."""
    return {k: x for file in sorted(checkpoint.glob("*.safetensors")) for k, x in load_file(file).items()}


def job(dataset: Dataset, folder: Path, **more: Any) -> loop.Job:
    run = {
        name: more.pop(name) for name in ("patience", "guard", "guard_limit", "sample_every", "keep") if name in more
    }
    cfg = tiny.model(dataset)
    base = fnlm.init_params(cfg, fnlm.key(7))
    return tiny.job(dataset, folder, tiny.training(**more), cfg, params=base, **run)


CASES = ({"lora": 3, "ema": 0.9}, {"freeze": "embed,blocks.0", "optimizer": "muon"})


@pytest.mark.parametrize("what", CASES, ids=["lora", "freeze"])
def test_a_resumed_run_is_the_same_and_the_rest_keeps_its_bits(
    dataset: Dataset, tmp_path: Path, what: dict[str, Any]
) -> None:
    first, second = (job(dataset, tmp_path / name, **what) for name in "ab")
    whole = tiny.fit(first)
    resumed = tiny.fit(replace(second, params=None, resume=tiny.fit_until(second, 6)))
    a, b = saved(whole.checkpoint), saved(resumed.checkpoint)
    assert a.keys() == b.keys()
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert first.params is not None
    same = {k for k, p in first.params.items() if torch.equal(a[k], p)}
    frozen = [k for k in first.params if k.startswith(("embed", "blocks.0"))] if "freeze" in what else first.params
    assert same == set(frozen)
    moments = [k for k in a if k.startswith("opt_state") and a[k].ndim == 2]
    assert moments
    assert not [k for k in moments if any(k.endswith(name) for name in frozen)]


def test_a_run_with_adapters_is_loaded_as_its_model(dataset: Dataset, tmp_path: Path) -> None:
    """With the average where it keeps one; what was evaluated is what is loaded."""
    begun = job(dataset, tmp_path, lora=3, lora_alpha=9.0, ema=0.5, lr=3e-2)
    outcome = tiny.fit(begun)
    found = trained.load(begun.folder, which="newest")
    assert list(found.params) == list(fnlm.shapes(begun.cfg))
    assert evaluate(found.params, found.cfg, dataset.val).loss == pytest.approx(outcome.val.loss, abs=1e-6)
    raw, there = trained.load(begun.folder, "newest", average=False), saved(outcome.checkpoint)
    own = {k: x for k, x in there.items() if lora.is_adapter(k) and "/" not in k}
    assert begun.params is not None
    merged = lora.apply(begun.params, own, 3.0)
    assert all(torch.equal(raw.params[k], merged[k]) for k in merged)
    assert any(not torch.equal(raw.params[k], found.params[k]) for k in merged)
    assert trained.load(f"{begun.folder}@8").step == 8
    assert trained.load(f"{begun.folder}@newest").step == 12
    assert trained.load(f"{begun.folder}@best").step == trained.load(begun.folder).step
    with pytest.raises(CheckpointError, match="there is no"):
        trained.load(f"{begun.folder}@7")
    alone = trained.adapters(begun.folder, "newest", average=False)
    assert (alone.rank, alone.scale, alone.params.keys()) == (3, 3.0, own.keys())


def test_a_model_without_adapters_has_none_to_give(dataset: Dataset, tmp_path: Path) -> None:
    begun = tiny.job(dataset, tmp_path, tiny.training(steps=2))
    tiny.fit(begun)
    with pytest.raises(CheckpointError, match="it was not trained with lora=RANK"):
        trained.adapters(begun.folder)


def test_what_a_model_was_before_is_measured_and_sampled(dataset: Dataset, tmp_path: Path) -> None:
    begun = job(dataset, tmp_path, lora=3, sample_every=12)
    tiny.fit(begun)
    before, *_, after = [row for row in tiny.rows(begun, "val/loss") if "val/loss" in row]
    assert begun.params is not None
    assert before["step"] == 0
    assert before["val/loss"] == pytest.approx(evaluate(begun.params, begun.cfg, dataset.val).loss)
    assert after["val/loss"] < before["val/loss"]
    assert {p.name for p in (begun.folder / "samples").iterdir()} == {"00000000.txt", "00000012.txt"}


def test_adapters_roll_back(dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A loss that is not finite once: back to the checkpoint, adapters and moments."""
    from fnlm.loop.guard import Guard

    seen: list[int] = []
    reason = Guard.reason

    def odd(self: Guard, value: float, norm: float) -> str | None:
        seen.append(1)
        return "made up" if len(seen) == 6 else reason(self, value, norm)

    monkeypatch.setattr(Guard, "reason", odd)
    begun = job(dataset, tmp_path, lora=3, guard="rollback")
    outcome = tiny.fit(begun)
    events = [row["event"] for row in tiny.rows(begun, "event")]
    assert outcome.reason == "finished"
    assert "rollback" in events


def together(job: loop.Job, strategy: str, mesh: str, trackers: Any = ()) -> loop.Outcome:
    """The run of a job by the ranks of a mesh as threads."""
    run = replace(job.run, strategy=strategy, mesh=mesh, timeout=20)
    shape = loop.mesh_of(job.cfg, job.train, run, math.prod(parse_mesh(mesh).values()), threads=True)
    with Progress(job.train.steps, quiet=True, stream=io.StringIO()) as progress:
        return loop.simulated(replace(job, run=run), Many(trackers), progress, shape)


ELSEWHERE = (
    {"lora": 3, "ema": 0.9, "dropout": 0.1},
    pytest.param({"freeze": "embed,blocks.0", "lr_scale": "norm=0.1", "layer_decay": 0.8}, marks=pytest.mark.slow),
)


@pytest.mark.parametrize("what", ELSEWHERE)
def test_ranks_train_a_part_and_go_on_elsewhere(dataset: Dataset, tmp_path: Path, what: dict[str, Any]) -> None:
    """zero3, then data x tensor, then one process: losses, evaluations, samples and checkpoints of one process."""
    one, many = (job(dataset, tmp_path / name, sample_every=4, **what) for name in ("one", "many"))
    tiny.fit(one)
    first = together(replace(many, until=4), "zero3", "data=4")
    assert sorted(p.name for p in first.checkpoint.glob("params-*"))
    second = together(replace(many, params=None, resume=first.checkpoint, until=8), "zero1", "data=2,tensor=2")
    last = tiny.fit(replace(many, params=None, resume=second.checkpoint))
    for key in ("train/loss", "val/loss", "train/grad_norm"):
        a, b = ({row["step"]: row[key] for row in tiny.rows(x, key)} for x in (one, many))
        assert a == pytest.approx(b, abs=1e-5), key
    want, got = (tiny.state_of(x.folder / "checkpoints" / "00000012") for x in (one, many))
    assert {k: x.shape for k, x in want.items()} == {k: x.shape for k, x in got.items()}
    assert many.params is not None
    rests = tiny_subset(many).rests
    assert all(torch.equal(got[f"params/{k}"], p) for k, p in many.params.items() if rests(k))
    assert max(float((want[k].double() - got[k].double()).abs().max()) for k in want) < 1e-4
    assert last.reason == "finished"
    assert evaluate(trained.load(many.folder, "newest").params, many.cfg, dataset.val).loss == pytest.approx(
        tiny.rows(one, "val/loss")[-1]["val/loss"], abs=1e-5
    )
    assert {p.name for p in (many.folder / "samples").iterdir()} == {p.name for p in (one.folder / "samples").iterdir()}


def tiny_subset(job: loop.Job) -> trainable.Subset:
    return trainable.subset_of(job.cfg, job.train)


def test_a_rollback_of_ranks_with_adapters(dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reason = loop.Guard.reason

    def once(self: loop.Guard, *x: float) -> str | None:
        said = reason(self, *x)
        return "bad" if len(self.state()["loss"]) == 6 else said

    monkeypatch.setattr(loop.Guard, "reason", once)
    begun = job(dataset, tmp_path, steps=7, lora=3, guard="rollback", guard_limit=1)
    outcome = together(begun, "zero2", "data=2")
    assert "back to step 4" in tiny.rows(begun, "event")[1]["message"]
    assert outcome.step >= 6
