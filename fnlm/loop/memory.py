"""What fits: a micro-batch for the memory there is, and advice where it was too much."""

from __future__ import annotations

from bisect import bisect
from collections.abc import Callable
from typing import NamedTuple

import torch

from fnlm import random
from fnlm.budget import training_memory
from fnlm.config import Compute, ModelConfig, TrainConfig, override
from fnlm.forecast import forecast
from fnlm.losses import make_lm_loss
from fnlm.params import shapes
from fnlm.presets import optimizer_of, trained_model
from fnlm.sharding import planned, rows_of
from fnlm.sharding.mesh import Shape, describe
from fnlm.sharding.specs import span
from fnlm.sharding.strategy import row_axes
from fnlm.step import DTYPES, Plan, init_state, make_step
from fnlm.trainable import subset_of
from fnlm.types import Batch

BESIDE = 400 << 20  # torch itself, temporaries, the caller's batch: see `training_memory`
SHARE = 0.9  # of what is available; the rest is the allocator's


class DoesNotFit(ValueError):
    """A run needs more memory than there is; the message is one line and says what would fit."""

    exit_code = 3


class Crew(NamedTuple):
    """Ranks that share the work: how, how many of them share the memory in question, and whether as processes."""

    strategy: str
    shape: Shape
    here: int
    processes: bool = True

    def rows(self, batch_size: int) -> int:
        """The most rows of a micro-batch that a rank has. ValueError where one would have none."""
        mesh = planned(self.shape)
        rows_of(batch_size, mesh)
        return span(batch_size, mesh.size(*row_axes(mesh)), 0)[1]


def needed(cfg: ModelConfig, train: TrainConfig, crew: Crew | None = None) -> int:
    """The bytes that a training step takes at its peak, estimated, by all ranks that share the memory.

    Of one process `fnlm.budget.training_memory`, of a crew `fnlm.forecast`: what rank 0 has, who has the most.
    """
    if crew is None:
        return training_memory(cfg, train).total + BESIDE
    own = override(train, batch_size=crew.rows(train.batch_size))
    return crew.here * forecast(cfg, own, crew.strategy, crew.shape).peak + BESIDE * (
        crew.here if crew.processes else 1
    )


def alternatives(train: TrainConfig, crew: Crew | None = None) -> list[TrainConfig]:
    """The same global batch in larger or smaller pieces, each with rows for all, the largest pieces first."""
    rows = train.batch_size * train.micro_batches
    sizes = [n for n in range(rows, 0, -1) if rows % n == 0 and (crew is None or has_rows(n, crew))]
    return [override(train, batch_size=n, micro_batches=rows // n) for n in sizes]


def has_rows(n: int, crew: Crew) -> bool:
    """Whether n rows are enough for every rank."""
    try:
        crew.rows(n)
    except ValueError:
        return False
    return True


def largest(cfg: ModelConfig, train: TrainConfig, available: int, crew: Crew | None = None) -> TrainConfig:
    """The largest micro-batch whose estimate fits, the global batch kept. Raises DoesNotFit where not even 1 does."""
    found = _largest(cfg, alternatives(train, crew), available, crew)
    if found is None:
        raise DoesNotFit(advice(cfg, train, available, crew))
    return found


def _largest(cfg: ModelConfig, choices: list[TrainConfig], available: int, crew: Crew | None) -> TrainConfig | None:
    """The first of ever smaller choices that fits; few are looked at, as less never needs more."""
    at = bisect(choices, False, key=lambda choice: needed(cfg, choice, crew) <= SHARE * available)
    return choices[at] if at < len(choices) else None


def tried(train: TrainConfig, attempt: Callable[[TrainConfig], object]) -> TrainConfig:
    """The largest micro-batch with which `attempt` does not run out of memory, the global batch kept."""
    choices = alternatives(train)
    for choice in choices:
        try:
            attempt(choice)
            return choice
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
        # here, so that what the attempt held is gone with its exception
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    raise DoesNotFit("not even one sequence at a time fits into memory; choose a smaller model or seq_len")


def one_step(cfg: ModelConfig, train: TrainConfig, compute: Compute, device: torch.device) -> None:
    """A training step on tokens that mean nothing, to see whether memory is enough; all of it is freed again."""
    params = {name: torch.zeros(shape, device=device) for name, shape in shapes(cfg).items()}
    optimizer, plan = optimizer_of(train, cfg), Plan(train.precision)
    tokens = torch.zeros(train.batch_size, cfg.seq_len, dtype=torch.int64, device=device)
    batch = Batch(tokens, tokens, torch.ones(tokens.shape, device=device))
    subset, dtype = subset_of(cfg, train), None if train.precision == "fp32" else DTYPES[train.precision]
    own, resting = subset.parted(subset.begun(params, random.key(0)))
    loss = subset.loss(make_lm_loss(trained_model(cfg, train), compute), resting, dtype)
    step = make_step(loss, optimizer, plan)
    step(init_state(own, optimizer, plan), [batch] * min(2, train.micro_batches))


def check(cfg: ModelConfig, train: TrainConfig, available: int, crew: Crew | None = None) -> None:
    """Raises DoesNotFit, before anything is allocated, where the estimate is more than all that is available."""
    if needed(cfg, train, crew) > available:
        raise DoesNotFit(advice(cfg, train, available, crew))


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory is what was missing, on a GPU or a CPU."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)


def advice(cfg: ModelConfig, train: TrainConfig, available: int, crew: Crew | None = None) -> str:
    """One line: what is needed, what there is, and the nearest that would fit."""
    who = "" if crew is None else f" for {crew.here} ranks of {crew.strategy} on {describe(crew.shape)}"
    said = f"this needs about {_gb(needed(cfg, train, crew))} of memory{who}, {_gb(available)} are available; "
    smaller = [choice for choice in alternatives(train, crew) if choice.batch_size < train.batch_size]
    if found := _largest(cfg, smaller, available, crew):
        pieces = f"batch_size={found.batch_size} micro_batches={found.micro_batches}"
        return said + f"{pieces} would take {_gb(needed(cfg, found, crew))} and learn the same (or batch=auto)"
    if needed(cfg, train, crew) <= SHARE * available:
        return said + "a limit of the process (ulimit -v) or another program takes the rest: raise or end it"
    least = 1 if crew is None else alternatives(train, crew)[-1].batch_size
    small = override(train, batch_size=least, micro_batches=1)
    if crew is not None and crew.strategy != "zero3" and "data" in crew.shape:
        split = crew._replace(strategy="zero3")
        if needed(cfg, small, split) <= SHARE * available:
            return said + f"batch_size={least} with --strategy zero3 would take {_gb(needed(cfg, small, split))}"
    lighter = override(small, optimizer="sgd" if train.optimizer == "adafactor" else "adafactor")
    if needed(cfg, lighter, crew) <= SHARE * available:
        take = _gb(needed(cfg, lighter, crew))
        return said + f"batch_size={least} with optimizer={lighter.optimizer} would take {take}"
    most = _gb(needed(cfg, small, crew))
    return said + f"even batch_size={least} takes {most}: choose a smaller model, or a shorter seq_len"


def _gb(count: float) -> str:
    return f"{count / 1e9:.1f} GB"
