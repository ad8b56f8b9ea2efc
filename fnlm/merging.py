"""Arithmetic of trees of one shape: averages, differences added to a base, and how far models lie apart."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fnlm.config import ModelConfig
from fnlm.types import Params

# What a model's values do not depend on once they are there.
BEGINNING = ("init_std", "zero_init_out", "zero_init_head")


class Distance(NamedTuple):
    """From one tensor to another: |b - a| / |a| (L2; inf where a is 0 and b is not), the largest |b - a| of a number,
    and the cosine of the angle between them (NaN where either is 0)."""

    relative: float
    max_abs: float
    cosine: float


@torch.no_grad()
def average(trees: Sequence[Params], weights: Sequence[float] | None = None) -> Params:
    """The mean of several models' parameters (Wortsman et al. 2022, "Model soups"), weighted where weights are given.

    The weights are divided by their sum; sums are in float64, tensors of the first tree's dtype. ValueError where trees
    differ in names or shapes, the weights do not fit, or a number comes out that is not finite.
    """
    shares = _weights(trees, weights)
    total = sum(shares)
    if not 0 < total < math.inf:
        raise ValueError(f"the weights add up to {total:g}; their sum must be above 0, and finite")
    _check(trees)
    return {name: _sum(name, None, [t[name] for t in trees], [w / total for w in shares]) for name in trees[0]}


@torch.no_grad()
def add_differences(base: Params, trees: Sequence[Params], weights: Sequence[float] | None = None) -> Params:
    """base + sum of w_i (tree_i - base), each weight 1 by default (Ilharco et al. 2023, "Task arithmetic").

    Below 0 a weight takes what was learnt away. Sums and errors as of `average`.
    """
    shares = _weights(trees, weights)
    _check([base, *trees])
    return {name: _sum(name, base[name], [t[name] for t in trees], shares) for name in base}


def _weights(trees: Sequence[Params], weights: Sequence[float] | None) -> list[float]:
    if not trees:
        raise ValueError("there is nothing to merge; give at least one model")
    found = [1.0] * len(trees) if weights is None else list(weights)
    if len(found) != len(trees):
        raise ValueError(f"{len(found)} weights do not suit {len(trees)} models; give one for each")
    if not all(map(math.isfinite, found)):
        raise ValueError(f"weights={found} must be finite numbers")
    return found


def _check(trees: Sequence[Params]) -> None:
    first = {name: tuple(p.shape) for name, p in trees[0].items()}
    for i, tree in enumerate(trees):
        other = {name: tuple(p.shape) for name, p in tree.items()}
        for name in [*first, *other]:
            if first.get(name) != other.get(name):
                raise ValueError(f"{name} is {first.get(name)} in the first tree and {other.get(name)} in tree {i + 1}")


def _sum(name: str, base: Tensor | None, values: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """base + sum of w (value - base), or the plain sum of w value, in the dtype of the first."""
    first = values[0] if base is None else base
    if not first.is_floating_point():
        return first.clone()
    start = torch.zeros_like(first, dtype=torch.float64) if base is None else base.double()
    out = start.clone()
    for value, weight in zip(values, weights, strict=True):
        out += weight * (value.double() if base is None else value.double() - start)
    made = out.to(first.dtype)
    if not bool(made.isfinite().all()):
        raise ValueError(f"{name} would have numbers that are not finite; choose smaller weights, or other models")
    return made


class _Sums(NamedTuple):
    """Of a and b: the squares of b - a, a and b, their product, and the largest |b - a|."""

    change: float
    a: float
    b: float
    dot: float
    largest: float


def _sums(a: Tensor, b: Tensor) -> _Sums:
    a, b = a.double().flatten(), b.double().flatten()
    change = b - a
    largest = float(change.abs().max()) if len(a) else 0.0
    return _Sums(float(change @ change), float(a @ a), float(b @ b), float(a @ b), largest)


def _told(sums: _Sums) -> Distance:
    relative = math.sqrt(sums.change / sums.a) if sums.a else math.inf if sums.change else 0.0
    cosine = sums.dot / math.sqrt(sums.a) / math.sqrt(sums.b) if sums.a and sums.b else math.nan
    return Distance(relative, sums.largest, cosine)


@torch.no_grad()
def distance(a: Tensor, b: Tensor) -> Distance:
    """How far b lies from a, computed in float64."""
    return _told(_sums(a, b))


@torch.no_grad()
def distances(a: Params, b: Params) -> dict[str, Distance]:
    """Of each parameter, and under "" of all of them as one. ValueError where names or shapes differ."""
    _check([a, b])
    found = {name: _sums(a[name], b[name]) for name in a}
    each = found.values()
    squares = (sum(s.change for s in each), sum(s.a for s in each), sum(s.b for s in each))
    whole = _Sums(*squares, sum(s.dot for s in each), max((s.largest for s in each), default=0.0))
    return {name: _told(sums) for name, sums in {"": whole, **found}.items()}


def differing(a: ModelConfig, b: ModelConfig) -> list[str]:
    """The options, as name=value and value, that make the models compute different things."""
    one, two = _described(a), _described(b)
    return [f"{name}={one[name]!r} and {two[name]!r}" for name in one if one[name] != two[name]]


def _described(cfg: ModelConfig) -> dict[str, Any]:
    """What counts, with None resolved."""
    same = {"n_kv_heads": cfg.kv_heads, "d_head": cfg.head_dim, "d_ff": cfg.ff_dim, "qkv_bias": cfg.has_qkv_bias}
    same |= {"norm_bias": cfg.has_norm_bias and cfg.norm == "layernorm", "init": cfg.init == "mup"}
    left_out = BEGINNING if cfg.init == "mup" else (*BEGINNING, "mup_base")
    own = {**asdict(cfg), **same}
    return {k: v for k, v in own.items() if k not in left_out and not k.startswith("dropout")}
