"""What texts leave behind for their next tokens: keys, values, positions, and the tokens where n-grams need them."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from fnlm.config import ModelConfig
from fnlm.embedding import reach
from fnlm.pages import private

_LARGE = 1 << 20  # bytes


class KVCache(NamedTuple):
    """What the texts of a batch have left behind. Positions from `pos` on hold nothing that counts.

    k, v (L, B, H_kv, S, K); pos (B,) int64: how many positions of each row are valid; tokens (B, S) int64, what stands
    there, where n-grams need it (else (B, 0)). To forget the end of a text, lower its `pos`.
    """

    k: Tensor
    v: Tensor
    pos: Tensor
    tokens: Tensor


def init_cache(
    cfg: ModelConfig,
    batch: int,
    length: int | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    heads: int | None = None,
) -> KVCache:
    """An empty cache for `batch` rows of `length` (the model's seq_len) positions, of the dtype of the parameters.

    `heads`: of keys and values, those that are computed here where they are split. ValueError for more than seq_len.
    """
    length = cfg.seq_len if length is None else length
    if not 0 < length <= cfg.seq_len:
        raise ValueError(f"a cache of {length} positions does not suit seq_len={cfg.seq_len}; choose 1 to seq_len")
    shape = (cfg.n_layers, batch, heads or cfg.kv_heads, length, cfg.head_dim)
    k, v = (_zeros(shape, dtype, torch.device(device)) for _ in "kv")  # zeros: no NaN where nothing is seen
    tokens = torch.zeros((batch, length if reach(cfg) else 0), dtype=torch.int64, device=device)
    return KVCache(k, v, torch.zeros(batch, dtype=torch.int64, device=device), tokens)


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros; large ones on a CPU in pages that the system makes when they are written to: few texts reach the end."""
    size = math.prod(shape) * dtype.itemsize
    if device.type != "cpu" or size < _LARGE:
        return torch.zeros(shape, dtype=dtype, device=device)
    return torch.frombuffer(private(size, large=False), dtype=torch.uint8).view(dtype).view(shape)


def picked(cache: KVCache, rows: Tensor) -> KVCache:
    """A cache of these rows (n,), copied: fewer, in another order, or one several times."""
    return KVCache(cache.k[:, rows], cache.v[:, rows], cache.pos[rows], cache.tokens[rows])
