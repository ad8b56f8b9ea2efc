"""A run by several ranks: what must fit before anything is allocated, and ranks as threads of this process."""

from __future__ import annotations

import io
from dataclasses import replace
from math import prod

from fnlm.config import ModelConfig, TrainConfig
from fnlm.data import Sizes
from fnlm.loop.job import Job, Outcome
from fnlm.loop.run import fit
from fnlm.loop.settings import RunConfig
from fnlm.loop.signals import Stop
from fnlm.sharded import layout_of
from fnlm.sharding import STRATEGIES, Mesh, mesh_for, parse_mesh, planned, rows_of, simulate, strategy
from fnlm.sharding.mesh import Shape
from fnlm.track import Many, Progress, Tracker
from fnlm.trainable import subset_of


def mesh_of(cfg: ModelConfig, train: TrainConfig, run: RunConfig, world: int, threads: bool = False) -> Shape:
    """The mesh of a run on `world` ranks. ValueError with the remedy where strategy, model or batch do not fit it."""
    row = strategy(run.strategy)
    if row.name == "single" and world > 1:
        many = ", ".join(name for name in STRATEGIES if name != "single")
        raise ValueError(f"{world} ranks run, but strategy=single is for one; choose --strategy {many}")
    if row.reducer == "torch" and threads:
        raise ValueError(f"strategy {row.name} is PyTorch's own reducer and needs processes; choose ddp_bucketed")
    given = None if run.mesh is None else parse_mesh(run.mesh, world)
    if world == 1:
        return {}
    shape = mesh_for(row, world, given)
    mesh = planned(shape)
    layout_of(cfg, row, mesh, subset_of(cfg, train))
    ends = Sizes(train.ramp, train.batch_size * train.micro_batches)
    for size in sorted({ends.at(step) for step in (0, *(end for end, _ in train.ramp), train.steps)}):
        for rows in {min(size, train.batch_size), size % train.batch_size or train.batch_size}:
            rows_of(rows, mesh)
    return shape


def for_world(run: RunConfig, world: int, changed: bool) -> RunConfig:
    """The settings of a run that goes on on `world` ranks, before those given now.

    A mesh of another size, or of a strategy that is `changed`, is left out; one process is `single`.
    """
    if world == 1:
        return replace(run, strategy="single", mesh=None)
    if changed or (run.mesh is not None and prod(parse_mesh(run.mesh).values()) != world):
        return replace(run, mesh=None)
    return run


def simulated(job: Job, trackers: Tracker, progress: Progress, shape: Shape) -> Outcome:
    """`fit` with the ranks of a mesh as threads of this process; the outcome of rank 0."""
    with Stop(progress.say) as stop:

        def body(mesh: Mesh) -> Outcome:
            if mesh.rank == 0:
                return fit(job, trackers, progress, mesh, stop)
            with Progress(job.train.steps, quiet=True, stream=io.StringIO()) as silent:
                return fit(job, Many([]), silent, mesh, stop)

        return simulate(shape, body, job.run.timeout, lasting=True)[0]
