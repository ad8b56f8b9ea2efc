"""Causal self-attention and its gradient by a C library, between two products of a block; with a cache too."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fnlm.clib.build import library
from fnlm.clib.rows import NORMS

WIDEST = 256  # K at most
_POINTERS = ("qkv", "g", "y", "d_qkv", "tops", "cos", "sin", "first", "cached_k", "cached_v", "past", "counts")
_SIZES = ("b", "t", "heads", "kv_heads", "k", "rope", "norm", "window", "bf16")
_CACHED = ("by_row", "by_head", "by_position", "longest", "last")


class How(NamedTuple):
    """What attention does to the joined projection (B, T, (H + 2 H_kv) K), q before k before v.

    `norm` without weights on queries and keys ("none", "layernorm", "rmsnorm"); cos and signed sin (T, R) float32;
    `first` (B, T) int64, the first key that each query sees (None: 0); `window` keys at most (0: all).
    """

    heads: int
    kv_heads: int
    k: int
    scale: float
    norm: str
    eps: float
    rotation: tuple[Tensor, Tensor] | None
    first: Tensor | None
    window: int


class _Attention(ctypes.Structure):
    _fields_ = [
        *[(name, ctypes.c_void_p) for name in _POINTERS],
        *[(name, ctypes.c_int64) for name in (*_SIZES, *_CACHED)],
        ("scale", ctypes.c_double),
        ("eps", ctypes.c_double),
    ]


def can_attend(qkv: Tensor, k: int) -> bool:
    """Whether the library is there and takes such rows, of heads so wide: float32 or bfloat16 on a CPU.

    Or on the meta device, where nothing is computed and all is as large as on a CPU.
    """
    known = (qkv.is_cpu or qkv.is_meta) and qkv.dtype in (torch.float32, torch.bfloat16) and k <= WIDEST
    return known and library("attend").library is not None


def attend(qkv: Tensor, how: How) -> tuple[Tensor, Tensor]:
    """softmax(q k^T scale) v over the keys seen, (B, T, H K); each row's largest score and 1 / sum, (B, H, T, 2)."""
    b, t, _ = qkv.shape
    y = qkv.new_empty(b, t, how.heads * how.k)
    tops = qkv.new_empty(b, how.heads, t, 2, dtype=torch.float32)
    _call(qkv.contiguous(), how, y, tops, None, None)
    return y, tops


def attend_backward(g: Tensor, qkv: Tensor, y: Tensor, tops: Tensor, how: How) -> Tensor:
    """The gradient of the projection from that of y: Dao et al. 2022, algorithm 4."""
    d_qkv = torch.empty_like(qkv, memory_format=torch.contiguous_format)
    _call(qkv.contiguous(), how, y, tops, g.contiguous(), d_qkv)
    return d_qkv


def attend_cached(
    qkv: Tensor, k: Tensor, v: Tensor, past: Sequence[int], counts: Sequence[int], how: How, last: bool = False
) -> Tensor:
    """`attend` of T new tokens of each text, counts[b] of them meant, behind past[b] others: (B, T, H K).

    k and v (B, H_kv, S, K), alike in memory and of qkv's type, are written and read; `how.rotation` has S rows. Of `y`
    only what is meant says anything; with `last` only each text's last token.
    """
    y, numbers = qkv.new_empty(*qkv.shape[:2], how.heads * how.k), ctypes.c_int64 * len(past)
    longest = max(p + n for p, n in zip(past, counts, strict=True))
    cache = (k.data_ptr(), v.data_ptr(), numbers(*past), numbers(*counts))
    _call(qkv.contiguous(), how, y, None, None, None, cache, (*k.stride()[:3], longest, int(last)))
    return y


def can_cache(qkv: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether `attend_cached` takes this cache for such rows."""
    alike = k.stride() == v.stride() and k.stride(-1) == 1
    return alike and k.dtype == v.dtype == qkv.dtype and k.device.type == v.device.type == "cpu"


def _call(
    qkv: Tensor,
    how: How,
    y: Tensor,
    tops: Tensor | None,
    g: Tensor | None,
    d_qkv: Tensor | None,
    cache: tuple[Any, ...] = (None, None, None, None),
    cached: tuple[int, ...] = (),
) -> None:
    lib = library("attend").library
    assert lib is not None
    if qkv.is_meta:
        return
    cos, sin = how.rotation or (None, None)
    places = [None if x is None else x.data_ptr() for x in (qkv, g, y, d_qkv, tops, cos, sin, how.first)]
    places += [x if x is None or isinstance(x, int) else ctypes.cast(x, ctypes.c_void_p).value for x in cache]
    b, t, _ = qkv.shape
    sizes = (b, t, how.heads, how.kv_heads, how.k, 0 if cos is None else cos.shape[-1], NORMS[how.norm], how.window)
    more = cached or (0, 0, 0, t, 0)
    job = _Attention(*places, *sizes, qkv.dtype == torch.bfloat16, *more, how.scale, how.eps)
    if lib.fnlm_attend(ctypes.byref(job), ctypes.c_int64(torch.get_num_threads())):
        raise MemoryError(f"attention over {more[3]} positions needs more memory than there is")
