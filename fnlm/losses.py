"""Cross-entropy two ways that agree: plain, for transforms, and fused with the head, without a (B, T, V) tensor."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fnlm.collectives import LOCAL, Axes, pmax, psum
from fnlm.compiling import compiled
from fnlm.config import Compute, ModelConfig
from fnlm.embedding import first_row
from fnlm.forward import Use, head_weight, hidden, identity, shape_logits, unembed
from fnlm.kernels import needs_plain, once_differentiable
from fnlm.types import Batch, Key, Params

MIN_CHUNK = 256  # rows: each chunk reads and adds the whole dW (V, D) once more; fewer rows cost more than they save
CHUNK_BYTES = 32 << 20  # of logits alive at once
CACHE_BYTES = 4 << 20  # of their float32 copy


def lm_loss(
    params: Params,
    batch: Batch,
    cfg: ModelConfig,
    *,
    key: Key | None = None,
    use: Use = identity,
    axes: Axes = LOCAL,
    compute: Compute = Compute(),
) -> Tensor:
    """The mean cross-entropy of a batch in nats per weighted token, 0-d float32 (float64 for float64 parameters).

    Fused with the head; plain operations under torch.func transforms and on a split vocabulary. Twice differentiable
    under torch.func; torch.autograd with create_graph=True needs Compute(kernels="plain"): fused kernels refuse it.
    """
    x, root = hidden(params, batch.tokens, cfg, key=key, use=use, axes=axes, compute=compute)
    weight = head_weight(root, cfg)
    if compute.kernels == "plain" or axes.tensor is not None or needs_plain():
        return cross_entropy(
            unembed(x, weight, cfg), batch.targets, batch.weights, axes=axes, vocab_size=cfg.vocab_size
        )
    return fused_cross_entropy(x, weight, batch.targets, batch.weights, cfg, compute.loss_chunks)


def make_lm_loss(cfg: ModelConfig, compute: Compute = Compute(), axes: Axes = LOCAL) -> Callable[..., Tensor]:
    """`lm_loss` in the form `make_step` takes: loss(params, batch, key, use) -> 0-d tensor."""

    def loss(params: Params, batch: Batch, key: Key | None = None, use: Use = identity) -> Tensor:
        return lm_loss(params, batch, cfg, key=key, use=use, axes=axes, compute=compute)

    return compiled(loss) if compute.compile == "step" else loss


def cross_entropy(
    logits: Tensor,
    targets: Tensor,
    weights: Tensor | None = None,
    *,
    axes: Axes = LOCAL,
    vocab_size: int | None = None,
) -> Tensor:
    """-sum(w log p(target)) / sum(w), in nats: logits (..., V), targets and weights (...); all weights 0 gives 0.

    Computed in float32 at least. `axes.tensor` set: logits are this rank's part of `vocab_size` columns.
    """
    logits = logits if logits.dtype == torch.float64 else logits.float()
    if axes.tensor is None:
        nll = F.cross_entropy(logits.flatten(0, -2), targets.flatten(), reduction="none")
    else:
        nll = _split_nll(logits, targets, axes, vocab_size or logits.shape[-1] * axes.tensor.size).flatten()
    if weights is None:
        return nll.mean()
    w = weights.flatten().to(nll.dtype)
    return (nll * w).sum() / _total(w)


def _split_nll(logits: Tensor, targets: Tensor, axes: Axes, vocab_size: int) -> Tensor:
    """-log p(target) where each rank of the tensor axis holds some columns (Shoeybi et al. 2019, 3)."""
    if not logits.shape[-1]:  # no columns here: one that is never chosen stands in
        logits = torch.cat([logits, logits.new_full((*logits.shape[:-1], 1), -torch.inf)], -1)
    mine = targets - first_row(vocab_size, axes)
    here = (mine >= 0) & (mine < logits.shape[-1])
    top = pmax(logits.amax(-1), axes.tensor)
    total = psum((logits - top[..., None]).exp().sum(-1), axes.tensor)
    chosen = logits.gather(-1, mine.where(here, 0)[..., None])[..., 0]
    hit = psum(chosen.where(here, 0), axes.tensor)
    return total.log() + top - hit


def _total(weights: Tensor) -> Tensor:
    total = weights.sum()
    return torch.where(total > 0, total, 1)


def fused_cross_entropy(
    x: Tensor, weight: Tensor, targets: Tensor, weights: Tensor, cfg: ModelConfig, chunks: int | None = None
) -> Tensor:
    """`cross_entropy(unembed(x, weight, cfg), ...)` with both gradients computed in the forward, chunk by chunk.

    x (B, T, D), weight (V, D). Memory: one chunk of logits, and the gradients of x and weight.
    """
    rows = x.flatten(0, -2)
    w = weights.flatten()
    w = w.to(torch.float64 if x.dtype == torch.float64 else torch.float32)
    loss: Tensor = _FusedCrossEntropy.apply(rows, weight, targets.flatten(), w / _total(w), cfg, chunks)  # type: ignore[no-untyped-call]
    return loss


def chunk_rows(n: int, row_bytes: int, chunks: int | None) -> int:
    """How many rows of logits to hold at once."""
    if chunks is not None:
        return -(-n // chunks)
    return min(n, max(MIN_CHUNK, CHUNK_BYTES // row_bytes))


class _FusedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, weight: Tensor, targets: Tensor, shares: Tensor, cfg: ModelConfig, chunks: int | None
    ) -> Tensor:
        """`shares` sum to 1 (or are all 0): the loss is their weighted sum."""
        ctx.save_for_backward(rows, weight, targets, shares)
        ctx.cfg, ctx.chunks = cfg, chunks
        loss, *ctx.ready = _loss_and_grads(rows, weight, targets, shares, cfg, chunks, ctx.needs_input_grad[1])
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        # Given away, as a copy of d_weight is the size of the embedding; a graph that was kept computes them again.
        ready, ctx.ready = ctx.ready, None
        rows, weight, targets, shares = ctx.saved_tensors
        if ready is None:
            wanted = ctx.needs_input_grad[1]
            ready = _loss_and_grads(rows, weight, targets, shares, ctx.cfg, ctx.chunks, wanted)[1:]
        d_rows, d_weight, boost = ready
        factor = g / boost
        if factor.device.type != "cpu" or factor != 1:  # on a CPU looking is free, and a pass over d_weight is not
            d_rows, d_weight = d_rows.mul_(factor), None if d_weight is None else d_weight.mul_(factor)
        return d_rows, None if d_weight is None else d_weight.to(weight.dtype), None, None, None, None


def _loss_and_grads(
    rows: Tensor, weight: Tensor, targets: Tensor, shares: Tensor, cfg: ModelConfig, chunks: int | None, both: bool
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """The loss, and the gradients of rows and, where `both` are wanted, weight times `boost`.

    In float16 a share of 1e-6 would underflow before any loss scale met it: there boost makes the largest share 1, and
    the sum over rows is kept in float32.
    """
    half = rows.dtype == torch.float16
    top = shares.max()
    boost = torch.where(top > 0, 1 / top, 1) if half else torch.ones_like(top)
    boosted = shares * boost
    loss = shares.new_zeros(())
    d_rows = torch.empty_like(rows)
    d_weight = torch.empty_like(weight, dtype=torch.float32 if half else weight.dtype) if both else None
    step = chunk_rows(rows.shape[0], weight.shape[0] * weight.element_size(), chunks)
    for lo in range(0, rows.shape[0], step):
        part = slice(lo, lo + step)
        d_logits = rows[part] @ weight.T  # logits, until the next line puts their gradient in their place
        loss += _nll_into_grad_(d_logits, targets[part], boosted[part], cfg)
        torch.mm(d_logits, weight, out=d_rows[part])
        if d_weight is None:
            continue
        if half:
            d_weight.copy_(d_logits.T @ rows[part]) if lo == 0 else d_weight.add_(d_logits.T @ rows[part])
        elif lo == 0:
            torch.mm(d_logits.T, rows[part], out=d_weight)
        else:
            d_weight.addmm_(d_logits.T, rows[part])
    return loss / boost, d_rows, d_weight, boost


def _nll_into_grad_(raw: Tensor, targets: Tensor, shares: Tensor, cfg: ModelConfig) -> Tensor:
    """The chunk's share of the loss; its gradient takes the place of the raw logits (n, V).

    A few rows at a time on a CPU: their float32 copy then never leaves the cache, which is a tenth of the whole loss.
    """
    rows = max(1, CACHE_BYTES // (4 * raw.shape[1])) if raw.device.type == "cpu" else raw.shape[0]
    loss = shares.new_zeros(())
    for lo in range(0, raw.shape[0], rows):
        part = slice(lo, lo + rows)
        at, share = targets[part, None], shares[part, None]
        logits = shape_logits(raw[part], cfg) if _shaped(cfg) else raw[part]
        probs = torch.softmax(logits, -1, dtype=shares.dtype)
        # log(sum exp) from what softmax already has: the largest probability is exp(top - lse), at least 1/V.
        lse = logits.amax(-1, keepdim=True).to(shares.dtype) - probs.amax(-1, keepdim=True).log()
        loss += ((lse - logits.gather(1, at).to(shares.dtype)) * share).sum()
        probs.scatter_add_(1, at, probs.new_full((len(at), 1), -1.0)).mul_(share)
        if cfg.logit_softcap is not None:
            probs.mul_(1 - (logits / cfg.logit_softcap).square_())
        raw[part] = probs.mul_(cfg.mup_base / cfg.d_model) if cfg.init == "mup" else probs
    return loss


def _shaped(cfg: ModelConfig) -> bool:
    return cfg.init == "mup" or cfg.logit_softcap is not None
