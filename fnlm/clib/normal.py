"""Normal numbers by a C library."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from fnlm.clib.build import library


def normal_(out: Tensor, key: tuple[int, int], domain: int) -> bool:
    """Fill `out` with what `fnlm.random.normal` makes of a key; False: nothing was done, as it is not for the library.

    `out`: float32, contiguous, on a CPU; `domain`: the last counter word.
    """
    lib = library("normal").library
    if lib is None or out.device.type != "cpu" or out.dtype != torch.float32 or not out.is_contiguous():
        return False
    word, count = ctypes.c_uint32, ctypes.c_int64
    to, threads = ctypes.c_void_p(out.data_ptr()), count(torch.get_num_threads())
    lib.fnlm_normal(word(key[0]), word(key[1]), word(domain), count(out.numel()), to, threads)
    return True
