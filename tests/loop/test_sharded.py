"""A run by several ranks is the run of one: losses, evaluations, checkpoints; it goes on under any other strategy."""

from __future__ import annotations

import io
import math
import signal
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fnlm import checkpoint, loop
from fnlm.checkpoint import CheckpointError, SaveFailed, part_saver
from fnlm.data import Dataset
from fnlm.forecast import forecast
from fnlm.loop import Job, Outcome, memory, session
from fnlm.loop.rank import agreed
from fnlm.params import shapes
from fnlm.sharding import parse_mesh, simulate
from fnlm.track import Many, Progress
from tests import tiny_runs as tiny

DROPOUT = {"dropout_embed": 0.1, "dropout_attn": 0.1, "dropout_residual": 0.2}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return tiny.corpus(tmp_path_factory.mktemp("corpus"))


def together(job: Job, strategy: str, mesh: str, trackers: tuple[Any, ...] = ()) -> Outcome:
    """The run of the job by the ranks of a mesh as threads; checked as the command checks it."""
    run = replace(job.run, strategy=strategy, mesh=mesh, timeout=20)
    shape = loop.mesh_of(job.cfg, job.train, run, math.prod(parse_mesh(mesh).values()), threads=True)
    with Progress(job.train.steps, quiet=True, stream=io.StringIO()) as progress:
        return loop.simulated(replace(job, run=run), Many(trackers), progress, shape)


def training(**more: Any) -> Any:
    return tiny.training(**{"steps": 8, "batch_size": 8, "ema": 0.9, **more})


def logged(job: Job, key: str) -> dict[int, float]:
    return {row["step"]: row[key] for row in tiny.rows(job, key)}


def near(a: dict[int, float], b: dict[int, float]) -> bool:
    return a.keys() == b.keys() and all(abs(a[k] - b[k]) <= 1e-5 for k in a)


