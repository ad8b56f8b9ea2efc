"""Causal attention and what positions mean to it: one meaning, the same numbers by every route.

Plain operations can be differentiated any number of times, under any transform, with dropout; torch's flash kernel is
the default on a GPU. On a CPU flash is slow for short sequences and in bfloat16: there queries go in blocks that see
only the keys they may, and `fnlm/sublayers.py` has their gradient by hand. Letters as in forward.py; A = H + 2 H_kv
counts the heads of q, k and v together.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fnlm.clib import How
from fnlm.config import Kernels, ModelConfig
from fnlm.dropout import dropout
from fnlm.kernels import needs_plain
from fnlm.types import Key

BLOCK = 256  # queries at a time on a CPU; the best of 128, 256 and 512 for T up to 1024
Rotation = tuple[Tensor, Tensor]


class Span(NamedTuple):
    """A block of queries, the keys that any of them sees, and what is added to their scores: (1 or H, t, s), or for
    each sequence (B, 1 or H, t, s)."""

    rows: slice
    cols: slice
    bias: Tensor


class Places(NamedTuple):
    """What positions mean to every block, made once: RoPE's cos and signed sin (T, R) or None, and the spans.

    `first_head` and `start` are the global numbers of the first query head and of the first query computed here.
    With `how`, fnlm/attended.py computes attention, and there are no spans.
    """

    rotation: Rotation | None
    spans: tuple[Span, ...]
    first_head: int
    start: int = 0
    how: How | None = None


def attention(
    q: Tensor, k: Tensor, v: Tensor, cfg: ModelConfig, places: Places, kernels: Kernels = "auto", key: Key | None = None
) -> Tensor:
    """softmax(q k^T scale + bias) v over earlier positions (Vaswani et al. 2017, 3.2).

    q (B, T, H, K), k and v (B, S, H_kv, K) -> (B, T, H K); a key serves H / H_kv queries. `key` (B, 2) draws dropout.
    """
    if not q.shape[2]:
        return q.flatten(2)  # heads are split over ranks, and this one has none
    if key is not None and cfg.dropout_attn:
        kernels = "plain"
    shared = q.shape[2] // k.shape[2]
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    if shared > 1:
        k, v = k.repeat_interleave(shared, 1), v.repeat_interleave(shared, 1)
    if (kernels == "sdpa" or (kernels == "auto" and q.is_cuda)) and not needs_plain(compiling_too=False):
        y = _sdpa(q, k, v, cfg, places)
    else:
        y = _plain(q, k, v, cfg, places, key)
    return y.transpose(1, 2).flatten(2)


def scale(cfg: ModelConfig) -> float:
    """K^-1/2; under muP 8/K, the same at K = 64 (Yang et al. 2022, definition 4.1)."""
    return 8 / cfg.head_dim if cfg.init == "mup" else 1 / math.sqrt(cfg.head_dim)


def alibi_slopes(n_heads: int, device: torch.device) -> Tensor:
    """One slope per head, (H,): a geometric series, interleaved where H is no power of two (Press et al. 2022, 3)."""

    def series(n: int) -> list[float]:
        return [2 ** (-8 * (i + 1) / n) for i in range(n)]

    n = 2 ** int(math.log2(n_heads))
    slopes = series(n) + series(2 * n)[0::2][: n_heads - n]
    return torch.tensor(slopes, dtype=torch.float64, device=device)


def spans_of(
    t: int,
    cfg: ModelConfig,
    like: Tensor,
    block: int | None,
    heads: slice,
    start: int = 0,
    begins: Tensor | None = None,
) -> tuple[Span, ...]:
    """T queries and the keys before them, cut into blocks of queries (None: one); biases of `like`'s dtype and device.

    `heads`: those of all query heads that are computed here. `start`: the position of the first query. `begins` (B, T):
    the first position that each query may see.
    """
    size = block or t
    found = []
    for i in range(0, t, size):
        queries = range(start + i, start + min(i + size, t))
        keys = range(max(0, queries.start + 1 - cfg.window) if cfg.window else 0, queries.stop)
        cols = slice(keys.start, keys.stop)
        rows = slice(i, i + len(queries))
        bias = _bias(queries, keys, cfg, like, heads)
        if begins is not None:
            foreign = torch.arange(keys.start, keys.stop, device=like.device) < begins[:, rows, None]
            bias = bias.masked_fill(foreign[:, None], -torch.inf)
        found.append(Span(rows, cols, bias))
    return tuple(found)


def _bias(queries: range, keys: range, cfg: ModelConfig, like: Tensor, heads: slice) -> Tensor:
    """-inf where a key is later than the query or out of the window; ALiBi's slope times the distance."""
    at = torch.arange(queries.start, queries.stop, device=like.device)[:, None]
    distance = at - torch.arange(keys.start, keys.stop, device=like.device)
    hidden = (distance < 0) if cfg.window is None else (distance < 0) | (distance >= cfg.window)
    bias = torch.zeros(1, *distance.shape, dtype=like.dtype, device=like.device)
    if cfg.positions == "alibi":
        bias = (-alibi_slopes(cfg.n_heads, like.device)[heads, None, None] * distance).to(like.dtype)
    return bias.masked_fill(hidden, -torch.inf)


def _plain(q: Tensor, k: Tensor, v: Tensor, cfg: ModelConfig, places: Places, key: Key | None) -> Tensor:
    out = []
    for rows, cols, bias in places.spans:
        probs = (q[:, :, rows] * scale(cfg) @ k[:, :, cols].mT + bias).softmax(-1)
        probs = dropout(probs, cfg.dropout_attn, key, (places.first_head, places.start + rows.start, cols.start))
        out.append(probs @ v[:, :, cols])
    return out[0] if len(out) == 1 else torch.cat(out, 2)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, cfg: ModelConfig, places: Places) -> Tensor:
    parted = bool(places.spans) and places.spans[0].bias.ndim == 4
    if cfg.window is None and cfg.positions != "alibi" and q.shape[2] == k.shape[2] and not parted:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale(cfg))
    (span,) = places.spans
    k, v = k[:, :, span.cols], v[:, :, span.cols]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=span.bias, scale=scale(cfg))
