"""Who trains: this process alone. What the session asks of it is the same as of ranks that share the work."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from fnlm import checkpoint, tree
from fnlm.checkpoint import PartSaver, Saver
from fnlm.evaluate import Evaluation, evaluate
from fnlm.loop import health
from fnlm.loop.folder import CHECKPOINTS
from fnlm.loop.job import Begin, Job, keys_of
from fnlm.loop.memory import Crew
from fnlm.loop.signals import Stop
from fnlm.losses import make_lm_loss
from fnlm.params import init_params
from fnlm.presets import optimizer_of, trained_model
from fnlm.step import DTYPES, Judge, Metrics, Plan, init_state, make_step
from fnlm.trainable import subset_of
from fnlm.types import Params, TrainState

Step = Callable[[TrainState, Any], tuple[TrainState, Metrics]]


class Alone:
    """One process; also the interface of `fnlm.loop.rank.Together`."""

    lead, world = True, 1
    crew: Crew | None = None  # for what memory is asked for

    def __init__(self, job: Job) -> None:
        self.job, self.plan, self.optimizer = job, Plan(job.train.precision), optimizer_of(job.train, job.cfg)
        self.subset, self.resting = subset_of(job.cfg, job.train), Params()

    def begin(self) -> Begin:
        """A fresh state, or that of the checkpoint: every bit of it. Raises CheckpointError where it does not fit."""
        job, key = self.job, keys_of(self.job.train)[2]
        if job.resume is None:
            own, self.resting = self.subset.parted(self._fresh())
            return Begin(init_state(own, self.optimizer, self.plan, key), {})
        if job.partial:
            like = self.described(self._fresh(anew=True), key)
            return self._parted(Begin(*checkpoint.restore(job.resume, like, partial=True)))
        outline = {k: torch.empty(shape, device="meta") for k, shape in self.subset.sizes.items()}
        like = self.described(outline, key)
        return self._parted(self._placed(checkpoint.restore(job.resume, like), like))

    def described(self, params: Params, key: Tensor) -> TrainState:
        """The state as a checkpoint holds it: with what rests."""
        state = init_state(self.subset.parted(params)[0], self.optimizer, self.plan, key)
        return state._replace(params=params)

    def _parted(self, begin: Begin) -> Begin:
        own, self.resting = self.subset.parted(begin.state.params)
        return begin._replace(state=begin.state._replace(params=own))

    def _fresh(self, anew: bool = False) -> Params:
        job, key = self.job, keys_of(self.job.train)[0]
        params = init_params(job.cfg, key) if anew or job.params is None else job.params
        return self.subset.begun({k: p.to(job.device) for k, p in params.items()}, key)

    def _placed(self, restored: tuple[TrainState, dict[str, Any]], like: TrainState) -> Begin:
        state, notes = restored
        # what the optimizer keeps on the CPU (counts) stays there
        placed: TrainState = tree.map(
            lambda saved, wanted: saved.to(self.job.device) if wanted.is_meta else saved, state, like
        )
        return Begin(placed, notes)

    def saver(self) -> Saver | PartSaver:
        """What writes the checkpoints of the run."""
        return Saver(self.job.folder / CHECKPOINTS, self.job.run.keep, self.job.run.keep_every)

    def saved_by(self, saver: Saver | PartSaver) -> Saver | PartSaver | SubsetSaver:
        """The saver as the session uses it."""
        return saver if self.subset.is_all else SubsetSaver(self, saver)

    def share(self, file: Path) -> None:
        """Raises ValueError where not all see a file that the lead has written."""

    def step(self, judge: Judge) -> Step:
        """The training step."""
        loss = make_lm_loss(trained_model(self.job.cfg, self.job.train), self.job.compute)
        dtype = None if self.plan.precision == "fp32" else DTYPES[self.plan.precision]
        return make_step(self.subset.loss(loss, self.resting, dtype), self.optimizer, self.plan, judge)

    def restore(self, path: Path, state: TrainState) -> tuple[TrainState, dict[str, Any]]:
        """A checkpoint of this run, as `state` lies."""
        found, notes = checkpoint.restore(path, self.with_resting(state))
        return found._replace(params=self.subset.parted(found.params)[0]), notes

    def with_resting(self, state: TrainState) -> TrainState:
        """The state as a checkpoint holds it."""
        return state._replace(params=self.subset.joined(state.params, self.resting))

    def evaluate(self, params: Params, stop: Callable[[], bool]) -> Evaluation:
        """The validation loss."""
        return self._evaluated(self.subset.model(params, self.resting), stop)

    def _evaluated(self, params: Params, stop: Callable[[], bool], **how: Any) -> Evaluation:
        job = self.job
        fast: Literal["bf16", "fp32"] = "bf16" if job.train.precision == "bf16" else "fp32"
        return evaluate(
            params, job.cfg, job.dataset.val, precision=fast, limit=job.run.eval_windows, stop=stop,
            compute=job.compute, **how,
        )  # fmt: skip

    def whole(self, params: Params) -> Params | None:
        """The model's whole parameters on the lead, None on others."""
        return self.subset.model(params, self.resting)

    def norms(self, tensors: Params) -> dict[str, Tensor]:
        """The norm of each layer; see `fnlm.loop.health`."""
        return health.norms(tensors)

    def agreed(self, value: Tensor, norm: Tensor) -> tuple[float, float]:
        """A loss and a norm that all ranks judge by."""
        return float(value), float(norm)

    def most(self, x: float) -> float:
        """The largest of what the ranks have."""
        return x

    def said(self, x: float | None) -> float | None:
        """What the lead says; None is a word as any."""
        return x

    def stopping(self, stop: Stop) -> Stop:
        """Whether a signal came, to anyone."""
        return stop


class SubsetSaver:
    """A saver of a run that trains part of a model: what rests is written with it, by one in a file of its own."""

    def __init__(self, team: Alone, saver: Saver | PartSaver) -> None:
        self.folder, self._saver, self._team = saver.folder, saver, team
        self.mark_best, self.wait = saver.mark_best, saver.wait

    def save(self, state: TrainState, **more: Any) -> Path:
        """As `Saver.save`."""
        whole = self._team.with_resting(state)
        if isinstance(self._saver, Saver):
            return self._saver.save(whole, frozen=self._team.subset.rests, **more)
        return self._saver.save(whole, **more)
