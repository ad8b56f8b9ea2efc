"""AdamW and the norm of gradients by a C library, over lists of tensors."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from fnlm.clib.build import library

_NAMES = ("rate", "b1", "b2", "eps", "decay", "correct1", "correct2", "divisor")


class _Settings(ctypes.Structure):
    _fields_ = [(name, ctypes.c_double) for name in _NAMES]


def adamw_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    mus: Sequence[Tensor],
    nus: Sequence[Tensor],
    *,
    rate: float,
    b1: float,
    b2: float,
    eps: float,
    decay: float,
    count: int,
    divisor: float = 1.0,
) -> bool:
    """One step of AdamW on donated tensors, the gradients divided by `divisor`; False: not for these, nothing was done.

    For float32 parameters on a CPU with gradients, and moments, all in float32 or all in bfloat16, each laid out as its
    parameter. `count` is 1 at the first step. Loshchilov & Hutter 2019, algorithm 2, without its schedule.
    """
    groups = [params, grads, mus, nus]
    lib = library("adam").library
    if lib is None or _is_traced(*groups) or not all(map(_alike, *groups)):
        return False
    kinds = {p.dtype for p in params}, {g.dtype for g in grads}, {m.dtype for m in [*mus, *nus]}
    if kinds[0] != {torch.float32} or not (_is_known(kinds[1]) and _is_known(kinds[2])):
        return False
    by = _Settings(rate, b1, b2, eps, decay, 1 - b1**count, 1 - b2**count, divisor)
    flags = [ctypes.c_int64(kind == {torch.bfloat16}) for kind in kinds[1:]]
    lib.fnlm_adamw(_leaves(*groups), ctypes.c_int64(len(params)), *flags, ctypes.byref(by), _threads())
    return True


def square_sum(tensors: Sequence[Tensor]) -> float | None:
    """The sum of the squares of all elements, within 1e-6 of itself; None where they are not for the library.

    For tensors without gaps on a CPU, all in float32 or all in bfloat16.
    """
    lib = library("adam").library
    if lib is None or not _is_known({t.dtype for t in tensors}) or _is_traced(tensors):
        return None
    if not all(map(_is_dense, tensors)):
        return None
    bf16 = ctypes.c_int64(tensors[0].dtype == torch.bfloat16)
    lib.fnlm_square_sum.restype = ctypes.c_double
    total = float(lib.fnlm_square_sum(_leaves(tensors, tensors), ctypes.c_int64(len(tensors)), bf16, _threads()))
    return None if total < 0 else total


def _is_traced(*groups: Sequence[Tensor]) -> bool:
    """Whether these have no memory of their own: all of a list do or none."""
    return any(torch._C._functorch.is_functorch_wrapped_tensor(group[0]) for group in groups if group)


def _is_known(kinds: set[torch.dtype]) -> bool:
    return len(kinds) == 1 and kinds <= {torch.float32, torch.bfloat16}


def _alike(p: Tensor, g: Tensor, m: Tensor, v: Tensor) -> bool:
    return p.stride() == g.stride() == m.stride() == v.stride() and g.is_cpu and m.is_cpu and v.is_cpu and _is_dense(p)


def _is_dense(t: Tensor) -> bool:
    """Whether its elements are all there is between its first and its last, on a CPU."""
    return t.is_cpu and (t.is_contiguous() or bool(torch.ops.aten.is_non_overlapping_and_dense(t)))


def _leaves(*groups: Sequence[Tensor]) -> ctypes.Array[ctypes.c_int64]:
    """`leaf` of adam.c for each place in the lists: four addresses and a size, one after the other."""
    columns = [[t.data_ptr() for t in group] for group in groups]
    columns += [[0] * len(groups[0])] * (4 - len(columns))
    flat = [x for row in zip(*columns, [t.numel() for t in groups[0]], strict=True) for x in row]
    return (ctypes.c_int64 * len(flat))(*flat)


def _threads() -> ctypes.c_int64:
    return ctypes.c_int64(torch.get_num_threads())
