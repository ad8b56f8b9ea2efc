"""What goes into a run and what comes out."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from fnlm import random
from fnlm.config import Compute, ModelConfig, TrainConfig
from fnlm.data import Dataset, boundary
from fnlm.evaluate import Evaluation
from fnlm.loop.settings import RunConfig
from fnlm.step import LossScale
from fnlm.types import Params, TrainState

Reason = Literal["finished", "early stop", "signal", "not finite"]


@dataclass(frozen=True, kw_only=True)
class Job:
    """All that a run is made of. `config` goes into each checkpoint as config.json.

    `params`: start from these instead of anew. `resume`: a checkpoint with the whole state, of this run or of another
    with the same model and optimizer; `partial`: or another one, of which only what fits is taken. `or_older`: where
    several ranks find `resume` damaged, they take the one before it (one process looks before it starts). `until`: end
    after this step, evaluated and saved, as one that goes on with the schedule of `train` later.
    """

    cfg: ModelConfig
    train: TrainConfig
    run: RunConfig
    compute: Compute
    dataset: Dataset
    folder: Path
    config: dict[str, Any]
    params: Params | None = None
    resume: Path | None = None
    partial: bool = False
    until: int | None = None
    or_older: bool = False
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))


class Begin(NamedTuple):
    """The state to go on from, and what the checkpoint noted beside it."""

    state: TrainState
    notes: dict[str, Any]


class Outcome(NamedTuple):
    """How a run ended: `signal` is the number that stopped it, `best` the best validation loss."""

    step: int
    reason: Reason
    checkpoint: Path
    loss: float
    val: Evaluation | None
    best: float | None
    seconds: float
    signal: int | None = None
    message: str = ""


def parted(job: Job) -> Job:
    """The job, with documents="apart" as what computes it: the id that its data have between documents.

    Raises DataError for data whose documents cannot be told apart.
    """
    if job.train.documents == "together":
        return job
    end, start = boundary(job.dataset)
    return replace(job, compute=replace(job.compute, document_end=end, document_start=start))


def keys_of(train: TrainConfig) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The keys of the initial parameters, the order of the data, dropout, and samples: all from `train.seed`."""
    root = random.key(train.seed)
    return random.fold_in(root, 0), random.fold_in(root, 1), random.fold_in(root, 2), random.fold_in(root, 3)


def averaged(state: TrainState) -> Params:
    """The moving average of the parameters where the optimizer keeps one (`ema`), else the parameters."""
    inner = state.opt_state.inner if isinstance(state.opt_state, LossScale) else state.opt_state
    average: Params = inner["ema"].average if isinstance(inner, dict) and "ema" in inner else state.params
    return average
