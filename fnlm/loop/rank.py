"""One rank of a run that several train.

All ranks run the same session and must decide alike: what they decide by is reduced first, or is what rank 0 says.
Each writes its part of a checkpoint; the rest only rank 0 (`lead`) writes.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from fnlm import checkpoint
from fnlm.checkpoint import CheckpointError, PartSaver
from fnlm.collectives import Axes
from fnlm.config import override
from fnlm.elastic import Elastic
from fnlm.evaluate import BATCH_TOKENS, GPU_BATCH_TOKENS, Evaluation
from fnlm.loop import health
from fnlm.loop.folder import CHECKPOINTS
from fnlm.loop.job import Begin, Job, keys_of
from fnlm.loop.memory import Crew
from fnlm.loop.signals import Stop
from fnlm.loop.team import Alone, Step
from fnlm.losses import make_lm_loss
from fnlm.presets import trained_model
from fnlm.sharded import layout_of, make_sharded_loss, make_sharded_step, sharded_state
from fnlm.sharding import Abandoned, Mesh, global_norm, largest, shard, total
from fnlm.sharding.processes import place
from fnlm.sharding.strategy import row_axes
from fnlm.step import Judge, Loss, Plan
from fnlm.types import Batch, Params, TrainState

_log = logging.getLogger(__name__)
SAID = 240  # bytes of what one rank tells the others


class Elsewhere(CheckpointError, Abandoned):
    """What another rank could not do ends this one too."""

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.exit_code = code


class NotShared(ValueError):
    """Ranks do not see the same files."""


class Together(Alone):
    """One rank of several. ValueError, before anything is allocated, for a mesh that does not fit the run."""

    def __init__(self, job: Job, mesh: Mesh) -> None:
        super().__init__(agreed(job, mesh))
        job = self.job
        self.lead, self.world, self.mesh, self.rank = mesh.rank == 0, mesh.world, mesh, mesh.rank
        here = place()
        self.crew = Crew(job.run.strategy, mesh.shape, here.local_world if here else mesh.world, here is not None)
        self.layout = layout_of(job.cfg, job.run.strategy, mesh, self.subset)
        self.elastic = Elastic(self.layout, self.optimizer, self.plan, keys_of(job.train)[2])
        self.all = mesh.axis(*mesh.shape)

    def begin(self) -> Begin:
        job, key = self.job, keys_of(self.job.train)[2]
        if job.resume is None:
            own, resting = self.subset.parted(self._fresh())
            self.resting = shard(resting, self.layout)
            return Begin(sharded_state(own, self.optimizer, self.layout, self.plan, key), {})
        if job.partial:
            state, notes = super().begin()
            return self._parted(Begin(self.elastic.cut(self.with_resting(state)), notes))
        path = self._checked(job.resume, job.or_older)
        self.job = replace(job, resume=path)
        return self._parted(self._placed(self._read(path), self.elastic.like))

    def _read(self, path: Path) -> tuple[TrainState, dict[str, Any]]:
        """This rank's part of a checkpoint."""
        return checkpoint.restore(path, self.elastic.like, part=self.elastic.box)

    def _checked(self, path: Path, or_older: bool = False) -> Path:
        """The checkpoint, or where it is damaged and `or_older` the one before it; together all read each byte once."""
        wrong = None
        try:
            checkpoint.verify(path, (self.rank, self.world))
        except (CheckpointError, OSError) as error:
            wrong = error if isinstance(error, CheckpointError) else CheckpointError(f"{path}: {error}")
        try:
            self.agree(wrong)
        except CheckpointError as error:
            if not (or_older and (older := checkpoint.older(path))):
                raise
            _log.warning("skipped: %s", error)
            return self._checked(older, or_older)
        return path

    def agree(self, error: CheckpointError | None) -> None:
        """Every rank calls it. Raises on all where one has an error: its own, and on the others what it says."""
        first = self.world - int(self.most(0.0 if error is None else self.world - self.rank))
        if first == self.world:
            return
        code, said = self._word(error if first == self.rank else None)
        raise error or Elsewhere(f"rank {first}: {said}", code)

    def _word(self, error: CheckpointError | None) -> tuple[int, str]:
        """The exit code and the message of an error, from the one rank that has it to all."""
        text = b"" if error is None else str(error).splitlines()[0].encode()[:SAID]
        numbers = [float(error.exit_code if error else 0), *map(float, text), *[0.0] * (SAID - len(text))]
        code, *letters = total(self._number(numbers), self.all).tolist()
        return int(code), bytes(int(x) for x in letters if x).decode(errors="replace")

    def saver(self) -> PartSaver:
        run = self.job.run
        folder = self.job.folder / CHECKPOINTS
        return PartSaver(folder, self, self.elastic.owned(), run.keep, run.keep_every, run.timeout)

    def share(self, file: Path) -> None:
        self.most(0.0)  # until the lead has written it
        blind = int(self.most(0.0 if file.is_file() else self.rank))
        if blind:
            raise NotShared(
                f"rank {blind} does not see {file}, which rank 0 has written; put the run's folder (--out) on a file "
                "system that all ranks share"
            )

    def step(self, judge: Judge) -> Step:
        model = trained_model(self.job.cfg, self.job.train)

        def build(axes: Axes) -> Loss:
            return make_lm_loss(model, self.job.compute, axes)

        return make_sharded_step(build, self.optimizer, self.layout, self.plan, judge, resting=self.resting)

    def restore(self, path: Path, state: TrainState) -> tuple[TrainState, dict[str, Any]]:
        found, notes = self._placed(self._read(self._checked(path, or_older=True)), self.elastic.like)
        return found._replace(params=self.subset.parted(found.params)[0]), notes

    def evaluate(self, params: Params, stop: Callable[[], bool]) -> Evaluation:
        """Each rank computes its part of each batch, under the strategy that it trains with."""
        job, ranks = self.job, self.mesh.size(*row_axes(self.mesh))
        precision: Literal["bf16", "fp32"] = "bf16" if job.train.precision == "bf16" else "fp32"
        mean = make_sharded_loss(
            lambda axes: make_lm_loss(job.cfg, job.compute, axes), self.layout, Plan(precision), self.resting
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
        made = self.elastic.whole_params(self.subset.joined(params, self.resting), self.lead)
        if made is None:
            return None
        return self.subset.model(*self.subset.parted({k: p.to(self.job.device) for k, p in made.items()}))

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


def agreed(job: Job, mesh: Mesh) -> Job:
    """The job with the smallest micro-batch that a rank has: batch=auto may differ from machine to machine.

    ValueError on all where ranks want different global batches.
    """
    own = job.train.batch_size, job.train.batch_size * job.train.micro_batches
    numbers = torch.tensor([-own[0], own[1], -own[1]], dtype=torch.float64, device=job.device)
    size, most, least = (int(x) for x in largest(numbers, mesh.axis(*mesh.shape)).tolist())
    if most != -least:
        raise ValueError(f"ranks were given batches of {-least} to {most} rows; give all the same settings")
    if own[0] == -size:
        return job
    train = override(job.train, batch_size=-size, micro_batches=own[1] // -size)
    return replace(job, train=train, config=job.config | {"train": asdict(train)})


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
