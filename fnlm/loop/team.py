"""Who trains: this process alone, or ranks that share the work. What the session asks of them is the same.

All ranks run the same session and must decide alike: what they decide by is reduced first, or is what rank 0 says.
Only rank 0 (`lead`) writes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from fnlm import checkpoint, tree
from fnlm.checkpoint import CheckpointError, Saver
from fnlm.checkpoint.layout import What, name_of
from fnlm.collectives import Axes
from fnlm.elastic import Elastic
from fnlm.evaluate import BATCH_TOKENS, GPU_BATCH_TOKENS, Evaluation, evaluate
from fnlm.loop import health
from fnlm.loop.job import Begin, Job, keys_of
from fnlm.loop.signals import Stop
from fnlm.losses import make_lm_loss
from fnlm.params import init_params
from fnlm.presets import optimizer_of, trained_model
from fnlm.sharded import layout_of, make_sharded_loss, make_sharded_step, sharded_state
from fnlm.sharding import Abandoned, Mesh, global_norm, largest, total
from fnlm.sharding.strategy import row_axes
from fnlm.step import DTYPES, Judge, Loss, Metrics, Plan, init_state, make_step
from fnlm.trainable import subset_of
from fnlm.types import Batch, Params, TrainState

Step = Callable[[TrainState, Any], tuple[TrainState, Metrics]]


class FailedOnLead(CheckpointError, Abandoned):
    """What rank 0 could not do ends the others too; rank 0 says why."""


class Alone:
    """One process; also the interface of `Together`."""

    lead, world = True, 1

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
            like = self._whole_state(self._fresh(anew=True), key)
            return self._parted(Begin(*checkpoint.restore(job.resume, like, partial=True)))
        outline = {k: torch.empty(shape, device="meta") for k, shape in self.subset.sizes.items()}
        like = self._whole_state(outline, key)
        return self._parted(self._placed(checkpoint.restore(job.resume, like), like))

    def _whole_state(self, params: Params, key: Tensor) -> TrainState:
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


class Together(Alone):
    """One rank of several. ValueError, before anything is allocated, for a mesh that does not fit the run."""

    def __init__(self, job: Job, mesh: Mesh) -> None:
        super().__init__(job)
        self.lead, self.world, self.mesh = mesh.rank == 0, mesh.world, mesh
        self.layout = layout_of(job.cfg, job.run.strategy, mesh)
        self.elastic = Elastic(self.layout, self.optimizer, self.plan, keys_of(job.train)[2])
        self.all = mesh.axis(*mesh.shape)

    def begin(self) -> Begin:
        job, key = self.job, keys_of(self.job.train)[2]
        if job.resume is None:
            return Begin(sharded_state(self._fresh(), self.optimizer, self.layout, self.plan, key), {})
        if job.partial:
            state, notes = super().begin()
            return Begin(self.elastic.cut(state), notes)
        return self._placed(self._read(job.resume), self.elastic.like)

    def _read(self, path: Path) -> tuple[TrainState, dict[str, Any]]:
        """This rank's part of a checkpoint; the lead checks its bytes, for all."""
        self._lead_does(lambda: checkpoint.verify(path), f"{path} cannot be read; rank 0 says why")
        return checkpoint.restore(path, self.elastic.like, part=self.elastic.box)

    def _lead_does(self, job: Callable[[], object], otherwise: str) -> None:
        """Done by the lead alone; what fails there is raised there, and as `otherwise` on the other ranks."""
        wrong: CheckpointError | None = None
        if self.lead:
            try:
                job()
            except CheckpointError as error:
                wrong = error
        if self.most(float(wrong is not None)):
            raise wrong or FailedOnLead(otherwise)

    def step(self, judge: Judge) -> Step:
        model = trained_model(self.job.cfg, self.job.train)

        def build(axes: Axes) -> Loss:
            return make_lm_loss(model, self.job.compute, axes)

        return make_sharded_step(build, self.optimizer, self.layout, self.plan, judge)

    def restore(self, path: Path, state: TrainState) -> tuple[TrainState, dict[str, Any]]:
        return self._placed(self._read(path), self.elastic.like)

    def evaluate(self, params: Params, stop: Callable[[], bool]) -> Evaluation:
        """Each rank computes its part of each batch, under the strategy that it trains with."""
        job, ranks = self.job, self.mesh.size(*row_axes(self.mesh))
        precision: Literal["bf16", "fp32"] = "bf16" if job.train.precision == "bf16" else "fp32"
        mean = make_sharded_loss(
            lambda axes: make_lm_loss(job.cfg, job.compute, axes), self.layout, Plan(precision)
        )  # fmt: skip

        def nats_of(some: Params, batch: Batch) -> Tensor:
            padded = Batch(*(_padded(x, ranks) for x in batch))
            return mean(some, padded) * padded.weights.sum(dtype=torch.float64)

        tokens = BATCH_TOKENS if job.device.type == "cpu" else GPU_BATCH_TOKENS
        rows = ranks * max(1, tokens // job.cfg.seq_len)
        val = self._evaluated(params, stop, batch_size=rows, nats_of=nats_of)
        loss = self.said(val.loss)  # all ranks have it but for the last bits, which may decide what is best
        assert loss is not None
        return val._replace(loss=loss)

    def whole(self, params: Params) -> Params | None:
        made = self.elastic.whole_params(params, self.lead)
        return made and {k: p.to(self.job.device) for k, p in made.items()}

    def norms(self, tensors: Params) -> dict[str, Tensor]:
        groups: dict[str, Params] = {}
        for name, x in tensors.items():
            groups.setdefault(health.group_of(name), {})[name] = x
        return {group: global_norm(some, self.layout) for group, some in groups.items()}

    def agreed(self, value: Tensor, norm: Tensor) -> tuple[float, float]:
        both = torch.stack([value.detach().double(), norm.detach().double().to(value.device)])
        odd, finite = (~both.isfinite()).double(), both.nan_to_num(0.0, 0.0, 0.0)  # not all wires carry a nan
        most = largest(torch.cat([odd, finite]), self.all).tolist()
        return most[2] if not most[0] else math.nan, most[3] if not most[1] else math.nan

    def most(self, x: float) -> float:
        return float(largest(self._number([x]), self.all)[0])

    def said(self, x: float | None) -> float | None:
        known, odd = x is not None, x is not None and not math.isfinite(x)
        words = [float(known), float(odd), x if x is not None and not odd else 0.0]
        found = total(self._number(words if self.lead else [0.0] * 3), self.all).tolist()
        return None if not found[0] else math.nan if found[1] else found[2]

    def _number(self, values: list[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float64, device=self.job.device)

    def stopping(self, stop: Stop) -> Stop:
        return CommonStop(stop, self)


def _padded(x: Tensor, ranks: int) -> Tensor:
    """Rows of zeros, so that every rank has as many; with a weight of zero they count nothing."""
    missing = -len(x) % ranks
    return torch.cat([x, x.new_zeros(missing, *x.shape[1:])]) if missing else x


class CommonStop(Stop):
    """A signal to one rank is one to all; asked by all of them at the same places."""

    def __init__(self, own: Stop, team: Together) -> None:
        super().__init__()
        self._own, self._team = own, team

    def __call__(self) -> bool:
        if self.signal is None:
            self.signal = int(self._team.most(self._own.signal or 0)) or None
        return self.signal is not None


class SubsetSaver:
    """A `Saver` of a run that trains part of a model: what rests is written with it, in a file of its own."""

    def __init__(self, team: Alone, saver: Saver) -> None:
        self.folder, self._saver, self._team = saver.folder, saver, team
        self.mark_best, self.wait = saver.mark_best, saver.wait

    def save(self, state: TrainState, **more: Any) -> Path:
        """As `Saver.save`."""
        return self._saver.save(self._team.with_resting(state), frozen=self._team.subset.rests, **more)


class CommonSaver:
    """A `Saver` to all ranks: tensors are made whole, and the lead writes them; what fails there fails everywhere."""

    def __init__(self, team: Together, saver: Saver) -> None:
        self.folder, self._saver, self._team = saver.folder, saver, team

    def save(self, state: TrainState, *, what: What = "all", **more: Any) -> Path:
        """As `Saver.save`."""
        whole = self._team.elastic.whole(state if what == "all" else state._replace(opt_state=None), self._team.lead)

        def write() -> None:
            assert whole is not None
            self._saver.save(whole, what=what, **more)

        self._does(write)
        return self.folder / name_of(int(state.step), what)

    def mark_best(self, path: str | Path) -> None:
        """As `Saver.mark_best`."""
        if self._team.lead:
            self._saver.mark_best(path)

    def wait(self) -> None:
        """As `Saver.wait`, on all ranks."""
        self._does(self._saver.wait)

    def _does(self, job: Callable[[], object]) -> None:
        self._team._lead_does(job, "rank 0 could not save")
