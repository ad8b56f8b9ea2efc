"""Attention in blocks of queries on a CPU, with its gradient: plain functions on tensors, no autograd.

Heads first, (A, B, T, K): q, k, v and their gradients are then slices of one buffer. Autograd would pad the gradient of
every slice of the keys to full length.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fnlm.attention import Places, Span, scale
from fnlm.config import ModelConfig

KEEP = 512  # positions; with more, (T, T) weights are most of the memory, and computing them again costs 4 % of a step
Heads = tuple[int, int]


def attend(heads: Tensor, n: Heads, cfg: ModelConfig, places: Places) -> tuple[Tensor, list[Tensor]]:
    """(A, B, T, K) -> (B T, H K), and the attention weights of each span where they are kept; `n` = (H, H_kv)."""
    q, k, v = _three(heads, n)
    y, kept = torch.empty_like(q), []
    for span in places.spans:
        probs = _probs(q, k, span, cfg)
        y[:, span.rows] = probs @ v[:, span.cols]
        kept += [probs] if keeps(heads.shape[2]) else []
    return to_rows(y.view(n[0], *heads.shape[1:])), kept


def keeps(t: int) -> bool:
    """Whether T positions are few enough to keep what is cheap to compute again."""
    return t <= KEEP


def attend_backward(g: Tensor, heads: Tensor, kept: list[Tensor], n: Heads, cfg: ModelConfig, places: Places) -> Tensor:
    """The gradient with respect to the heads, (A, B, T, K), from that of the result, (B T, H K)."""
    b, t, k_dim = heads.shape[1:]
    q, k, v = _three(heads, n)
    g = g.view(b, t, n[0], k_dim).permute(2, 0, 1, 3).reshape(n[0] * b, t, k_dim)
    d_heads = torch.empty_like(heads)
    d_q, d_k, d_v = _three(d_heads, n) if n[0] == n[1] else [torch.empty_like(q) for _ in range(3)]
    d_k.zero_(), d_v.zero_()
    for i, span in enumerate(places.spans):
        r, c = span.rows, span.cols
        probs = kept[i] if kept else _probs(q, k, span, cfg)
        d_scores = torch._softmax_backward_data(g[:, r] @ v[:, c].mT, probs, -1, probs.dtype)
        d_q[:, r].baddbmm_(d_scores, k[:, c], beta=0, alpha=scale(cfg))
        d_k[:, c].baddbmm_(d_scores.mT, q[:, r], alpha=scale(cfg))
        d_v[:, c].baddbmm_(probs.mT, g[:, r])
    if n[0] > n[1]:
        shape = (n[1], n[0] // n[1], b, t, k_dim)
        torch.cat([d_q.view(n[0], b, t, k_dim), d_k.view(shape).sum(1), d_v.view(shape).sum(1)], out=d_heads)
    return d_heads


def to_heads(rows: Tensor, b: int, k_dim: int) -> Tensor:
    """(B T, A K) -> (A, B, T, K), always a copy."""
    return (
        rows.view(b, -1, rows.shape[-1] // k_dim, k_dim)
        .permute(2, 0, 1, 3)
        .clone(memory_format=torch.contiguous_format)
    )


def to_rows(heads: Tensor) -> Tensor:
    """(A, B, T, K) -> (B T, A K)."""
    a, b, t, k_dim = heads.shape
    return heads.permute(1, 2, 0, 3).reshape(b * t, a * k_dim)


def _three(heads: Tensor, n: Heads) -> list[Tensor]:
    """q, k and v as (H B, T, K); shared keys and values repeated."""
    q, *kv = heads.split([n[0], n[1], n[1]])
    if n[0] > n[1]:
        kv = [x.repeat_interleave(n[0] // n[1], 0) for x in kv]
    return [x.flatten(0, 1) for x in (q, *kv)]


def _probs(q: Tensor, k: Tensor, span: Span, cfg: ModelConfig) -> Tensor:
    """(H B, t, s) attention weights of one span."""
    q, k, bias = q[:, span.rows], k[:, span.cols], span.bias
    if bias.ndim == 3 and len(bias) == 1:
        return torch.baddbmm(bias, q, k.mT, alpha=scale(cfg)).softmax(-1)
    if bias.ndim == 4:  # (B, 1 or H, t, s), beside the plain formula one pass over the scores more
        scores = (q * scale(cfg)) @ k.mT
        scores.unflatten(0, (-1, len(bias))).add_(bias.transpose(0, 1))
        return scores.softmax(-1)
    scores = (q @ k.mT).mul_(scale(cfg))
    scores.unflatten(0, (len(bias), -1)).add_(bias[:, None])
    return scores.softmax(-1)
