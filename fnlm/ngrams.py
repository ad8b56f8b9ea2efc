"""The rows of the n-gram tables: a function of the last few tokens, never of a text seen before."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def ngram_ids(tokens: Tensor, order: int, rows: int, vocab_size: int, own: Tensor | None = None) -> Tensor:
    """The row of each position's n-gram, itself and the order-1 before it, (B, T): exact where all fit, else hashed.

    `own` (B, T): how many tokens in front of each are of its document.
    """
    base = vocab_size + 1  # V stands for "before the beginning"
    code = tokens
    for back in range(1, order):
        before = F.pad(tokens, (back, 0), value=vocab_size)[..., : tokens.shape[-1]]
        before = before if own is None else before.where(own >= back, vocab_size)
        code = code + before * base**back if base**order < 2**62 else (code * 0x2C1B3C6D + before) & 0xFFFFFFFF
    if base**order <= rows:
        return code
    code = (code ^ (code >> 32)) & 0xFFFFFFFF  # so that no product overflows int64, which compilers may not expect
    return (((code ^ (code >> 15)) * 0x2C1B3C6D) & 0x7FFFFFFF) % rows
