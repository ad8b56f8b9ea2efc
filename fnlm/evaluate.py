"""How well a model predicts a text: the mean loss over every token of a split, each counted once."""

from __future__ import annotations

import math
from collections.abc import Callable
from time import perf_counter
from typing import Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fnlm.config import Compute, ModelConfig
from fnlm.data import DataError, Split
from fnlm.forward import head_weight, hidden, unembed
from fnlm.losses import chunk_rows
from fnlm.types import Batch, Params

Tokens = NDArray[np.int64]

BATCH_TOKENS, GPU_BATCH_TOKENS = 1 << 12, 1 << 15
"""Tokens in a batch: what one layer needs for them lives at once, a few KiB a token; more gain nothing."""


class Evaluation(NamedTuple):
    """What `evaluate` found: `loss` in nats per counted token, `perplexity` = exp(loss), and `seconds` of wall clock.

    `tokens` are the targets that were counted. `complete` is False where `stop` ended it early: the figures are then of
    what was seen, and `loss` is NaN where that is nothing.
    """

    loss: float
    perplexity: float
    bits_per_byte: float | None
    tokens: int
    seconds: float
    complete: bool = True


@torch.no_grad()
def evaluate(
    params: Params,
    cfg: ModelConfig,
    split: Split,
    *,
    batch_size: int | None = None,
    seq_len: int | None = None,
    stride: int | None = None,
    precision: Literal["fp32", "bf16"] = "fp32",
    limit: int | None = None,
    stop: Callable[[], bool] = lambda: False,
    compute: Compute = Compute(),
    nats_of: Callable[[Params, Batch], Tensor] | None = None,
) -> Evaluation:
    """The mean loss over all targets of a split; of chat data over the learnt ones. `params` are not changed.

    Windows of `seq_len` (the model's by default) lie side by side; with `stride` they overlap and a token is counted
    in the first that holds it, with at least seq_len - stride tokens before it but in the first window. `limit`: that
    many windows, spread evenly, the same every time. `stop` is asked before each batch. `nats_of`: what computes the
    summed loss of a batch in place of `nats`, where several ranks do.

    Sums are in float64. Bits per byte are the loss in bits times the split's tokens for each byte of its text: the
    tokens include each document's end, the bytes (UTF-8) are those of the text alone. None for chat data and where
    the bytes are not known.
    Raises DataError where nothing is to be counted or an id is outside the model's vocabulary, ValueError for sizes.
    """
    seq_len = cfg.seq_len if seq_len is None else seq_len
    stride = seq_len if stride is None else stride
    _check(cfg, split, seq_len, stride, limit)
    starts = chosen(window_starts(len(split.tokens), seq_len, stride), limit)
    device = next(iter(params.values())).device
    rows = batch_size or max(1, (BATCH_TOKENS if device.type == "cpu" else GPU_BATCH_TOKENS) // seq_len)
    params = in_precision(params, precision)
    began, total, count, at = perf_counter(), torch.zeros((), dtype=torch.float64, device=device), 0, 0
    while at < len(starts) and not stop():
        batch = batch_of(split, starts[at : at + rows], seq_len, stride, cfg.vocab_size)
        count += int(batch.weights.sum(dtype=torch.float64))
        here = Batch(*(x.to(device) for x in batch))
        total += nats(params, here, cfg, compute) if nats_of is None else nats_of(params, here)
        at += rows
    loss = float(total) / count if count else math.nan
    if at >= len(starts) and not count:
        raise DataError(f"none of the {len(split.tokens)} tokens is learnt; evaluate more windows, or other data")
    return Evaluation(
        loss, _exp(loss), bits_per_byte(loss, split), count, perf_counter() - began, complete=at >= len(starts)
    )


def in_precision(params: Params, precision: Literal["fp32", "bf16"]) -> Params:
    """The parameters to compute with; float64 ones stay, so that a test may be exact."""
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    return {k: p if p.dtype == torch.float64 else p.to(dtype) for k, p in params.items()}


def bits_per_byte(nats_per_token: float, split: Split) -> float | None:
    """The loss for each byte of the split's text, in bits; None for chat data, of which only a part is counted."""
    if split.mask is not None or not split.bytes:
        return None
    return nats_per_token * len(split.tokens) / split.bytes / math.log(2)


def window_starts(tokens: int, seq_len: int, stride: int) -> Tokens:
    """The first token of every window: they come each `stride`, until the last target is in one."""
    targets = tokens - 1
    return stride * np.arange(1 + max(0, -(-(targets - seq_len) // stride)))


def chosen(starts: Tokens, limit: int | None) -> Tokens:
    """`limit` of the windows, the middle ones of as many equal parts."""
    if limit is None or limit >= len(starts):
        return starts
    return starts[(2 * np.arange(limit) + 1) * len(starts) // (2 * limit)]


def batch_of(split: Split, starts: Tokens, seq_len: int, stride: int, vocab_size: int) -> Batch:
    """The windows (B, T) at `starts`; a target weighs what the mask says where it is counted in this window, else 0."""
    last = len(split.tokens) - 1
    index = starts[:, None] + np.arange(seq_len + 1)
    tokens = split.tokens[np.minimum(index, last)].astype(np.int64)
    if int(tokens.max()) >= vocab_size:
        raise DataError(f"the data hold token {tokens.max()}, the model has vocab_size={vocab_size}; they do not match")
    first = np.where(starts == 0, 0, seq_len - stride)[:, None]  # what comes before was counted in the window before
    weights = ((index[:, 1:] <= last) & (np.arange(seq_len) >= first)).astype(np.float32)
    if split.mask is not None:
        weights *= split.mask[np.minimum(index[:, 1:], last)]
    return Batch(*(torch.from_numpy(x) for x in (tokens[:, :-1], tokens[:, 1:], weights)))


def nats(params: Params, batch: Batch, cfg: ModelConfig, compute: Compute = Compute()) -> Tensor:
    """The summed loss of a batch's weighted targets, 0-d float64.

    As the fused loss, without its gradients: logits of a few rows at a time, and none where nothing is counted.
    """
    x, root = hidden(params, batch.tokens, cfg, compute=compute)
    weight, counted = head_weight(root, cfg), batch.weights > 0
    x, targets, weights = x[counted], batch.targets[counted], batch.weights[counted].double()
    total = torch.zeros((), dtype=torch.float64, device=x.device)
    step = chunk_rows(max(1, len(x)), weight.shape[0] * weight.element_size(), compute.loss_chunks)
    for at in range(0, len(x), step):
        part = slice(at, at + step)
        total += (_nll(unembed(x[part], weight, cfg), targets[part]).double() * weights[part]).sum()
    return total


def _nll(logits: Tensor, targets: Tensor) -> Tensor:
    logits = logits if logits.dtype == torch.float64 else logits.float()
    return torch.nn.functional.cross_entropy(logits, targets, reduction="none")


def _check(cfg: ModelConfig, split: Split, seq_len: int, stride: int, limit: int | None) -> None:
    if not 1 <= seq_len <= cfg.seq_len:
        raise ValueError(f"seq_len={seq_len} is not from 1 to the model's seq_len={cfg.seq_len}; choose one that is")
    if not 1 <= stride <= seq_len:
        raise ValueError(f"stride={stride} is not from 1 to seq_len={seq_len}; a longer one would leave tokens out")
    if limit is not None and limit < 1:
        raise ValueError(f"limit={limit} windows must be at least 1")
    if len(split.tokens) < 2:
        raise DataError(f"a split of {len(split.tokens)} tokens has nothing to predict; it needs at least 2")


def _exp(loss: float) -> float:
    return math.exp(loss) if loss < 700 else math.inf if loss == loss else loss
