"""A run from its settings to its end; what happens between two steps is in `session`."""

from __future__ import annotations

import sys

import torch

from fnlm import checkpoint, tree
from fnlm.checkpoint import Saver
from fnlm.environment import environment, memory_available
from fnlm.loop import folder as files
from fnlm.loop import memory
from fnlm.loop.job import Begin, Job, Outcome, keys_of
from fnlm.loop.session import Session
from fnlm.loop.signals import Stop
from fnlm.params import init_params, shapes
from fnlm.presets import optimizer_of
from fnlm.step import Plan, init_state
from fnlm.track import JsonLines, Many, Progress, Tracker
from fnlm.types import TrainState


def fit(job: Job, trackers: Tracker, progress: Progress) -> Outcome:
    """Train until the last step, an early stop, SIGINT or SIGTERM (saved first), or the guard's end.

    Raises DoesNotFit where memory runs out, with what would fit; CheckpointError where a checkpoint cannot be used or
    written; DataError for data that cannot be. What was saved before stays.
    """
    begin, metrics = start(job), job.folder / files.METRICS
    files.write(job.folder, job.config, environment(sys.argv))
    if job.resume is not None:
        JsonLines.truncate(metrics, int(begin.state.step))
    log = Many([JsonLines(metrics), trackers])
    saver = Saver(job.folder / files.CHECKPOINTS, job.run.keep, job.run.keep_every)
    with Stop(progress.say) as stop, saver:
        try:
            return Session(job, begin, saver, stop, Many([log, progress]), progress).run()
        except (RuntimeError, MemoryError) as error:
            if not memory.is_out_of_memory(error):
                raise
            raise memory.DoesNotFit(memory.advice(job.cfg, job.train, memory_available())) from error
        finally:
            log.close()


def start(job: Job) -> Begin:
    """A fresh state, or that of the checkpoint: every bit of it. Raises CheckpointError where it does not fit."""
    model_key, _, drop_key, _ = keys_of(job.train)
    optimizer, plan = optimizer_of(job.train, job.cfg), Plan(job.train.precision)
    if job.resume is None:
        params = init_params(job.cfg, model_key) if job.params is None else job.params
        here = {k: p.to(job.device) for k, p in params.items()}
        return Begin(init_state(here, optimizer, plan, drop_key), {})
    if job.partial:
        fresh = {k: p.to(job.device) for k, p in init_params(job.cfg, model_key).items()}
        return Begin(*checkpoint.restore(job.resume, init_state(fresh, optimizer, plan, drop_key), partial=True))
    outline = {k: torch.empty(shape, device="meta") for k, shape in shapes(job.cfg).items()}
    like = init_state(outline, optimizer, plan, drop_key)
    state, notes = checkpoint.restore(job.resume, like)
    # what the optimizer keeps on the CPU (counts) stays there
    placed: TrainState = tree.map(lambda saved, wanted: saved.to(job.device) if wanted.is_meta else saved, state, like)
    return Begin(placed, notes)
