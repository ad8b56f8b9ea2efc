"""What an optimizer is made of: rules, and the ways to combine them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Literal, Protocol, TypeAlias

import torch

from fnlm.types import NameMask, Params, Transform, Tree

Needs: TypeAlias = Literal["element", "matrix", "tree"]
"""What a rule must see at once to be right.

`element`: an element of the update depends on the same element of its inputs, so any shard will do;
`matrix`: whole parameters; `tree`: all parameters together.
"""

_ORDER: tuple[Needs, ...] = ("element", "matrix", "tree")


class Rule(Protocol):
    """A transform as data: a small frozen dataclass whose fields are the hyperparameters.

    A rule may also have `update_(names, grads, state) -> updates`, the donated form on lists: it overwrites the
    gradients and the moments of `names`, reads `state.count` and leaves it to the caller; see `fnlm.optim.fused`.
    """

    @property
    def needs(self) -> Needs: ...
    def init(self, params: Params) -> Tree: ...
    def update(self, grads: Params, state: Tree, params: Params) -> tuple[Params, Tree]: ...


def transform(rule: Rule) -> Transform:
    """The transform that a rule describes."""
    return Transform(rule.init, rule.update, rule)


def check(ok: bool, message: str) -> None:
    """Raise ValueError(message) unless ok."""
    if not ok:
        raise ValueError(message)


def check_decays(name: str, b: float, dtype: torch.dtype | None) -> None:
    """Raise ValueError where b m is rounded back to m in `dtype`: 1 - b is below half a unit in the last place."""
    step = torch.finfo(dtype).eps / 2 if dtype else 0.0
    remedy = f"choose {name} < {1 - step:.4g} or a wider moments_dtype"
    check(1 - b > step, f"{name}={b} never decays in {dtype}, which rounds by {step:.2g}; {remedy}")


def needs(optimizer: Transform) -> Needs:
    """The most that any rule inside needs; a transform without a rule is taken to need the whole tree."""
    return "tree" if optimizer.rule is None else optimizer.rule.needs  # type: ignore[attr-defined]


def _most(transforms: Iterable[Transform]) -> Needs:
    return max((needs(t) for t in transforms), key=_ORDER.index, default="element")


@dataclass(frozen=True)
class Chain:
    """See `chain`."""

    links: tuple[tuple[str, Transform], ...]

    @property
    def needs(self) -> Needs:
        return _most(link for _, link in self.links)

    def init(self, params: Params) -> Tree:
        return {name: link.init(params) for name, link in self.links}

    def update(self, grads: Params, state: Tree, params: Params) -> tuple[Params, Tree]:
        after = {}
        for name, link in self.links:
            grads, after[name] = link.update(grads, state[name], params)
        return grads, after


def chain(**links: Transform) -> Transform:
    """Apply the links from left to right; the keywords are the keys of the state: `adam/mu/embed.weight`."""
    return transform(Chain(tuple(links.items())))


def _within(tree: Params, names: Iterable[str]) -> Params:
    return {name: tree[name] for name in names}


@dataclass(frozen=True)
class Masked:
    """See `masked`."""

    inner: Transform
    mask: NameMask

    @property
    def needs(self) -> Needs:
        return needs(self.inner)

    def init(self, params: Params) -> Tree:
        return self.inner.init(_within(params, filter(self.mask, params)))

    def update(self, grads: Params, state: Tree, params: Params) -> tuple[Params, Tree]:
        names = list(filter(self.mask, grads))
        updates, state = self.inner.update(_within(grads, names), state, _within(params, names))
        return {**grads, **updates}, state


def masked(inner: Transform, mask: NameMask) -> Transform:
    """Apply `inner` to the parameters whose name the mask accepts; the other updates pass unchanged."""
    return transform(Masked(inner, mask))


@dataclass(frozen=True)
class Partition:
    """See `partition`."""

    assign: Callable[[str], str]
    parts: tuple[tuple[str, Transform], ...]

    @property
    def needs(self) -> Needs:
        return _most(part for _, part in self.parts)

    def split(self, names: Iterable[str]) -> dict[str, list[str]]:
        """The names of each part. Raises ValueError for a label that is not a part."""
        groups: dict[str, list[str]] = {label: [] for label, _ in self.parts}
        for name in names:
            label = self.assign(name)
            check(label in groups, f"parameter {name!r} is assigned to {label!r}; the parts are {', '.join(groups)}")
            groups[label].append(name)
        return groups

    def init(self, params: Params) -> Tree:
        groups = self.split(params)
        return {label: part.init(_within(params, groups[label])) for label, part in self.parts}

    def update(self, grads: Params, state: Tree, params: Params) -> tuple[Params, Tree]:
        groups, updates, after = self.split(grads), dict(grads), {}
        for label, part in self.parts:
            names = groups[label]
            inside, after[label] = part.update(_within(grads, names), state[label], _within(params, names))
            updates.update(inside)
        return updates, after


def partition(assign: Callable[[str], str], **parts: Transform) -> Transform:
    """Give each parameter to the one part that `assign(name)` names; the state is nested by label.

    Raises ValueError (in init and update) for a label that is not a part.
    """
    check(bool(parts), "a partition without parts; give at least one, as in rest=adamw(...)")
    return transform(Partition(assign, tuple(parts.items())))


def rewrite(fn: Callable[[Transform], Transform], optimizer: Transform) -> Transform:
    """The same optimizer with `fn` applied to every innermost transform, e.g. to clip by a norm over a mesh."""
    rule = optimizer.rule
    if isinstance(rule, Chain):
        return transform(Chain(tuple((name, rewrite(fn, link)) for name, link in rule.links)))
    if isinstance(rule, Partition):
        return transform(replace(rule, parts=tuple((label, rewrite(fn, part)) for label, part in rule.parts)))
    if isinstance(rule, Masked):
        return transform(replace(rule, inner=rewrite(fn, rule.inner)))
    return fn(optimizer)


def zero_count() -> torch.Tensor:
    """The number of updates made so far: 0-d int64 on the CPU, so that reading it never waits for a device."""
    return torch.zeros((), dtype=torch.int64, device="cpu")


def apply_updates(params: Params, updates: Params) -> Params:
    """params + updates, in the dtype of the parameters."""
    return {name: p + updates[name].to(p.dtype) for name, p in params.items()}
