"""Checkpoints know no mesh: what one wrote, any other reads, bit for bit, and goes on with as if it had not moved."""

from __future__ import annotations

from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import fnlm
from fnlm import checkpoint, optim, tree
from fnlm.checkpoint import CheckpointError, PartSaver
from fnlm.elastic import Elastic
from fnlm.sharded import layout_of, make_sharded_step, sharded_state
from fnlm.sharding import Mesh, largest, parse_mesh, simulate
from tests.reference import random_params
from tests.sharding.cases import adamw, alone, batch, config
from tests.sharding.test_parity import muon

MESHES = (
    ("single", ""),
    ("ddp_bucketed", "data=3"),
    ("zero1", "data=2,context=2"),
    ("zero2", "data=3,tensor=2"),
    ("zero3", "data=4"),
    ("hsdp", "replica=2,shard=3"),
    ("tensor_parallel", "tensor=3"),
)


class Run:
    """One rank: the pieces that a run under a strategy is made of."""

    def __init__(self, how: str, mesh: Mesh, optimizer: fnlm.Transform, **more: Any) -> None:
        self.cfg, self.optimizer, plan = config(**more), optimizer, fnlm.Plan()
        self.layout = layout_of(self.cfg, how, mesh)
        self.step = make_sharded_step(
            lambda axes: fnlm.make_lm_loss(self.cfg, fnlm.Compute(), axes), optimizer, self.layout
        )
        self.fresh = lambda: sharded_state(
            random_params(fnlm.shapes(self.cfg)), optimizer, self.layout, plan, fnlm.key(3)
        )
        self.elastic = Elastic(self.layout, optimizer, plan, fnlm.key(3))
        # the reference trains in float64
        self.elastic.like = tree.map(lambda x: x.double() if x.is_floating_point() else x, self.elastic.like)


def tensors(state: fnlm.TrainState) -> dict[str, torch.Tensor]:
    return tree.flatten({"params": state.params, "opt_state": state.opt_state})


def moved(folder: Path, how: str, mesh: str, start: Path | None, steps: range, optimizer: Any, **more: Any) -> Any:
    """Some steps under a strategy, from a checkpoint to a checkpoint; the losses."""

    def body(at: Mesh) -> list[float]:
        run = Run(how, at, optimizer, **more)
        state = run.fresh()
        if start is not None:
            state, _ = checkpoint.restore(start, run.elastic.like, part=run.elastic.box)
        losses = []
        for i in steps:
            state, metrics = run.step(state, batch(run.cfg, i))
            losses.append(float(metrics["train/loss"]))
        with PartSaver(folder, Meeting(at), run.elastic.owned()) as saver:
            saver.save(state, config={})
        return losses

    return simulate(parse_mesh(mesh), body)[0]


class Meeting:
    """The ranks of a mesh, as those that save together."""

    def __init__(self, mesh: Mesh) -> None:
        self.rank, self.world, self.all = mesh.rank, mesh.world, mesh.axis(*mesh.shape)

    def agree(self, error: CheckpointError | None) -> None:
        assert error is None
        largest(torch.zeros(1), self.all)


@pytest.mark.slow
def test_seven_meshes_restore_seven(tmp_path: Path) -> None:
    """Each rank has exactly its part of what the writer had, of parameters and moments, uneven ones included."""
    optimizer = adamw()
    for number, (how, mesh) in enumerate(MESHES):
        folder = tmp_path / str(number)
        moved(folder, how, mesh, None, range(2), optimizer, n_heads=3, d_model=6, vocab_size=13)
        path = folder / "00000002"

        def body(at: Mesh, how: str, path: Path = path, number: int = number) -> None:
            run = Run(how, at, optimizer, n_heads=3, d_model=6, vocab_size=13)
            state, _ = checkpoint.restore(path, run.elastic.like, part=run.elastic.box)
            full, _ = checkpoint.restore(path, run.elastic.like)
            again = run.elastic.whole(state, True)
            assert again is not None
            cut, got, back, want = (tensors(s) for s in (run.elastic.cut(full), state, again, full))
            assert all(torch.equal(cut[k], got[k]) for k in cut)
            assert all(torch.equal(back[k], want[k]) for k in want)
            for k, p in run.fresh().params.items() if number == 0 else ():
                assert p.shape == got[f"params/{k}"].shape == got[f"opt_state/adam/mu/{k}"].shape

        for other, shape in MESHES:
            simulate(parse_mesh(shape), lambda at, other=other, body=body: body(at, other))


@pytest.mark.parametrize("name", ["adamw", "muon", "adafactor"])
def test_a_run_that_moves_is_the_same_run(tmp_path: Path, name: str) -> None:
    """Losses within 1e-10 of those of one process, in float64 with dropout, over five moves."""
    optimizer = {"adamw": adamw(), "muon": muon(), "adafactor": optim.adafactor(1e-2)}[name]
    legs = [("zero3", "data=4"), ("zero1", "data=2,tensor=2"), ("ddp_bucketed", "data=3"), ("single", ""),
            ("hsdp", "replica=2,shard=2")]  # fmt: skip
    losses, at = [], None
    for leg, (how, mesh) in enumerate(legs):
        losses += moved(tmp_path, how, mesh, at, range(2 * leg, 2 * leg + 2), optimizer)
        at = tmp_path / f"{2 * leg + 2:08d}"
    want = [loss for loss, _ in alone(config(), optimizer, 10)[1]]
    assert max(abs(a - b) for a, b in zip(losses, want, strict=True)) < 1e-10


@pytest.mark.parametrize(
    ("how", "mesh", "writes", "reads"),
    [("zero3", "data=4", 1 / 4, 1 / 4), ("ddp_bucketed", "data=3", 1 / 3, 1.0),
     ("hsdp", "replica=2,shard=3", 1 / 6, 1 / 3), ("zero2", "data=3,tensor=2", 1 / 6, 1 / 6)],
)  # fmt: skip
def test_each_writes_what_it_owns_and_reads_what_it_needs(
    tmp_path: Path, how: str, mesh: str, writes: float, reads: float
) -> None:
    """All bytes of the state are written once, and not by a few; a rank reads those that it holds and no others."""
    optimizer, sizes = adamw(), {"d_model": 16, "n_heads": 8, "vocab_size": 67}
    moved(tmp_path, how, mesh, None, range(0), optimizer, **sizes)
    path = tmp_path / "00000000"
    ranks = prod(parse_mesh(mesh).values())
    with_headers = [0] * ranks
    for file in path.glob("*.safetensors"):
        with_headers[int(file.name.split("-")[1])] += file.stat().st_size
    written = [sum(_bytes(file) for file in path.glob(f"*-{rank:05d}-of-*")) for rank in range(ranks)]
    assert all(0 < n < there < n + 30_000 for n, there in zip(written, with_headers, strict=True))

    def body(at: Mesh) -> tuple[int, int]:
        run = Run(how, at, optimizer, **sizes)
        state, _ = checkpoint.restore(path, run.elastic.like, part=run.elastic.box)
        return tree.nbytes(state), tree.nbytes(tensors(run.elastic.like))

    read = simulate(parse_mesh(mesh), body)
    total = read[0][1]
    assert sum(written) == total
    assert max(written) < 1.25 * writes * total, written
    assert max(n for n, _ in read) < 1.25 * reads * total, read


def _bytes(file: Path) -> int:
    """Of the tensors of a file, without its header."""
    return sum(tree.nbytes(x) for x in load_file(file).values())
