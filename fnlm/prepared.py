"""Parameters as decoding reads them: what many steps would otherwise do again, done once."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fnlm import native
from fnlm.attention import Rotation
from fnlm.config import ModelConfig
from fnlm.forward import split_groups
from fnlm.pages import Pages
from fnlm.places import rope_table
from fnlm.types import Params


class Prepared(NamedTuple):
    """Parameters laid out for many steps: grouped, cast, q, k and v joined, RoPE's tables for all positions.

    `wide`: these tables in float32. `native`: the same for the C library, which reads the same memory; None where it
    cannot.
    """

    root: Params
    blocks: tuple[Params, ...]
    rotation: Rotation | None
    wide: Rotation | None
    native: native.Native | None = None


@torch.no_grad()
def prepare(params: Params, cfg: ModelConfig, dtype: torch.dtype | None = None, *, lowered: bool = True) -> Prepared:
    """The parameters for `decode`, in another dtype where one is given; what needs no change is shared, not copied.

    `lowered`: for the native step too, where there is a compiler (the first call on a machine waits a second for it).
    """
    room, groups = Pages(), split_groups(params, cfg)
    root = {name: _in_type(p, dtype, room) for name, p in groups.pop("root").items()}
    table = root["embed.tokens.weight"]
    at, rope = torch.arange(cfg.seq_len, device=table.device), cfg.positions == "rope"
    rotation = rope_table(at, cfg, table.dtype) if rope else None
    blocks = tuple(_joined(p, dtype, room) for p in groups.values())
    wide = rope_table(at, cfg, torch.float32) if rope else None
    return Prepared(root, blocks, rotation, wide, native.lower(root, blocks, wide, cfg) if lowered else None)


def _joined(p: Params, dtype: torch.dtype | None, room: Pages) -> Params:
    """A block's dict with one matrix for q, k and v."""
    out = {name: w for name, w in p.items() if name.removeprefix("attn.")[:2] not in ("q.", "k.", "v.")}
    out = {name: _in_type(w, dtype, room) for name, w in out.items()}
    for kind in ("weight", "bias", "scale"):
        parts = [p[f"attn.{head}.{kind}"] for head in "qkv" if f"attn.{head}.{kind}" in p]
        if parts:
            out[f"attn.qkv.{kind}"] = room.joined(parts, _wanted(parts[0], dtype))
    return out


def _in_type(p: Tensor, dtype: torch.dtype | None, room: Pages) -> Tensor:
    return p if p.dtype == _wanted(p, dtype) else room.joined([p], _wanted(p, dtype))


def _wanted(p: Tensor, dtype: torch.dtype | None) -> torch.dtype:
    return dtype if dtype is not None and p.is_floating_point() else p.dtype
