"""What this machine is, and two process-wide settings that speed up training on a CPU; no import touches them."""

from __future__ import annotations

import ctypes
import platform
import sys
from functools import cache
from pathlib import Path

import torch

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # glibc's malloc.h


@cache
def cpu_flags() -> frozenset[str]:
    """The instruction sets the processor names, from /proc/cpuinfo; empty where there is none."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return frozenset()
    line = next((x for x in text.splitlines() if x.startswith(("flags", "Features"))), "")
    return frozenset(line.partition(":")[2].split())


def has_fast_bf16(device: torch.device | str = "cpu") -> bool:
    """Whether bfloat16 products are faster than float32 ones here: an instruction for them, or a GPU since Ampere."""
    if torch.device(device).type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return bool(cpu_flags() & {"avx512_bf16", "amx_bf16", "bf16"})


def keep_freed_memory() -> bool:
    """Ask glibc to keep freed blocks for the next step instead of returning them page by page; says whether it did.

    Returning costs 11 to 25 % of a CPU step: a fresh page is 20 times slower than a used one. What is free at the time
    of the call is returned first, so the best moment is when the parameters are made and the first step is not.
    """
    libc = _glibc()
    if libc is None:
        return False
    libc.malloc_trim(0)
    return bool(libc.mallopt(_M_MMAP_MAX, 0) and libc.mallopt(_M_TRIM_THRESHOLD, ctypes.c_int(2**31 - 1)))


def return_freed_memory() -> None:
    """Give back to the system what glibc keeps of freed blocks, in an arena for each thread; elsewhere do nothing."""
    libc = _glibc()
    if libc is not None:
        libc.malloc_trim(0)


def _glibc() -> ctypes.CDLL | None:
    return ctypes.CDLL(None) if sys.platform.startswith("linux") and platform.libc_ver()[0] == "glibc" else None


def route_fp32_to_onednn() -> bool:
    """Send float32 products to oneDNN's AVX-512 kernels, twice as fast as MKL's on AMD; says whether it did.

    The switch is torch's "bf16" mode, which has no bf16 path on processors without AMX (the same
    error as before); with AMX it would lose digits.
    """
    if "avx512f" not in cpu_flags() or "amx_bf16" in cpu_flags() or not torch.backends.mkldnn.is_available():
        return False
    torch.backends.mkldnn.matmul.fp32_precision = "bf16"  # type: ignore[attr-defined]
    return True


def tune_cpu() -> None:
    """Both settings, for programs that train on a CPU: they hold for the whole process."""
    keep_freed_memory()
    route_fp32_to_onednn()
