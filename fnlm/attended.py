"""Attention from the rows of the joined projection as one node of autograd's graph, by the C library of fnlm/clib."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fnlm.clib import How, attend, attend_backward, can_attend
from fnlm.config import Compute, ModelConfig
from fnlm.kernels import needs_plain, once_differentiable


def attended(qkv: Tensor, how: How) -> Tensor:
    """q, k and v beside each other, (B, T, (H + 2 H_kv) K) -> (B, T, H K): QK norm, rotation and causal attention."""
    out: Tensor = _Attended.apply(qkv, how)  # type: ignore[no-untyped-call]
    return out


def suits(like: Tensor, cfg: ModelConfig, compute: Compute) -> bool:
    """Whether the library computes this model's attention, of texts that are whole here, with nothing dropped.

    A compiled block is traced later than this is asked, and no call of a library can be.
    """
    plain = compute.kernels != "auto" or cfg.positions == "alibi" or (cfg.qk_norm and cfg.norm_affine)
    return not (plain or needs_plain() or compute.compile == "block") and can_attend(like, cfg.head_dim)


class _Attended(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, qkv: Tensor, how: How) -> Tensor:
        y, tops = attend(qkv, how)
        ctx.save_for_backward(qkv, y, tops)
        ctx.how = how
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        qkv, y, tops = ctx.saved_tensors
        return attend_backward(g, qkv, y, tops, ctx.how), None
