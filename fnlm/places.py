"""Where queries and keys stand in the text and which heads are computed here: the tables that every block reads.

T positions; R the rotated dimensions of a head.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fnlm.attended import suits
from fnlm.attention import BLOCK, Places, Rotation, scale, spans_of
from fnlm.clib import How
from fnlm.collectives import LOCAL, Axes
from fnlm.config import Compute, ModelConfig
from fnlm.rotary import amplitude, frequencies


def places_of(
    t: int,
    cfg: ModelConfig,
    like: Tensor,
    compute: Compute,
    axes: Axes = LOCAL,
    begins: Tensor | None = None,
    dropped: bool = False,
) -> Places:
    """The position tables for T positions, made once for all blocks; `begins` (B, T) as `begins_of` gives them.

    `dropped`: attention weights are.
    """
    rope = cfg.positions == "rope"
    start = axes.context.index * t if axes.context else 0
    at = torch.arange(start, start + t, device=like.device)
    heads = heads_of(cfg, axes)
    if axes.context is None and heads.stop > heads.start and not dropped and suits(like, cfg, compute):
        rotation = rope_table(at, cfg, torch.float32) if rope else None
        return Places(rotation, (), heads.start, 0, how_of(cfg, heads.stop - heads.start, rotation, begins))
    rotation = rope_table(at, cfg, like.dtype) if rope else None
    blocked = compute.kernels != "sdpa" and not like.is_cuda
    spans = spans_of(t, cfg, like, BLOCK if blocked else None, heads, start, begins)
    return Places(rotation, spans, heads.start, start)


def how_of(cfg: ModelConfig, n: int, rotation: Rotation | None, begins: Tensor | None = None) -> How:
    """What fnlm/attended.py does for `n` query heads and the key heads that serve them."""
    norm = cfg.norm if cfg.qk_norm else "none"
    kv = n * cfg.kv_heads // cfg.n_heads
    return How(n, kv, cfg.head_dim, scale(cfg), norm, cfg.norm_eps, rotation, begins, cfg.window or 0)


def begins_of(tokens: Tensor, compute: Compute, axes: Axes = LOCAL) -> Tensor | None:
    """The position (B, T) at which the document of each token (B, T) begins; None where documents are not told apart.

    A window's first document begins at 0, whether or not its true beginning is in the window. Raises ValueError on a
    split context, where a rank does not see the tokens in front.
    """
    if compute.document_end is None and compute.document_start is None:
        return None
    if axes.context is not None:
        raise ValueError(
            "documents are not told apart on a split context; choose documents=together, or no context axis"
        )
    if compute.document_start is not None:
        first = tokens.eq(compute.document_start)
    else:
        first = F.pad(tokens.eq(compute.document_end or 0)[:, :-1], (1, 0))
    at = torch.arange(tokens.shape[1], device=tokens.device)
    return torch.where(first, at, 0).cummax(1).values


def heads_of(cfg: ModelConfig, axes: Axes) -> slice:
    """The query heads computed here: those of ceil(H_kv / ranks) key heads, the last ranks may have fewer."""
    served, ranks = cfg.n_heads // cfg.kv_heads, axes.tensor.size if axes.tensor else 1
    size, index = -(-cfg.kv_heads // ranks) * served, axes.tensor.index if axes.tensor else 0
    return slice(min(index * size, cfg.n_heads), min((index + 1) * size, cfg.n_heads))


def rope_table(at: Tensor, cfg: ModelConfig, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and signed sin for positions (T,): (T, R) each (Su et al. 2021, 3.4.2)."""
    angle = torch.outer(at.double(), frequencies(cfg, at.device))
    size = amplitude(cfg)
    cos, sin = size * angle.cos(), size * angle.sin()
    return torch.cat([cos, cos], -1).to(dtype), torch.cat([-sin, sin], -1).to(dtype)
