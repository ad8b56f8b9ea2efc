"""One rank of a run in float64 that torchrun starts: goes on from the newest checkpoint, saves every ten steps.

python -m tests.sharding.elastic_worker FOLDER STRATEGY MESH STOP: rank 0 writes the loss of each step to FOLDER/losses.
"""

from __future__ import annotations

import gc
import os
import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

import fnlm
from fnlm import checkpoint, tree
from fnlm.checkpoint import CheckpointError, PartSaver
from fnlm.elastic import Elastic
from fnlm.sharded import layout_of, make_sharded_step, sharded_state
from fnlm.sharding import Mesh, connect, largest, parse_mesh, planned
from tests.reference import random_params
from tests.sharding.cases import adamw, batch, config

EVERY, ROWS = 10, 8  # rows that three ranks cannot share evenly


class Meeting:
    """The ranks of a mesh, as those that save together."""

    def __init__(self, mesh: Mesh) -> None:
        self.rank, self.world, self.all = mesh.rank, mesh.world, mesh.axis(*mesh.shape)

    def agree(self, error: CheckpointError | None) -> None:
        assert error is None
        largest(torch.zeros(1), self.all)


def train(folder: Path, how: str, mesh: Mesh, stop: int) -> None:
    cfg, optimizer, plan, key = config(), adamw(), fnlm.Plan(), fnlm.key(3)
    layout = layout_of(cfg, how, mesh)
    step = make_sharded_step(lambda axes: fnlm.make_lm_loss(cfg, fnlm.Compute(), axes), optimizer, layout)
    elastic = Elastic(layout, optimizer, plan, key)
    elastic.like = tree.map(lambda x: x.double() if x.is_floating_point() else x, elastic.like)
    newest = checkpoint.newest_good(folder / "checkpoints")
    if newest is None:
        state = sharded_state(random_params(fnlm.shapes(cfg)), optimizer, layout, plan, key)
    else:
        state, _ = checkpoint.restore(newest, elastic.like, part=elastic.box)
    with PartSaver(folder / "checkpoints", Meeting(mesh), elastic.owned()) as saver:
        for i in range(int(state.step), stop):
            state, metrics = step(state, batch(cfg, i, ROWS))
            if mesh.rank == 0:
                with (folder / "losses").open("a") as file:
                    print(i, float(metrics["train/loss"]).hex(), file=file)
            if (i + 1) % EVERY == 0:
                saver.save(state, config={})


def main(folder: Path, how: str, shape: str, stop: int) -> None:
    torch.set_num_threads(1)
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1:
        return train(folder, how, planned({}), stop)
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    mesh = connect(parse_mesh(shape, world), timeout=60)
    train(folder, how, mesh, stop)
    del mesh
    gc.collect()
    dist.destroy_process_group()
    return None


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[3], int(sys.argv[4]))
