"""Why a checkpoint does not fit a run: which settings are not those it was saved with, and make other tensors."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, replace
from typing import Any

import torch

from fnlm import checkpoint, tree
from fnlm.checkpoint import CheckpointError, Misfit
from fnlm.config import override
from fnlm.loop.folder import CONFIG, read_config, settings_of
from fnlm.loop.job import Job, keys_of
from fnlm.loop.team import Alone


def explained(job: Job, error: Misfit) -> Misfit:
    """The error, its remedy naming the settings that make the difference, where the checkpoint tells its own."""
    assert job.resume is not None
    try:
        model, train, *_ = settings_of(read_config(job.resume), job.resume / CONFIG)
    except CheckpointError:
        return error
    if checkpoint.describe(job.resume)["what"] == "params":
        return error
    found = list(_culprits(replace(job, cfg=model, train=train), job))
    if not found:
        return error
    now, then = (", ".join(f"{name}={pair[i]}" for name, *pair in found) for i in (0, 1))
    head = str(error).splitlines()[:-1]
    last = f"use {then}, with which it was saved, instead of {now}, or --partial to keep only what fits"
    return Misfit("\n".join([*head, last]))


def _culprits(saved: Job, wished: Job) -> Iterator[tuple[str, Any, Any]]:
    """The fields that change what is saved, alone or with those before them: name, wished value, saved value."""
    at, tensors = saved, _tensors(saved)
    for record in ("cfg", "train"):
        before, after = asdict(getattr(saved, record)), asdict(getattr(wished, record))
        for name in (name for name in before if before[name] != after[name]):
            try:
                changed = replace(at, **{record: override(getattr(at, record), **{name: after[name]})})
                made = _tensors(changed)
            except ValueError:  # not without one of the others
                yield name, after[name], before[name]
                continue
            if made != tensors:
                yield name, after[name], before[name]
            at, tensors = changed, made


def _tensors(job: Job) -> dict[str, Any]:
    """Shape and dtype of all that the job's checkpoints hold."""
    team = Alone(job)
    outline = {k: torch.empty(shape, device="meta") for k, shape in team.subset.sizes.items()}
    state = team.described(outline, keys_of(job.train)[2])
    return {k: (t.shape, t.dtype) for k, t in tree.leaves({"params": state.params, "opt_state": state.opt_state})}
