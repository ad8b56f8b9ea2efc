"""The nouns: what a model, an optimizer and a training run are made of. Nothing here computes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

from torch import Tensor

Params: TypeAlias = dict[str, Tensor]
"""Flat, dotted names in forward order: `{"blocks.3.attn.q.weight": ...}`. Gradients and updates have the same type."""

Key: TypeAlias = Tensor
"""Explicit randomness: an int64 tensor of shape (2,) holding two 32-bit words; see `fnlm.random`."""

Tree: TypeAlias = Any
"""A tensor, or a dict, tuple or NamedTuple of trees (None is an empty tree); see `fnlm.tree`."""

NameMask: TypeAlias = Callable[[str], bool]
"""Which parameters something applies to, decided by name, never by the number of dimensions."""


class Transform(NamedTuple):
    """An optimizer, or a link of one: two pure functions.

    `init(params) -> state` and `update(grads, state, params) -> (updates, state)`; the caller adds updates to params.
    `rule` says as data what the two functions compute, or is None: the in-place lowering and sharding read it,
    so a transform without a rule works everywhere, only slower and on whole parameters.
    """

    init: Callable[[Params], Tree]
    update: Callable[[Params, Tree, Params], tuple[Params, Tree]]
    rule: object | None = None


class Batch(NamedTuple):
    """Tokens (B, T) int64, targets (B, T) int64, and weights (B, T) float: the loss mask, 0 where nothing is learnt."""

    tokens: Tensor
    targets: Tensor
    weights: Tensor


class TrainState(NamedTuple):
    """One pytree that goes through step, save and restore. `step` is a 0-d int64 tensor on the CPU."""

    step: Tensor
    params: Params
    opt_state: Tree
    key: Key
