"""A job to its end, by this process, by threads, or as one rank of several; the last lines and the exit code."""

from __future__ import annotations

import json
import math
import os
import signal
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import click
import torch

from cli import ranks
from fnlm import checkpoint, loop
from fnlm.loop import Job, Outcome
from fnlm.machine import has_fast_bf16, tune_cpu
from fnlm.sharding import processes
from fnlm.sharding.mesh import describe
from fnlm.track import Many, Progress, Tracker, open_trackers

if TYPE_CHECKING:
    from cli.options import Wish

NOT_FINITE = 5


def carry_out(job: Job, wish: Wish, say: Callable[[str], None]) -> int:
    """Run the job and say how it ended; returns the exit code."""
    if job.device.type == "cpu":
        tune_cpu()
        if job.train.precision == "bf16" and not has_fast_bf16():
            say("this CPU has no bfloat16 instructions: precision=fp32 is faster here")
    at = int(checkpoint.describe(job.resume)["step"]) if job.resume else 0
    lead = ranks.is_lead()
    trackers = Many([])
    if lead:
        trackers = open_trackers(job.run.trackers, job.folder, job.config, step=at, strict=job.resume is None)
    with Progress(job.train.steps, start=at, quiet=wish.quiet or not lead) as progress:
        try:
            outcome = run_by_all(job, wish, trackers, progress, say)
        except processes.Lost:
            if ranks.PIPE in os.environ:
                return ranks.LOST  # whoever started us says which rank it was
            raise
    if not lead:
        return code_of(outcome)
    click.echo(json.dumps(as_dict(job, outcome), indent=2) if wish.as_json else "\n".join(told(job, outcome)))
    if code_of(outcome) == NOT_FINITE:
        click.echo(f"error: {outcome.message or f'the loss of the last steps is {outcome.loss}'}", err=True)
    elif outcome.signal is not None and outcome.reason == "signal":
        name = signal.Signals(outcome.signal).name
        click.echo(f"{name}: saved step {outcome.step}; go on with --resume {job.folder}", err=True)
    return code_of(outcome)


def code_of(outcome: Outcome) -> int:
    """The exit code of a run that ended so."""
    if outcome.reason == "not finite" or (outcome.reason == "finished" and not math.isfinite(outcome.loss)):
        return NOT_FINITE
    return 128 + outcome.signal if outcome.signal is not None and outcome.reason == "signal" else 0


def run_by_all(job: Job, wish: Wish, trackers: Tracker, progress: Progress, say: Callable[[str], None]) -> Outcome:
    """The run by this process alone, by threads, or as one process of several."""
    here = processes.place()
    shape = loop.mesh_of(job.cfg, job.train, job.run, wish.world, threads=here is None)
    if not shape:
        if job.run.strategy != "single":
            more = "start more with --nproc N, torchrun or --simulate N"
            say(f"one rank: {job.run.strategy} has nothing to share; {more}")
        return loop.fit(job, trackers, progress)
    if here is None:
        say(f"simulation: the {wish.world} ranks of {describe(shape)} are threads of this process")
        return loop.simulated(job, trackers, progress, shape)
    ranks.end_with_launcher()
    device, backend, shared = processes.device_for(here, job.device)
    if shared:
        say(f"simulation: {here.local_world} ranks share {torch.cuda.device_count()} GPU, over gloo")
    with processes.joined(here, shape, device, backend, job.run.timeout) as mesh:
        return loop.fit(replace(job, device=device), trackers, progress, mesh)


def as_dict(job: Job, outcome: Outcome) -> dict[str, Any]:
    """How a run ended, fit for JSON."""
    val = outcome.val._asdict() if outcome.val else None
    kept = outcome._asdict() | {"checkpoint": str(outcome.checkpoint), "val": val}
    return {"run": str(job.folder), **kept}


def told(job: Job, outcome: Outcome) -> list[str]:
    """How a run ended, in one or two lines."""
    val = f", validation {outcome.val.loss:.4f}" if outcome.val else ""
    best = f" (best {outcome.best:.4f})" if outcome.best is not None and outcome.val else ""
    minutes, seconds = divmod(round(outcome.seconds), 60)
    lines = [f"{job.folder}: step {outcome.step}, loss {outcome.loss:.4f}{val}{best}, {minutes}:{seconds:02d} min"]
    return lines + ([f"{outcome.reason}: {outcome.message}"] if outcome.reason == "early stop" else [])
