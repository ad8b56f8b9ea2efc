"""Runs that train part of a model: adapters, or what is not frozen. What they save, resume and are loaded as."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import fnlm
from fnlm import loop, lora, trained
from fnlm.checkpoint import CheckpointError
from fnlm.data import Dataset
from fnlm.evaluate import evaluate
from tests import tiny_runs as tiny


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return tiny.corpus(tmp_path_factory.mktemp("corpus"))


def saved(checkpoint: Path) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint."""
    return {k: x for file in sorted(checkpoint.glob("*.safetensors")) for k, x in load_file(file).items()}


def job(dataset: Dataset, folder: Path, **more: Any) -> loop.Job:
    run = {name: more.pop(name) for name in ("patience", "guard", "sample_every", "keep") if name in more}
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


def test_several_ranks_are_refused(dataset: Dataset, tmp_path: Path) -> None:
    for what, says in (({"lora": 2}, "lora=2"), ({"freeze": "embed"}, "freeze=embed")):
        begun = job(dataset, tmp_path, **what)
        run = replace(begun.run, strategy="zero1")
        with pytest.raises(ValueError, match=f"{says} trains part of the model, on one process"):
            loop.mesh_of(begun.cfg, begun.train, run, 2, threads=True)