@pytest.fixture(scope="module")
def alone(dataset: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Job:
    job = tiny.job(
        dataset, tmp_path_factory.mktemp("alone"), training(), tiny.model(dataset, **DROPOUT), health_every=4
    )
    tiny.fit(job)
    return job


CASES = [
    ("ddp_flat", "data=2"),
    ("ddp_bucketed", "data=3"),
    ("zero1", "data=2,tensor=2"),
    ("zero2", "data=2,context=2"),
    ("zero3", "data=4"),
    ("zero3", "data=2,tensor=2"),
    ("hsdp", "replica=2,shard=2"),
    ("tensor_parallel", "tensor=2"),
    ("context", "context=2"),
]


@pytest.mark.parametrize(("strategy", "mesh"), CASES)
def test_ranks_learn_what_one_learns(dataset: Dataset, tmp_path: Path, alone: Job, strategy: str, mesh: str) -> None:
    """Losses, norms by layer, and evaluations of the average; the checkpoint is one of full tensors."""
    job = tiny.job(dataset, tmp_path, alone.train, alone.cfg, health_every=4, sample_every=8)
    outcome = together(job, strategy, mesh)
    assert (outcome.step, outcome.reason) == (8, "finished")
    for key in ("train/loss", "train/grad_norm", "val/loss", "health/grad_norm/root", "health/update_ratio/blocks.1"):
        assert near(logged(alone, key), logged(job, key)), key
    want, got = (tiny.state_of(x.folder / "checkpoints" / "00000008") for x in (alone, job))
    assert {k: v.shape for k, v in want.items()} == {k: v.shape for k, v in got.items()}
    assert max(float((want[k].double() - got[k].double()).abs().max()) for k in want) < 1e-4
    assert (job.folder / "samples" / "00000008.txt").stat().st_size


@pytest.mark.parametrize("optimizer", ["muon", "adafactor"])
def test_optimizers_of_whole_matrices(dataset: Dataset, tmp_path: Path, optimizer: str) -> None:
    train = training(steps=6, optimizer=optimizer, micro_batches=2)
    a, b = (tiny.job(dataset, tmp_path / x, train, eval_every=0, save_every=3) for x in "ab")
    tiny.fit(a)
    together(b, "zero3", "data=3")
    assert near(logged(a, "train/loss"), logged(b, "train/loss"))
    resumed = together(replace(b, resume=b.folder / "checkpoints" / "00000003"), "zero2", "data=2,tensor=2")
    assert resumed.step == 6
    assert near(logged(a, "train/loss"), logged(b, "train/loss"))


def test_a_run_goes_on_elsewhere(dataset: Dataset, tmp_path: Path) -> None:
    """zero3 on 4, data x tensor, ddp_bucketed on 3, then one process, with dropout: the losses of one process."""
    train, cfg = training(steps=20), tiny.model(dataset, **DROPOUT)
    whole, job = (tiny.job(dataset, tmp_path / x, train, cfg, eval_every=10, save_every=5) for x in ("one", "many"))
    tiny.fit(whole)
    at = None
    parts = (5, "zero3", "data=4"), (10, "zero1", "data=2,tensor=2"), (15, "ddp_bucketed", "data=3")
    for step, strategy, mesh in parts:
        outcome = together(replace(job, resume=at), strategy, mesh, (tiny.Signal("step", step),))
        assert (outcome.reason, outcome.signal, outcome.step) == ("signal", signal.SIGTERM, step)
        at = outcome.checkpoint
        checkpoint.verify(at)
    assert tiny.fit(replace(job, resume=at)).reason == "finished"
    for key in ("train/loss", "val/loss"):
        assert near(logged(whole, key), logged(job, key)), key


MESHES = [("single", ""), ("ddp_bucketed", "data=3"), ("zero3", "data=4"), ("zero2", "data=3,tensor=2"),
          ("hsdp", "replica=2,shard=2"), ("tensor_parallel", "tensor=2"), ("zero1", "data=2,context=2")]  # fmt: skip


def test_any_mesh_restores_any_other_bit_for_bit(dataset: Dataset, tmp_path: Path) -> None:
    """What one saved, each restores and saves again, with no step between."""
    train = training(steps=3)
    job = tiny.job(dataset, tmp_path / "a", train)
    path = tiny.fit(job).checkpoint
    want = tiny.state_of(path)
    for turn, (strategy, mesh) in enumerate([*MESHES[1:], *reversed(MESHES[1:])]):
        again = tiny.job(dataset, tmp_path / str(turn), train, resume=path)
        path = together(again, strategy, mesh).checkpoint
        assert path.is_relative_to(again.folder)
        got = tiny.state_of(path)
        assert all(torch.equal(want[k], got[k]) for k in want), (strategy, mesh)


def test_a_model_that_is_not_finite_ends_all_ranks(dataset: Dataset, tmp_path: Path) -> None:
    cfg = tiny.model(dataset)
    params = {k: torch.full(s, math.nan) for k, s in shapes(cfg).items()}
    job = tiny.job(dataset, tmp_path, training(), cfg, params=params, guard_limit=3)
    outcome = together(job, "zero3", "data=2")
    assert (outcome.reason, outcome.step) == ("not finite", 4)


def test_what_is_not_finite_on_one_rank_is_skipped_on_all(
    dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The fourth batch has a weight of infinity in its last row, which the last rank computes."""
    pieces, seen = session.pieces, []

    def spoilt(batch: Any, *rest: Any) -> Any:
        parts = pieces(batch, *rest)
        seen.append(None)
        if len(seen) in (7, 8):  # of both ranks
            parts[-1].weights[-1, -1] = math.inf
        return parts

    monkeypatch.setattr(session, "pieces", spoilt)
    job = tiny.job(dataset, tmp_path, training())
    outcome = together(job, "ddp_bucketed", "data=2")
    assert outcome.reason == "finished"
    assert [row["batch"] for row in tiny.rows(job, "event", "batch")] == [3]
    assert math.isfinite(outcome.loss)


def test_rollback_on_all_ranks(dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reason = loop.Guard.reason

    def once(self: loop.Guard, *x: float) -> str | None:
        said = reason(self, *x)
        return "bad" if len(self.state()["loss"]) == 6 else said

    monkeypatch.setattr(loop.Guard, "reason", once)
    job = tiny.job(dataset, tmp_path, training(steps=7), guard="rollback", guard_limit=1, eval_every=0, save_every=4)
    outcome = together(job, "zero3", "data=2")
    assert tiny.rows(job, "event")[0]["event"] == "spike"
    assert "back to step 4" in tiny.rows(job, "event")[1]["message"]
    assert outcome.step >= 6


def test_a_disk_that_stays_full_ends_all_ranks(
    dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of one rank: what it could not write is told by rank 0, and there is no checkpoint without it."""
    real = part_saver.write_part

    def full(temporary: Path, part: Any) -> None:
        if part.rank == 2:
            raise SaveFailed("no space left")
        real(temporary, part)

    monkeypatch.setattr(part_saver, "write_part", full)
    job = tiny.job(dataset, tmp_path, training(), save_every=1)
    with pytest.raises(CheckpointError, match="no space left") as error:
        together(job, "zero3", "data=3")
    assert getattr(error.value, "exit_code", None) == 1
    told = [row["message"] for row in tiny.rows(job, "event") if row["event"] == "save failed"]
    assert len(told) == 2
    assert all("rank 2: no space left" in line for line in told)
    assert checkpoint.newest_good(job.folder / "checkpoints") is None


@pytest.mark.slow
def test_a_disk_that_is_full_for_a_while_costs_one_save(
    dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, failed = part_saver.write_part, []

    def full(temporary: Path, part: Any) -> None:
        if part.rank == 1 and not failed:
            failed.append(temporary)
            raise SaveFailed("no space left")
        real(temporary, part)

    monkeypatch.setattr(part_saver, "write_part", full)
    job = tiny.job(dataset, tmp_path, training(steps=6), save_every=2, eval_every=0)
    assert together(job, "zero3", "data=2").reason == "finished"
    assert [p.name for p in sorted((job.folder / "checkpoints").glob("*"))] == [
        "00000004",
        "00000006",
        "best",
        "latest",
    ]
    assert not failed[0].exists()


def test_ranks_pass_over_a_damaged_checkpoint_together(dataset: Dataset, tmp_path: Path) -> None:
    """Each reads its share of the bytes; what one finds, all know."""
    job = tiny.job(dataset, tmp_path, training(steps=8), save_every=4, eval_every=0)
    together(job, "zero3", "data=4")
    newest = job.folder / "checkpoints" / "00000008"
    file = newest / "opt_state-00003-of-00004.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"00000008 is damaged: opt_state-00003.* has another sha256"):
        together(replace(job, resume=newest), "zero3", "data=3")
    outcome = together(replace(job, resume=newest, or_older=True), "zero3", "data=3")
    assert outcome.step == 8
    assert tiny.rows(job, "event")[-2]["message"].endswith("resumed from " + str(newest.with_name("00000004")))


def test_ranks_that_do_not_share_a_folder_are_told(
    dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Path.is_file

    def blind(self: Path, **how: Any) -> bool:
        return real(self, **how) and not (threading.current_thread().name == "rank 1" and self.name == "config.json")

    monkeypatch.setattr(Path, "is_file", blind)
    with pytest.raises(ValueError, match=r"rank 1 does not see .*config\.json, .* system that all ranks share"):
        together(tiny.job(dataset, tmp_path, training()), "zero3", "data=2")


def test_a_rank_that_fails_ends_the_others(dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pieces = session.pieces

    def failing(*args: Any) -> Any:
        if threading.current_thread().name == "rank 1":
            raise RuntimeError("a bug on rank 1")
        return pieces(*args)

    monkeypatch.setattr(session, "pieces", failing)
    with pytest.raises(RuntimeError, match="a bug on rank 1"):
        together(tiny.job(dataset, tmp_path, training()), "zero3", "data=3")


@pytest.mark.parametrize(
    ("world", "given", "said"),
    [
        (4, {"strategy": "zero3", "mesh": "data=3"}, r"mesh data=3 is 3 = 3 ranks, but 4 run"),
        (4, {"strategy": "zero3", "mesh": "data=2,tensor=3"}, r"6 ranks, but 4 run"),
        (4, {}, r"4 ranks run, but strategy=single is for one"),
        (9, {"strategy": "zero3"}, r"8 rows are too few for 9 ranks"),
        (3, {"strategy": "context"}, r"seq_len=16 is not divisible by context=3"),
        (2, {"strategy": "hsdp", "mesh": "data=2"}, r"strategy hsdp needs an axis shard"),
        (2, {"strategy": "ddp"}, r"needs processes"),
        (3, {"strategy": "tensor"}, r"n_kv_heads=2 .*tensor=3"),
        (1, {"strategy": "zero3", "mesh": "data=2"}, r"2 ranks, but 1 run"),
    ],
)
def test_what_does_not_fit_is_said_first(dataset: Dataset, world: int, given: dict[str, str], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        loop.mesh_of(tiny.model(dataset), training(), loop.RunConfig(**given), world, threads=True)


@pytest.mark.slow
def test_memory_of_several_ranks(dataset: Dataset) -> None:
    """Estimated by the forecast for all that share a memory; each choice has rows for all, the global batch is kept."""
    cfg, train = tiny.model(dataset), training(batch_size=12, micro_batches=2)
    crew = memory.Crew("zero3", {"data": 3}, here=3)
    peak = forecast(cfg, replace(train, batch_size=4), "zero3", {"data": 3}).peak
    assert memory.needed(cfg, train, crew) == 3 * (peak + memory.BESIDE)
    assert memory.needed(cfg, train, crew._replace(processes=False)) == 3 * peak + memory.BESIDE
    sizes = [(c.batch_size, c.micro_batches) for c in memory.alternatives(train, crew)]
    assert sizes == [(24, 1), (12, 2), (8, 3), (6, 4), (3, 8)]  # with 4 rows the third rank has none
    limit = memory.needed(cfg, replace(train, batch_size=6, micro_batches=4), crew)
    assert memory.largest(cfg, train, int(limit / memory.SHARE) + 1, crew).batch_size == 6
    with pytest.raises(memory.DoesNotFit, match=r"for 3 ranks of zero3 on data=3, .* even batch_size=3 takes"):
        memory.largest(cfg, train, 1000, crew)


def test_ranks_that_chose_different_micro_batches_take_the_smallest(dataset: Dataset, tmp_path: Path) -> None:
    """batch=auto looks at each machine's memory."""
    job = tiny.job(dataset, tmp_path, training(batch_size=8))

    def body(mesh: Any) -> tuple[int, int, int]:
        size = (8, 4, 2)[mesh.rank]
        own = agreed(replace(job, train=replace(job.train, batch_size=size, micro_batches=8 // size)), mesh)
        return own.train.batch_size, own.train.micro_batches, own.config["train"]["batch_size"]

    assert simulate(3, body) == [(2, 4, 2)] * 2 + [(2, 4, 8)]  # the config of one whose choice it is stays
    with pytest.raises(ValueError, match="ranks were given batches of 8 to 9 rows"):
        simulate(2, lambda mesh: agreed(replace(job, train=replace(job.train, batch_size=8 + mesh.rank)), mesh))


def test_settings_are_checked() -> None:
    with pytest.raises(ValueError, match="strategy 'zero4' is unknown; did you mean"):
        loop.RunConfig(strategy="zero4")
    with pytest.raises(ValueError, match="mesh axis 'dat' is unknown"):
        loop.RunConfig(mesh="dat=2")
    with pytest.raises(ValueError, match="timeout=0"):
        loop.RunConfig(timeout=0)
    run = loop.RunConfig(strategy="zero3", mesh="data=4")
    assert loop.for_world(run, 3, changed=False).mesh is None
    assert loop.for_world(run, 4, changed=True).mesh is None
    assert loop.for_world(run, 4, changed=False) == run
    assert loop.for_world(run, 1, changed=False).strategy == "single"
