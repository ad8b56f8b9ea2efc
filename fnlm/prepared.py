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
def prepare(
    params: Params, cfg: ModelConfig, dtype: torch.dtype | None = None, *, lowered: bool = True, donate: bool = False
) -> Prepared:
    """The parameters for `decode`, in another dtype where one is given; what needs no change is shared, not copied.

    `lowered`: for the native step too, where there is a compiler (the first call on a machine waits a second for it).
    `donate`: `params` is emptied; on a CPU its matrices move to memory in large pages, where long decoding is faster.
    """
    room, groups = Pages(), split_groups(params, cfg)
    if donate:
        params.clear()
    root = _taken(groups.pop("root"), dtype, room, donate)
    table = root["embed.tokens.weight"]
    at, rope = torch.arange(cfg.seq_len, device=table.device), cfg.positions == "rope"
    rotation = rope_table(at, cfg, table.dtype) if rope else None
    blocks = tuple(_joined(groups[f"blocks.{i}"], dtype, room, donate) for i in range(cfg.n_layers))
    wide = rope_table(at, cfg, torch.float32) if rope else None
    return Prepared(root, blocks, rotation, wide, native.lower(root, blocks, wide, cfg) if lowered else None)


def _joined(p: Params, dtype: torch.dtype | None, room: Pages, move: bool) -> Params:
    """A block's dict with one matrix for q, k and v; `p` is emptied."""
    heads = {name: p.pop(name) for name in list(p) if name.removeprefix("attn.")[:2] in ("q.", "k.", "v.")}
    out = _taken(p, dtype, room, move)
    for kind in ("weight", "bias", "scale"):
        parts = [heads[f"attn.{head}.{kind}"] for head in "qkv" if f"attn.{head}.{kind}" in heads]
        if parts:
            out[f"attn.qkv.{kind}"] = room.joined(parts, _wanted(parts[0], dtype))
    return out


def _taken(p: Params, dtype: torch.dtype | None, room: Pages, move: bool) -> Params:
    """The same in their type; `p` is emptied, so that what is copied can go at once."""
    return {name: _in_type(p.pop(name), dtype, room, move) for name in list(p)}


def _in_type(p: Tensor, dtype: torch.dtype | None, room: Pages, move: bool) -> Tensor:
    wanted = _wanted(p, dtype)
    stays = p.dtype == wanted and not (move and p.ndim == 2 and p.device.type == "cpu")
    return p if stays else room.joined([p], wanted)


def _wanted(p: Tensor, dtype: torch.dtype | None) -> torch.dtype:
    return dtype if dtype is not None and p.is_floating_point() else p.dtype
