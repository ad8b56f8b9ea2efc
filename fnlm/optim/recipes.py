"""Optimizers by name, each a chain that reads as a sentence. `lr` is a number or a schedule."""

from __future__ import annotations

import torch

from fnlm.optim.adafactor import scale_by_adafactor
from fnlm.optim.adam import scale_by_adam
from fnlm.optim.base import chain, check, partition
from fnlm.optim.clip import clip_by_global_norm
from fnlm.optim.decay import add_decayed_weights
from fnlm.optim.lion import scale_by_lion
from fnlm.optim.muon import Adjust, Coefficients, scale_by_muon
from fnlm.optim.scale import scale, scale_by_schedule
from fnlm.optim.schedules import Schedule, at_most_inverse_sqrt, constant
from fnlm.optim.sgd import trace
from fnlm.types import NameMask, Transform


def _rate(lr: float | Schedule) -> Transform:
    if callable(lr):
        return scale_by_schedule(lr)
    check(lr >= 0, f"lr={lr} is negative: the updates would ascend; give a learning rate >= 0")
    return scale(-lr)


def _clip(max_norm: float | None) -> Transform | None:
    return None if max_norm is None else clip_by_global_norm(max_norm)


def _decay(rate: float, mask: NameMask | None) -> Transform | None:
    return add_decayed_weights(rate, mask) if rate else None


def _chain(**links: Transform | None) -> Transform:
    return chain(**{name: link for name, link in links.items() if link is not None})


def sgd(
    lr: float | Schedule,
    momentum: float = 0.0,
    nesterov: bool = False,
    dampening: float = 0.0,
    decay: float = 0.0,
    mask: NameMask | None = None,
    clip: float | None = None,
) -> Transform:
    """Gradient descent; `decay` is L2 regularisation, as in torch.optim.SGD."""
    moving = trace(momentum, nesterov, dampening) if momentum else None
    return _chain(clip=_clip(clip), decay=_decay(decay, mask), trace=moving, lr=_rate(lr))


def adam(
    lr: float | Schedule,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    clip: float | None = None,
    moments_dtype: torch.dtype | None = None,
) -> Transform:
    """Adam (Kingma & Ba 2015)."""
    return _chain(clip=_clip(clip), adam=scale_by_adam(b1, b2, eps, moments_dtype), lr=_rate(lr))


def adamw(
    lr: float | Schedule,
    b1: float = 0.9,
    b2: float = 0.95,
    eps: float = 1e-8,
    decay: float = 0.1,
    mask: NameMask | None = None,
    clip: float | None = None,
    moments_dtype: torch.dtype | None = None,
) -> Transform:
    """Adam with decoupled weight decay (Loshchilov & Hutter 2019); the defaults are those of language models."""
    core = scale_by_adam(b1, b2, eps, moments_dtype)
    return _chain(clip=_clip(clip), adam=core, decay=_decay(decay, mask), lr=_rate(lr))


def lion(
    lr: float | Schedule,
    b1: float = 0.9,
    b2: float = 0.99,
    decay: float = 0.1,
    mask: NameMask | None = None,
    clip: float | None = None,
) -> Transform:
    """Lion (Chen et al. 2023); wants a learning rate 3 to 10 times below AdamW's, and as much more decay."""
    return _chain(clip=_clip(clip), lion=scale_by_lion(b1, b2), decay=_decay(decay, mask), lr=_rate(lr))


def adafactor(
    lr: float | Schedule = 1e-2,
    beta2_decay: float = -0.8,
    eps1: float | None = None,
    eps2: float = 1e-3,
    decay: float = 0.0,
    mask: NameMask | None = None,
    clip: float | None = None,
) -> Transform:
    """Adafactor (Shazeer & Stern 2018) with the step size min(lr, 1 / sqrt(count + 1)).

    Weight decay follows that step size; torch.optim.Adafactor's follows lr (the same until count = 1 / lr^2).
    """
    if not callable(lr):
        check(lr >= 0, f"lr={lr} is negative: the updates would ascend; give a learning rate >= 0")
        lr = constant(lr)
    return _chain(clip=_clip(clip), adafactor=scale_by_adafactor(beta2_decay, eps1, eps2), decay=_decay(decay, mask),
                  lr=scale_by_schedule(at_most_inverse_sqrt(lr)))  # fmt: skip


def muon(
    lr: float | Schedule,
    matrices: NameMask,
    adam_lr: float | Schedule,
    momentum: float = 0.95,
    nesterov: bool = True,
    steps: int = 5,
    coefficients: Coefficients = "quintic",
    adjust: Adjust = "original",
    decay: float = 0.1,
    b1: float = 0.9,
    b2: float = 0.95,
    adam_decay: float = 0.0,
    adam_mask: NameMask | None = None,
    clip: float | None = None,
    moments_dtype: torch.dtype | None = None,
) -> Transform:
    """Muon for the names that `matrices` accepts, AdamW for the rest: embeddings, head, norms, biases.

    `clip` bounds the gradients of the rest only: the size of a matrix's gradient hardly matters to Muon.
    """
    turn = scale_by_muon(momentum, nesterov, steps, coefficients, adjust, moments_dtype=moments_dtype)
    return partition(
        lambda name: "matrices" if matrices(name) else "rest",
        matrices=_chain(muon=turn, decay=_decay(decay, None), lr=_rate(lr)),
        rest=adamw(adam_lr, b1, b2, decay=adam_decay, mask=adam_mask, clip=clip, moments_dtype=moments_dtype),
    )
