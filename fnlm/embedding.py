"""Tokens to activations: token, n-gram and learned position embeddings, on whole and on split tables and texts.

Letters as in fnlm/forward.py: B batch, T time, D d_model, V vocabulary.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fnlm import random
from fnlm.collectives import Axes, gather, psum
from fnlm.config import ModelConfig
from fnlm.dropout import dropout
from fnlm.ngrams import ngram_ids
from fnlm.norms import norm
from fnlm.types import Params


def embed(
    root: Params,
    tokens: Tensor,
    cfg: ModelConfig,
    keys: list[Tensor] | None,
    axes: Axes,
    before: Tensor | None = None,
    at: Tensor | None = None,
    start: int = 0,
) -> Tensor:
    """Token, n-gram and learned position embeddings, added: (B, T) -> (B, T, D).

    With `token_shift`, what is one position back is added to each before positions are ("token shift", Peng et al.
    2023): a position then knows what it follows, and one layer of attention can copy what followed the same before.

    In the midst of a text: `before` (B, N) are the tokens in front, V where there is none, `at` (B, T) the positions,
    or `start` the first of them. Without `before`, `at` are positions within documents, which nothing looks out of.
    """
    seen = tokens if before is None else torch.cat([before, tokens], 1)
    more = int(cfg.token_shift > 0 and seen.shape[1] > tokens.shape[1])  # one that is only shifted
    own = at if before is None else None
    x = _words(root, seen, tokens.shape[1] + more, cfg, keys, axes, start - more, own)
    if cfg.token_shift:
        back = x[:, :-1] if more else F.pad(x[:, :-1], (0, 0, 1, 0))
        back = back if own is None else back * (own > 0)[..., None]
        x = x[:, more:] + cfg.token_shift * back
    if cfg.positions == "learned":
        table = root["embed.positions.weight"]
        x = x + (table[start : start + tokens.shape[1]] if at is None else table[at])
    if cfg.embed_norm:
        x = norm(root, "embed_norm", x, cfg)
    return dropout(x, cfg.dropout_embed, keys[0] if keys else None, (start, 0))


def _words(
    root: Params,
    seen: Tensor,
    n: int,
    cfg: ModelConfig,
    keys: list[Tensor] | None,
    axes: Axes,
    start: int,
    own: Tensor | None,
) -> Tensor:
    """Token and n-gram embeddings of the last `n` tokens seen, of which the first is at position `start`; 0 for V."""
    mine = seen[:, seen.shape[1] - n :]
    there = mine < cfg.vocab_size if seen.shape[1] > n or start < 0 else None  # V stands before a text
    x = _rows(root["embed.tokens.weight"], mine if there is None else mine.where(there, 0), cfg.vocab_size, axes)
    for j, (order, rows) in enumerate(cfg.ngrams):
        ids = ngram_ids(seen, order, rows, cfg.vocab_size, own)
        e = F.embedding(ids[:, -n:], root[f"embed.ngram{order}.weight"])
        if keys and order > 2:
            kept = dropout(torch.ones_like(e[..., :1]), cfg.dropout_ngram, random.fold_in(keys[1], j), (start, 0))
            e = e * kept
        x = x + e
    return x if there is None else x * there[..., None]


def reach(cfg: ModelConfig) -> int:
    """How many tokens in front of a part of a text its embedding looks at."""
    return max((order - 1 for order, _ in cfg.ngrams), default=0) + (cfg.token_shift > 0)


def front(
    tokens: Tensor, cfg: ModelConfig, axes: Axes, begins: Tensor | None
) -> tuple[Tensor | None, Tensor | None, int]:
    """For `embed`: of a split context the tokens in front and the first position; of parted documents the positions."""
    if axes.context is None:
        at = None if begins is None else torch.arange(tokens.shape[1], device=tokens.device) - begins
        return None, at, 0
    start, far = axes.context.index * tokens.shape[1], reach(cfg)
    before = gather(tokens, axes.context, 1)[:, max(0, start - far) : start] if far else None
    return before, None, start


def _rows(weight: Tensor, tokens: Tensor, vocab_size: int, axes: Axes) -> Tensor:
    """Embedding rows; split over the tensor axis, each rank contributes the rows it holds."""
    if axes.tensor is None:
        return F.embedding(tokens, weight)
    if not len(weight):
        return psum(weight.sum(0).expand(*tokens.shape, -1), axes.tensor)
    mine = tokens - first_row(vocab_size, axes)
    here = (mine >= 0) & (mine < weight.shape[0])
    return psum(F.embedding(mine.where(here, 0), weight) * here[..., None], axes.tensor)


def first_row(vocab_size: int, axes: Axes) -> int:
    """The first vocabulary row this rank holds: parts of ceil(V / ranks), the last ones short or empty."""
    return min(axes.tensor.index * -(-vocab_size // axes.tensor.size), vocab_size) if axes.tensor else 0
