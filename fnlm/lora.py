"""Low-rank adapters as a transform of trees (LoRA; Hu et al. 2021): W + scale B A, and only A and B learn.

Adapters are a dict beside the parameters: `blocks.0.attn.q.lora_a` (r, in) and `blocks.0.attn.q.lora_b` (out, r) belong
to `blocks.0.attn.q.weight`. `scale` is alpha / r.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import torch

from fnlm import random
from fnlm.names import chosen
from fnlm.params import Shape, is_hidden_matrix, number_of
from fnlm.types import Key, Params

A, B, WEIGHT = ".lora_a", ".lora_b", ".weight"


def is_adapter(name: str) -> bool:
    """Whether a name is an adapter's."""
    return name.endswith((A, B))


def targets_of(names: Iterable[str], patterns: str = "*") -> list[str]:
    """The maps in blocks that the patterns name, such as `blocks.0.attn.q`; `q,attn.*` name ends.

    ValueError, with the nearest, for a pattern that names none.
    """
    maps = [name.removesuffix(WEIGHT) for name in names if is_hidden_matrix(name)]
    return chosen(patterns, maps, "lora_targets", tail=True)


def shapes(sizes: Mapping[str, Shape], rank: int, targets: Iterable[str]) -> dict[str, Shape]:
    """The names and shapes of the adapters. ValueError for a rank that is no saving: above that of the map."""
    out: dict[str, Shape] = {}
    for name in targets:
        rows, columns = sizes[name + WEIGHT]
        if not 1 <= rank <= min(rows, columns):
            least = min(rows, columns)
            raise ValueError(f"lora={rank} does not fit {name} ({rows} x {columns}); choose a rank from 1 to {least}")
        out |= {name + A: (rank, columns), name + B: (rows, rank)}
    return out


def init(params: Params, rank: int, key: Key, targets: str = "*") -> Params:
    """Fresh adapters of `params`, float32 at least: A uniform in +-1 / sqrt(in), B 0, so that nothing changes at first.

    Each tensor is drawn from its own key, so a name's values do not depend on the others.
    """
    sizes = shapes({k: tuple(p.shape) for k, p in params.items()}, rank, targets_of(params, targets))
    out = {}
    for name, shape in sizes.items():
        like = params[name.removesuffix(A).removesuffix(B) + WEIGHT]
        dtype, device = torch.promote_types(like.dtype, torch.float32), like.device
        if name.endswith(B) or like.is_meta:
            out[name] = torch.zeros(shape, dtype=dtype, device=device)
        else:
            edge = 1 / math.sqrt(shape[1])
            own = random.fold_in(key, number_of(name))
            out[name] = random.uniform(own, shape, dtype=dtype, low=-edge, high=edge).to(device)
    return out


def apply(params: Params, adapters: Params, scale: float, dtype: torch.dtype | None = None) -> Params:
    """The parameters with scale B A added to those that have adapters; gradients flow to the adapters alone.

    Summed in float32 at least, then in `dtype` (None: that of the parameter).
    """
    out = dict(params)
    for name in (k.removesuffix(A) for k in adapters if k.endswith(A)):
        w, a, b = params[name + WEIGHT].detach(), adapters[name + A], adapters[name + B]
        wide = torch.promote_types(w.dtype, torch.float32)
        whole = torch.addmm(w.to(wide), b.to(wide), a.to(wide), alpha=scale)
        out[name + WEIGHT] = whole.to(dtype or w.dtype)
    return out


@torch.no_grad()
def merge(params: Params, scale: float) -> Params:
    """Parameters alone, of a dict that also holds adapters."""
    adapters = {k: v for k, v in params.items() if is_adapter(k)}
    return apply({k: v for k, v in params.items() if k not in adapters}, adapters, scale)
