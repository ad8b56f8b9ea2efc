"""Dropout whose mask is a function of a key and of global indices, so that it is the same on any split of the work."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from fnlm.random import GRAIN, KEEP_MASK, Device, Index, Schedule, encrypt, pack, schedule, traced
from fnlm.types import Key

LANES = 8  # 16-bit decisions in one counter


def dropout(x: Tensor, p: float, key: Key | None, offset: Sequence[Index] | None = None) -> Tensor:
    """Zero elements of x with probability p, divide the others by 1 - p (Srivastava et al. 2014); no key: x itself.

    `key` (2,) for all of x, or (B, 2), one per first index; see `keep_mask`.
    """
    drop = _drop(p)
    if key is None or not drop:
        return x
    # The scale is not in the mask: bfloat16 would round it (1.109 for 1.111).
    return x * _kept(key, drop, x.shape, offset, x.dtype, x.device) * (2**16 / (2**16 - drop))


def keep_mask(
    key: Key,
    p: float,
    shape: Sequence[int],
    offset: Sequence[Index] | None = None,
    dtype: torch.dtype = torch.float32,
    device: Device = None,
) -> Tensor:
    """The dropout mask: 0 with probability p and otherwise 1 / (1 - p), to be multiplied with activations.

    Up to four dims, such as (sample, position, feature) or (sample, head, query, key). An element is decided by its
    global index (offset + local index; ints or 0-d tensors) alone, so that ranks that hold any parts of the batch, the
    sequence, the heads or the features together hold one mask, without knowing the global shape. With keys (B, 2) the
    first dim is that of the keys, each row is drawn from its own, and `offset` has one entry less.
    A decision takes 16 bits: p is rounded to a multiple of 2**-16, and the scale is that of the rounded p, so that the
    mean of the mask is 1. With dtype torch.bool the mask is not scaled. p = 0 gives ones. ValueError unless
    0 <= p < 1, and for more than four dims. Indices must stay below 2**32, and the first of four below 2**28.
    """
    drop = _drop(p)
    if drop == 0:
        return torch.ones(*shape, dtype=dtype, device=device or key.device)
    kept = _kept(key, drop, shape, offset, dtype, device)
    return kept if dtype == torch.bool else kept * (2**16 / (2**16 - drop))


def _drop(p: float) -> int:
    """p as a number of 65536ths."""
    if not 0.0 <= p < 1.0:
        raise ValueError(f"dropout p={p} must be at least 0 and less than 1")
    return min(round(p * 2**16), 2**16 - 1)


def _kept(
    key: Key, drop: int, shape: Sequence[int], offset: Sequence[Index] | None, dtype: torch.dtype, device: Device
) -> Tensor:
    """1 where an element is kept and 0 elsewhere, in `dtype`."""
    own = key.ndim - 1  # leading dims that the keys themselves stand for
    inner = shape[own:]
    if not 1 <= len(inner) <= 4 or len(offset or inner) != len(inner):
        raise ValueError(f"shape {tuple(shape)} must have 1 to 4 dims, and offset {offset} as many")
    if own and key.shape[0] != shape[0]:
        raise ValueError(f"{key.shape[0]} keys do not fit the first dimension of {tuple(shape)}; give one per sample")
    start, cut = tuple(offset or [0] * len(inner)), drop - 2**15
    keys = [(k.reshape(-1, *[1] * len(inner)), j.reshape(-1, *[1] * len(inner))) if own else (k, j)
            for k, j in schedule(key, device)]  # fmt: skip
    if traced(key, *start) or keys[0][0].device.type != "cpu":
        return (_lanes(keys, inner, start) >= cut).to(dtype)
    out = torch.empty(*shape, dtype=dtype)
    for samples in _sample_blocks(out) if own else (slice(None),):
        mine = [(k[samples], j[samples]) for k, j in keys] if own else keys
        for part, begin in _blocks(out[samples], start, own):
            torch.ge(_lanes(mine, part.shape[own:], begin), cut, out=part)  # writes 0 and 1 of the mask's own dtype
    return out


def _sample_blocks(out: Tensor) -> Iterator[slice]:
    """Samples at a time, at most a grain per thread, at least one."""
    size = max(1, GRAIN * LANES * torch.get_num_threads() // max(1, out[0].numel()))
    return (slice(i, i + size) for i in range(0, out.shape[0], size))


def _blocks(out: Tensor, start: tuple[Index, ...], own: int) -> Iterator[tuple[Tensor, tuple[Index, ...]]]:
    """Views of `out` that cover it, each at most a grain per thread, with the global index of their first element."""
    dim = next((d for d, size in enumerate(out.shape[:-1]) if size > 1 and d >= own), None)
    if dim is None or out.numel() <= GRAIN * LANES * torch.get_num_threads():
        yield out, start
        return
    upper, lower = out.tensor_split(2, dim)
    yield from _blocks(upper, start, own)
    at = dim - own
    yield from _blocks(lower, (*start[:at], start[at] + upper.shape[dim], *start[at + 1 :]), own)


def _lanes(keys: Schedule, shape: Sequence[int], start: Sequence[Index]) -> Tensor:
    """Uniform int16 numbers at global indices: dims, from the last, are counter words; 8 columns share a counter."""
    device, columns, column = keys[0][0].device, shape[-1], start[-1]
    skip = column % LANES
    reach = columns + (LANES - 1 if isinstance(skip, Tensor) else skip)
    sizes, firsts = [*shape[:-1], -(-reach // LANES)], [*start[:-1], column // LANES]
    index = [
        (torch.arange(size, device=device) + first).reshape(-1, *[1] * (len(sizes) - 1 - d))
        for d, (size, first) in enumerate(zip(sizes, firsts, strict=True))
    ]
    zero = torch.zeros((), dtype=torch.int64, device=device)
    x0, x1, x2, x3 = [*reversed(index), zero, zero, zero][:4]
    lanes = pack(encrypt(keys, (x0, x1, x2, x3 + KEEP_MASK))).view(torch.int16).flatten(-2)
    if isinstance(skip, Tensor):
        return lanes[..., torch.arange(columns, device=device) + skip.to(device)]
    return lanes[..., skip : skip + columns]
