"""What fits: a micro-batch for the memory there is, and advice where it was too much."""

from __future__ import annotations

from collections.abc import Callable

import torch

from fnlm.budget import training_memory
from fnlm.config import Compute, ModelConfig, TrainConfig, override
from fnlm.losses import make_lm_loss
from fnlm.params import shapes
from fnlm.presets import optimizer_of, trained_model
from fnlm.step import Plan, init_state, make_step
from fnlm.types import Batch

BESIDE = 400 << 20  # torch itself, temporaries, the caller's batch: see `training_memory`
SHARE = 0.9  # of what is available; the rest is the allocator's


class DoesNotFit(ValueError):
    """A run needs more memory than there is; the message is one line and says what would fit."""

    exit_code = 3


def needed(cfg: ModelConfig, train: TrainConfig) -> int:
    """The bytes that a training step takes at its peak, estimated; see `fnlm.budget.training_memory`."""
    return training_memory(cfg, train).total + BESIDE


def alternatives(train: TrainConfig) -> list[TrainConfig]:
    """The same global batch in larger or smaller pieces, the largest pieces first."""
    rows = train.batch_size * train.micro_batches
    sizes = [n for n in range(rows, 0, -1) if rows % n == 0]
    return [override(train, batch_size=n, micro_batches=rows // n) for n in sizes]


def largest(cfg: ModelConfig, train: TrainConfig, available: int) -> TrainConfig:
    """The largest micro-batch whose estimate fits, the global batch kept. Raises DoesNotFit where not even 1 does."""
    for choice in alternatives(train):
        if needed(cfg, choice) <= SHARE * available:
            return choice
    raise DoesNotFit(advice(cfg, train, available))


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
    step = make_step(make_lm_loss(trained_model(cfg, train), compute), optimizer, plan)
    step(init_state(params, optimizer, plan), [batch] * min(2, train.micro_batches))


def check(cfg: ModelConfig, train: TrainConfig, available: int) -> None:
    """Raises DoesNotFit, before anything is allocated, where the estimate is more than all that is available."""
    if needed(cfg, train) > available:
        raise DoesNotFit(advice(cfg, train, available))


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory is what was missing, on a GPU or a CPU."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)


def advice(cfg: ModelConfig, train: TrainConfig, available: int) -> str:
    """One line: what is needed, what there is, and the nearest that would fit."""
    said = f"this needs about {_gb(needed(cfg, train))} of memory, {_gb(available)} are available; "
    for choice in alternatives(train):
        if choice.batch_size < train.batch_size and needed(cfg, choice) <= SHARE * available:
            pieces = f"batch_size={choice.batch_size} micro_batches={choice.micro_batches}"
            return said + f"{pieces} would take {_gb(needed(cfg, choice))} and learn the same (or batch=auto)"
    small = override(train, batch_size=1, micro_batches=1)
    lighter = override(small, optimizer="sgd" if train.optimizer == "adafactor" else "adafactor")
    if needed(cfg, lighter) <= SHARE * available:
        return said + f"batch_size=1 with optimizer={lighter.optimizer} would take {_gb(needed(cfg, lighter))}"
    return said + f"even batch_size=1 takes {_gb(needed(cfg, small))}: choose a smaller model, or a shorter seq_len"


def _gb(count: float) -> str:
    return f"{count / 1e9:.1f} GB"
