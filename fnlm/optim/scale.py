"""Links that scale the updates: by a number, by name, by a schedule, by a value kept in the state."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from fnlm.optim.base import Needs, check, transform, zero_count
from fnlm.optim.schedules import Schedule
from fnlm.types import Params, Transform, Tree


def _times(grads: Params, params: Params, factor: float | Tensor) -> Params:
    # before: gradients may come in bfloat16, updates are not rounded to it; after: a 0-d parameter times a 0-d float64
    return {k: (g.to(params[k].dtype) * factor).to(params[k].dtype) for k, g in grads.items()}


@dataclass(frozen=True)
class Scale:
    """See `scale`."""

    factor: float
    needs: ClassVar[Needs] = "element"

    def init(self, params: Params) -> Tree:
        return ()

    def update(self, grads: Params, state: Tree, params: Params) -> tuple[Params, Tree]:
        return _times(grads, params, self.factor), state


def scale(factor: float) -> Transform:
    """Multiply the updates by a constant; `scale(-lr)` descends. Raises ValueError unless it is finite."""
    check(math.isfinite(factor), f"factor={factor} is not a finite number; give e.g. -1e-3")
    return transform(Scale(factor))


@dataclass(frozen=True)
class ScaleByName:
    """See `scale_by_name`."""

    factor: Callable[[str], float]
    needs: ClassVar[Needs] = "element"

    def init(self, params: Params) -> Tree:
        return ()

    def update(self, grads: Params, state: Tree, params: Params) -> tuple[Params, Tree]:
        return {name: g.to(params[name].dtype) * self.factor(name) for name, g in grads.items()}, state


def scale_by_name(factor: Callable[[str], float]) -> Transform:
    """Multiply each update by `factor(name)`: learning rates by width (muP; Yang et al. 2022, table 8) or by depth."""
    return transform(ScaleByName(factor))


class ScheduleState(NamedTuple):
    """`count`: the updates made so far."""

    count: Tensor  # type: ignore[assignment]  # the paper's word; hides tuple.count


@dataclass(frozen=True)
class ScaleBySchedule:
    """See `scale_by_schedule`."""

    schedule: Schedule
    needs: ClassVar[Needs] = "element"

    def init(self, params: Params) -> ScheduleState:
        return ScheduleState(zero_count())

    def update(self, grads: Params, state: ScheduleState, params: Params) -> tuple[Params, ScheduleState]:
        return _times(grads, params, -self.schedule(state.count)), ScheduleState(state.count + 1)


def scale_by_schedule(schedule: Schedule) -> Transform:
    """The learning rate: multiply by -schedule(count); the first update has count 0."""
    check(callable(schedule), f"schedule={schedule!r} is not a function of the count; did you mean scale(-lr)?")
    return transform(ScaleBySchedule(schedule))


class ValueState(NamedTuple):
    """`value`: the learning rate."""

    value: Tensor


@dataclass(frozen=True)
class ScaleByValue:
    """See `scale_by_value`."""

    value: float
    needs: ClassVar[Needs] = "element"

    def init(self, params: Params) -> ValueState:
        # float64: 1e-3 in float32 is off by 5e-8 of itself, which float64 runs would see
        return ValueState(torch.tensor(self.value, dtype=torch.float64, device="cpu"))

    def update(self, grads: Params, state: ValueState, params: Params) -> tuple[Params, ValueState]:
        return _times(grads, params, -state.value), state


def scale_by_value(value: float) -> Transform:
    """The learning rate as data: multiply by -state.value (0-d float64), which `with_value` replaces between steps."""
    check(value >= 0, f"value={value} is negative: the updates would ascend; give a learning rate >= 0")
    return transform(ScaleByValue(value))


def with_value(opt_state: Tree, path: str, x: float | Tensor) -> Tree:
    """The state with the tensor at `path` (e.g. "lr/value") replaced by x; the given state is unchanged.

    Raises ValueError for a path that does not exist.
    """
    head, _, rest = path.partition("/")
    if isinstance(opt_state, Tensor) and not path:
        return torch.as_tensor(x, dtype=opt_state.dtype, device=opt_state.device)
    if isinstance(opt_state, dict) and head in opt_state:
        return {**opt_state, head: with_value(opt_state[head], rest, x)}
    fields = getattr(opt_state, "_fields", ())
    if head in fields:
        return opt_state._replace(**{head: with_value(getattr(opt_state, head), rest, x)})
    here = ", ".join(opt_state if isinstance(opt_state, dict) else fields)
    raise ValueError(f"no tensor at {path!r} in this part of the optimizer state, which holds: {here or 'one tensor'}")
