"""Norms and activations of a training step, and their gradients, by a C library: one pass each."""

from __future__ import annotations

import ctypes
from functools import cache

import torch
from torch import Tensor

from fnlm.clib.build import library

NORMS = {"none": 0, "layernorm": 1, "rmsnorm": 2}
ACTIVATIONS = {"gelu": 0, "gelu-tanh": 1, "relu": 2, "relu2": 3, "swiglu": 4}


class _Norm(ctypes.Structure):
    _fields_ = [
        *[
            (k, ctypes.c_void_p)
            for k in ("x", "weight", "bias", "g", "more", "y", "d_x", "stats", "d_weight", "d_bias")
        ],
        *[(k, ctypes.c_int64) for k in ("rows", "n", "kind", "bf16")],
        ("eps", ctypes.c_double),
    ]


class _Activation(ctypes.Structure):
    _fields_ = [
        *[(k, ctypes.c_void_p) for k in ("a", "up", "g", "y", "d_a", "d_up")],
        *[(k, ctypes.c_int64) for k in ("n", "kind", "bf16")],
    ]


def has_rows(*tensors: Tensor | None) -> bool:
    """Whether the library takes these: of one type, float32 or bfloat16, on a CPU, rows of whole vectors, no gaps.

    Or on the meta device, where nothing is computed and all is as large as on a CPU.
    """
    there = [x for x in tensors if x is not None]
    kinds = {x.dtype for x in there}
    known = len(kinds) == 1 and kinds <= {torch.float32, torch.bfloat16}
    return known and all(map(_is_whole, there))


def normed(x: Tensor, weight: Tensor | None, bias: Tensor | None, kind: str, eps: float) -> tuple[Tensor, Tensor]:
    """LayerNorm or RMSNorm of rows (N, D), and each row's mean and 1 / deviation, (N, 2) float32."""
    y, stats = torch.empty_like(x), x.new_empty(len(x), 2, dtype=torch.float32)
    places = _addresses(x, weight, bias, None, None, y, None, stats, None, None)
    _call(x, "fnlm_norm", _Norm(*places, *x.shape, NORMS[kind], x.dtype == torch.bfloat16, eps))
    return y, stats


def norm_backward(
    g: Tensor, x: Tensor, stats: Tensor, weight: Tensor | None, bias: Tensor | None, kind: str, more: Tensor
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The gradients of x, with `more` (N, D) added, weight and bias from g, that of the norm; g becomes the first."""
    blocks = _library().fnlm_norm_blocks(ctypes.c_int64(len(x)))
    d_weight, d_bias = (None if w is None else w.new_empty(blocks, len(w), dtype=torch.float32) for w in (weight, bias))
    places = _addresses(x, weight, bias, g, more, None, g, stats, d_weight, d_bias)
    _call(x, "fnlm_norm", _Norm(*places, *x.shape, NORMS[kind], x.dtype == torch.bfloat16, 0.0))
    d_w, d_b = (None if d is None else d.sum(0).to(x.dtype) for d in (d_weight, d_bias))
    return g, d_w, d_b


def activated(kind: str, a: Tensor, up: Tensor | None = None) -> Tensor:
    """f(a), or silu(a) up for SwiGLU, elementwise."""
    y = torch.empty_like(a)
    _activate(kind, a, up, None, y, [])
    return y


def activated_with_factors(kind: str, a: Tensor, up: Tensor | None = None) -> tuple[Tensor, list[Tensor]]:
    """The activation, and what its gradient is to be multiplied by for those of a, and of `up` where there is one."""
    y, factors = torch.empty_like(a), _like(a, up)
    _activate(kind, a, up, None, y, factors)
    return y, factors


def activate_backward(kind: str, g: Tensor, a: Tensor, up: Tensor | None = None) -> tuple[Tensor, list[Tensor]]:
    """The activation again, and the gradients of a, and of `up` where there is one, from that of the activation."""
    y, grads = torch.empty_like(a), _like(a, up)
    _activate(kind, a, up, g, y, grads)
    return y, grads


def _like(a: Tensor, up: Tensor | None) -> list[Tensor]:
    return [torch.empty_like(x) for x in (a, up) if x is not None]


def _activate(kind: str, a: Tensor, up: Tensor | None, g: Tensor | None, y: Tensor, grads: list[Tensor]) -> None:
    d_a, d_up = [*grads, None, None][:2]
    places = _addresses(a, up, g, y, d_a, d_up)
    _call(a, "fnlm_activate", _Activation(*places, a.numel(), ACTIVATIONS[kind], a.dtype == torch.bfloat16))


def _library() -> ctypes.CDLL:
    lib = library("rows").library
    assert lib is not None
    return lib


@cache
def _lanes(lib: ctypes.CDLL | None) -> int:
    """How many elements make a whole vector; 0: there is no library."""
    return 0 if lib is None else int(lib.fnlm_lanes())


def _is_whole(x: Tensor) -> bool:
    lanes = _lanes(library("rows").library)
    return (x.is_cpu or x.is_meta) and lanes > 0 and x.shape[-1] % lanes == 0 and x.is_contiguous()


def _addresses(*tensors: Tensor | None) -> list[int | None]:
    return [None if x is None else x.data_ptr() for x in tensors]


def _call(like: Tensor, name: str, what: ctypes.Structure) -> None:
    if like.is_meta:
        return
    getattr(_library(), name)(ctypes.byref(what), ctypes.c_int64(torch.get_num_threads()))
