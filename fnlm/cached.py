"""Attention of new queries over cached keys and values: the maths, without masks where nothing is hidden."""

from __future__ import annotations

import torch
from torch import Tensor

from fnlm.attention import alibi_slopes, scale
from fnlm.collectives import Axes
from fnlm.config import ModelConfig


def look(q: Tensor, k: Tensor, v: Tensor, cfg: ModelConfig, bias: Tensor | None) -> Tensor:
    """softmax(q k^T scale + bias) v: q (B, T, H, K), k and v (B, H_kv, s, K) -> (B, T, H K)."""
    b, t, h, d = q.shape
    n_kv = k.shape[1]
    shared = (q * scale(cfg)).transpose(1, 2).reshape(b, n_kv, -1, d)  # the G T queries that read the same keys
    scores = shared @ k.mT
    if bias is not None:
        scores.view(b, n_kv, h // n_kv, t, -1)[..., -bias.shape[-1] :] += bias
    y = scores.softmax(-1) @ v
    return y.view(b, h, t, d).transpose(1, 2).reshape(b, t, h * d)


def bias_of(at: Tensor, seen: slice, cfg: ModelConfig, like: Tensor, axes: Axes) -> Tensor:
    """-inf where a key is later than the query or out of the window; ALiBi's slope times the distance."""
    distance = (at[..., None] - torch.arange(seen.start, seen.stop, device=at.device))[:, None, None]
    hidden = distance < 0 if cfg.window is None else (distance < 0) | (distance >= cfg.window)
    bias = torch.zeros(hidden.shape, dtype=like.dtype, device=like.device)
    if cfg.positions == "alibi":
        n_kv, shared = like.shape[2], cfg.n_heads // cfg.kv_heads
        first = axes.tensor.index * -(-cfg.n_heads // axes.tensor.size) if axes.tensor else 0
        slopes = alibi_slopes(cfg.n_heads, like.device)[first : first + n_kv * shared]
        bias = (-slopes.view(1, n_kv, shared, 1, 1) * distance).to(like.dtype)
    return bias.masked_fill(hidden, -torch.inf)


def bias_at(bias: Tensor | None, last: Tensor) -> Tensor | None:
    """The bias (B or 1, H_kv or 1, G or 1, T, s) of one query of each row."""
    if bias is None:
        return None
    return each_at(bias.movedim(3, 1), last[: len(bias)]).movedim(1, 3)  # one for all rows: they end together


def each_at(x: Tensor, index: Tensor) -> Tensor:
    """One element of the second dimension for each of the first: (B, T, ...) -> (B, 1, ...)."""
    return x[torch.arange(len(x), device=x.device), index][:, None]
