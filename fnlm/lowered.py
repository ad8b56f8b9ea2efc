"""Steps of few tokens of several texts, wherever their caches are, as one call of the C library."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fnlm import native
from fnlm.collectives import LOCAL
from fnlm.config import ModelConfig
from fnlm.embedding import embed, reach
from fnlm.prepared import Prepared
from fnlm.types import Params

FEW = 64  # tokens up to which this is as fast as torch's products


class Row(NamedTuple):
    """A text: its row of a KVCache, k and v (L, H_kv, S, K) and tokens (S,) or (0,), and how many positions it has."""

    k: Tensor
    v: Tensor
    tokens: Tensor
    filled: int


@torch.no_grad()
def together(
    ready: Prepared, texts: Sequence[Row], new: Sequence[Sequence[int]], cfg: ModelConfig, every: bool = False
) -> Tensor:
    """Logits (B, V), float32, after each text's last new token, or (`every`) after all in order, (n, V).

    Texts may have any number of new tokens, at least one, and caches of any batches that lie alike in memory; these are
    written. Each text's bits depend on itself alone, in every dtype, in any company and cut in any way. The model must
    have been lowered, and all must fit.
    """
    assert ready.native is not None
    if not texts:
        return torch.empty((0, cfg.vocab_size))
    x = _embedded(ready.root, texts, new, cfg)
    order = [(b, i) for b, own in enumerate(new) for i in range(len(own))]
    if not every:
        order.sort(key=lambda token: token[1] == len(new[token[0]]) - 1)  # what is wanted comes last
    longest = x.shape[1]
    flat = x.flatten(0, 1)
    if len(order) < len(flat) or not every:
        flat = flat[torch.tensor([b * longest + i for b, i in order])]
    if reach(cfg):
        for text, own in zip(texts, new, strict=True):
            text.tokens[text.filled : text.filled + len(own)] = torch.tensor(own)
    at = [texts[b].filled + i for b, i in order]
    wanted = len(order) if every else len(texts)
    return native.step(ready.native, flat, [(t.k, t.v) for t in texts], [b for b, _ in order], at, wanted)


def padded(rows: Sequence[Sequence[int]], device: torch.device | str = "cpu") -> tuple[Tensor, Tensor | None]:
    """Ragged rows as (B, T) with zeros behind, and their lengths (B,), None where all are T."""
    lengths = [len(row) for row in rows]
    longest = max(lengths)
    tokens = torch.tensor([[*row, *[0] * (longest - len(row))] for row in rows], device=device)
    return tokens, None if min(lengths) == longest else torch.tensor(lengths, device=device)


def _embedded(root: Params, texts: Sequence[Row], new: Sequence[Sequence[int]], cfg: ModelConfig) -> Tensor:
    """(B, longest, D); what stands behind a text's own means nothing."""
    ids, _ = padded(new)
    starts = torch.tensor([t.filled for t in texts])
    at = (starts[:, None] + torch.arange(ids.shape[1])).clamp(max=cfg.seq_len - 1)
    before = torch.stack([_before(t, cfg) for t in texts]) if reach(cfg) else None
    return embed(root, ids, cfg, None, LOCAL, before, at)


def _before(text: Row, cfg: ModelConfig) -> Tensor:
    """The tokens that the next one's embedding looks back at; V where the text has not begun."""
    seen = text.tokens[max(0, text.filled - reach(cfg)) : text.filled]
    return F.pad(seen, (reach(cfg) - len(seen), 0), value=cfg.vocab_size)
