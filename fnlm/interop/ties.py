"""How a family's tensors and ours correspond: each of theirs holds one or several of ours, in some layout."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from fnlm.checkpoint.files import CheckpointError
from fnlm.config import ModelConfig
from fnlm.interop.stored import Tensors
from fnlm.params import is_norm, shapes
from fnlm.types import Params

Layout = Literal["plain", "transposed", "by head", "interleaved"]
SOME = 3  # names in a message


class Tie(NamedTuple):
    """One of their tensors and those of ours that it holds.

    plain: the same values. transposed: (in, out), those of ours side by side (GPT-2's Conv1D). by head: q, k and v of
    the first head, then of the next (NeoX). interleaved: RoPE turns rows 0 and 1, not 0 and K/2 (llama2.c, GGUF).
    """

    theirs: str
    ours: tuple[str, ...]
    layout: Layout = "plain"


def tie(theirs: str, ours: str, kinds: Iterable[str] = ("weight",), layout: Layout = "plain") -> list[Tie]:
    """The weight, and the bias where `kinds` has it, of modules."""
    return [Tie(f"{theirs}.{kind}", (f"{ours}.{kind}",), layout) for kind in kinds]


def split(tie: Tie, value: Tensor, cfg: ModelConfig, sizes: dict[str, tuple[int, ...]]) -> Params:
    """Ours of theirs, each contiguous."""
    if tie.layout == "by head":
        parts = value.unflatten(0, (-1, len(tie.ours), cfg.head_dim)).unbind(1)
        return {name: part.flatten(0, 1).contiguous() for name, part in zip(tie.ours, parts, strict=True)}
    if tie.layout == "interleaved":
        value = value.unflatten(0, (-1, cfg.head_dim // 2, 2)).transpose(1, 2).flatten(0, 2)
    rows = value.T if tie.layout == "transposed" and value.ndim == 2 else value
    parts = rows.split([sizes[name][0] for name in tie.ours])
    return {name: part.contiguous() for name, part in zip(tie.ours, parts, strict=True)}


def join(tie: Tie, params: Params, cfg: ModelConfig) -> Tensor:
    """Theirs of ours, the inverse of `split`."""
    values = [params[name] for name in tie.ours]
    if tie.layout == "by head":
        heads: list[Tensor] = [v.view(-1, cfg.head_dim, *v.shape[1:]) for v in values]
        return torch.stack(heads, 1).flatten(0, 2)
    value = values[0] if len(values) == 1 else torch.cat(values)
    if tie.layout == "interleaved":
        pairs = value.view(-1, 2, cfg.head_dim // 2, *value.shape[1:])
        return pairs.transpose(1, 2).flatten(0, 2)
    return value.T.contiguous() if tie.layout == "transposed" and value.ndim == 2 else value


def shape(tie: Tie, sizes: dict[str, tuple[int, ...]]) -> tuple[int, ...]:
    """What `join` makes of tensors of these shapes; not by torch's meta tensors, which take a second to begin."""
    rest = sizes[tie.ours[0]][1:]
    rows = sum(sizes[name][0] for name in tie.ours)
    return (*rest, rows) if tie.layout == "transposed" else (rows, *rest)


def taken(tensors: Tensors, ties: Iterable[Tie], cfg: ModelConfig, where: str) -> Params:
    """Our parameters in forward order, read one tensor at a time: never more in memory than they and one more.

    CheckpointError for a tensor that is missing, of another shape, or not of this architecture.
    """
    ties, sizes = list(ties), shapes(cfg)
    _check(tensors, ties, sizes, where)
    found: Params = {}
    for one in ties:
        found |= split(one, tensors[one.theirs].read(), cfg, sizes)
    return {name: found[name] for name in sizes}


def _check(tensors: Tensors, ties: list[Tie], sizes: dict[str, tuple[int, ...]], where: str) -> None:
    missing = [t.theirs for t in ties if t.theirs not in tensors]
    extra = sorted(set(tensors) - {t.theirs for t in ties})
    for what, names in (("has no", missing), ("has, beyond what its config.json describes,", extra)):
        if names:
            more = f" and {len(names) - SOME} more" if len(names) > SOME else ""
            raise CheckpointError(f"{where} {what} {', '.join(names[:SOME])}{more}")
    for one in ties:
        wanted, there = shape(one, sizes), tuple(tensors[one.theirs].shape)
        if wanted != there:
            raise CheckpointError(f"{where}: {one.theirs} has shape {there}, by its config.json it must be {wanted}")


def filled(params: Params, cfg: ModelConfig) -> Params:
    """The parameters of `cfg`; what it has and they have not does nothing: biases of 0, norms of 1."""
    like = next(iter(params.values()))
    fresh = {name: shape for name, shape in shapes(cfg).items() if name not in params}
    assert all(is_norm(name) or name.endswith(".bias") for name in fresh), fresh
    made = {name: torch.full(s, float(name.endswith(".weight")), dtype=like.dtype) for name, s in fresh.items()}
    return {name: made[name] if name in made else params[name] for name in shapes(cfg)}


def size(tensors: Tensors) -> int:
    """How many numbers there are."""
    return sum(math.prod(t.shape) for t in tensors.values())
