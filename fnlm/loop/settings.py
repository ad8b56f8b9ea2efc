"""What a run does beside its training steps, as a frozen, validated record."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

from fnlm.config import Compute, ModelConfig, TrainConfig, did_you_mean
from fnlm.sharding import parse_mesh, strategy

Guard = Literal["skip", "stop", "rollback", "off"]


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Evaluation, checkpoints, samples, the guard and the log; counts are in steps, and 0 means only at the end.

    Raises ValueError with the offending numbers and the remedy.
    """

    eval_every: int = 250
    eval_windows: int | None = 512  # of the validation split, spread over it; None: all of it
    save_every: int = 250  # besides, every evaluation saves first
    keep: int = 3
    keep_every: int | None = None
    snapshot_every: int | None = None  # parameters alone, never removed
    log_every: int = 10
    health_every: int = 100  # norms of gradients, parameters and updates by layer; 0: never
    sample_every: int = 500
    sample_prompts: tuple[str, ...] = ()  # none: beginnings of validation documents
    sample_tokens: int = 64
    guard: Guard = "skip"  # what follows a loss or gradient that is not finite, or a spike
    guard_z: float = 10.0  # a spike is so many standard deviations above the mean of the last steps; 0: none is
    guard_limit: int = 20  # refused updates in a row, or rollbacks in all, that end the run
    patience: int | None = None  # evaluations without a better one that end the run
    trackers: tuple[str, ...] = ()
    device: str = "auto"
    strategy: str = "single"  # how the ranks share the work: a row of `fnlm.sharding.STRATEGIES`
    mesh: str | None = None  # such as data=2,tensor=2; None: all ranks along the strategy's own axis
    timeout: float = 600.0  # seconds after which a rank that others wait for counts as lost

    def __post_init__(self) -> None:
        for name in ("eval_every", "save_every", "health_every", "sample_every"):
            _whole(self, name, 0)
        for name in ("keep", "log_every", "sample_tokens", "guard_limit"):
            _whole(self, name, 1)
        for name in ("eval_windows", "keep_every", "snapshot_every", "patience"):
            if getattr(self, name) is not None:
                _whole(self, name, 1)
        if self.guard not in get_args(Guard):
            raise ValueError(f"guard={self.guard!r} is unknown{did_you_mean(self.guard, get_args(Guard))}")
        strategy(self.strategy)
        parse_mesh(self.mesh or "")
        if not self.timeout > 0:
            raise ValueError(f"timeout={self.timeout} seconds must be more than 0")
        if self.guard_z < 0:
            raise ValueError(f"guard_z={self.guard_z} must not be negative; 0 lets every finite loss pass")


def _whole(config: RunConfig, name: str, least: int) -> None:
    value = getattr(config, name)
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name}={value!r} must be a whole number of at least {least}")


Settings = tuple[ModelConfig, TrainConfig, RunConfig, Compute]
KINDS: dict[str, Any] = {"model": ModelConfig, "train": TrainConfig, "run": RunConfig, "compute": Compute}
"""The records that a run's config.json holds, by their key there."""


def field_names() -> dict[str, list[str]]:
    """The fields of each record."""
    return {kind: [f.name for f in fields(record)] for kind, record in KINDS.items()}
