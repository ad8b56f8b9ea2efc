"""Batches as a pure function of (key, step): every window of the text once an epoch, in an order that needs no memory.

Samples are numbered through all epochs; a batch is a range of numbers, so that any batch size, also one that changes on
the way (`Sizes`), any split of a batch over ranks and any resumed run meet the same windows in the same order.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fnlm import random
from fnlm.data.manifest import DataError, Split
from fnlm.data.prefetch import prefetch
from fnlm.data.sizes import Sizes, sizes_of
from fnlm.types import Batch, Key

TOGETHER = 64
"""Steps whose windows are looked up at once: a lookup takes 2 ms, however many they are."""


def window_count(split: Split, seq_len: int) -> int:
    """The windows of an epoch. Raises DataError where the text is shorter than one."""
    n = len(split.tokens)
    if n < seq_len + 1:
        raise DataError(f"seq_len={seq_len} needs {seq_len + 1} tokens, there are {n}; choose a shorter one")
    return max(1, (n - seq_len) // seq_len)


def sample_ids(split: Split, seq_len: int, batch_size: int | Sizes, key: Key, step: int) -> Tensor:
    """The numbers (B,) int64 of a batch's windows within their epoch; for logs."""
    return _windows_of(split, seq_len, key, _samples(batch_size, step))[0]


def window_starts(split: Split, seq_len: int, batch_size: int | Sizes, key: Key, step: int, steps: int = 1) -> Tensor:
    """The first token (B,) int64 of each of a batch's windows; of the windows of several `steps`, one after another."""
    numbers, offsets = _windows_of(split, seq_len, key, _samples(batch_size, step, steps))
    return offsets + numbers * seq_len


def _samples(batch_size: int | Sizes, step: int, steps: int = 1) -> Tensor:
    if step < 0:
        raise ValueError(f"step={step} must be at least 0")
    sizes = sizes_of(batch_size)
    return torch.arange(sizes.first(step), sizes.first(step + steps))


def _windows_of(split: Split, seq_len: int, key: Key, samples: Tensor) -> tuple[Tensor, Tensor]:
    """The window numbers of consecutive samples, and their epochs' offsets."""
    count = window_count(split, seq_len)
    # An epoch leaves out fewer than two windows' tokens at the two ends; another offset, and they are met.
    spare = len(split.tokens) - 1 - count * seq_len
    numbers, offsets = torch.empty_like(samples), torch.empty_like(samples)
    for epoch in range(int(samples[0]) // count, int(samples[-1]) // count + 1):
        here, own = samples // count == epoch, random.fold_in(key, epoch)
        numbers[here] = random.shuffled_index(random.fold_in(own, 0), count, samples[here] % count)
        # A key is 64 random bits: the remainder favours no offset by more than spare / 2**64.
        low, high = random.fold_in(own, 1).tolist()
        offsets[here] = (low + (high << 32)) % (spare + 1)
    return numbers, offsets


def batch_at(
    split: Split, seq_len: int, batch_size: int | Sizes, key: Key, step: int, rows: range | slice | None = None
) -> Batch:
    """The batch of a step: (B, T) tokens, the next tokens as targets, and weights: the mask, or ones.

    An epoch has `window_count` windows of seq_len + 1 tokens, side by side from an offset of its own; each comes once.
    `rows` takes some rows of the batch, as a rank does. Raises DataError for an id outside the vocabulary.
    """
    return _at(split, seq_len, window_starts(split, seq_len, batch_size, key, step), rows)


def batches(
    split: Split,
    seq_len: int,
    batch_size: int | Sizes,
    key: Key,
    start: int = 0,
    stop: int | None = None,
    rows: range | slice | None = None,
    depth: int = 16,
) -> Generator[Batch, None, None]:
    """`batch_at` of the steps from `start` on, made ahead in a thread; a tenth of its time, as orders are shared.

    Where the batch size changes, `slice(rank, None, ranks)` as `rows` gives every rank its part of each batch.
    """
    known: dict[int, Tensor] = {}
    sizes = sizes_of(batch_size)

    def make(step: int) -> Batch:
        first = step - step % TOGETHER
        if first not in known:
            known.clear()
            known[first] = window_starts(split, seq_len, sizes, key, first, TOGETHER)
        at = sizes.first(step) - sizes.first(first)
        return _at(split, seq_len, known[first][at : at + sizes.at(step)], rows)

    return prefetch(make, start, stop, depth)


def _at(split: Split, seq_len: int, starts: Tensor, rows: range | slice | None) -> Batch:
    chosen = starts if rows is None else starts[rows.start : rows.stop : rows.step]
    return _batch(split, chosen.numpy()[:, None] + np.arange(seq_len + 1), None)


def windows(split: Split, seq_len: int, batch_size: int) -> Iterator[Batch]:
    """Every token as a target exactly once, in order, in batches of one shape; what is too much weighs 0."""
    targets = max(0, len(split.tokens) - 1)
    for first in range(0, targets, seq_len * batch_size):
        starts = first + seq_len * np.arange(batch_size)
        index = starts[:, None] + np.arange(seq_len + 1)
        yield _batch(split, np.minimum(index, targets), index[:, 1:] <= targets)


def _batch(split: Split, index: NDArray[np.int64], counts: NDArray[np.bool_] | None) -> Batch:
    """The windows at `index` (B, T + 1); targets whose `counts` (B, T) is False weigh 0."""
    tokens = torch.from_numpy(_checked(split, index).astype(np.int64))
    weights = np.ones(index[:, 1:].shape, np.float32) if split.mask is None else split.mask[index[:, 1:]]
    if counts is not None:
        weights = weights * counts
    return Batch(tokens[:, :-1], tokens[:, 1:], torch.from_numpy(weights.astype(np.float32)))


def _checked(split: Split, index: NDArray[np.int64]) -> NDArray[Any]:
    """The tokens at `index`. A wrong id would end in a device-side assertion, or in another word's embedding."""
    tokens = split.tokens[index]
    if split.vocab_size is not None and tokens.size and int(tokens.max()) >= split.vocab_size:
        at = int(index.reshape(-1)[int(tokens.argmax())])
        raise DataError(f"token {at} is {tokens.max()}, vocab_size is {split.vocab_size}; see 'fnlm prepare --verify'")
    return tokens
