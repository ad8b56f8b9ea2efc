"""x W^T + b by name, for matrices as they are trained and as `fnlm.quantize` leaves them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fnlm.types import Params

GROUP = 32  # entries that share a scale in 4 bits
FEW = 16  # rows up to which a CPU takes int8 as it is; for more, a dense product of a copy is as fast


def linear(p: Params, name: str, x: Tensor, bias: bool = True) -> Tensor:
    """(..., K) -> (..., N) with `NAME.weight` (N, K), and `NAME.bias` (N,) if there is one and `bias`."""
    w, b = p[f"{name}.weight"], p.get(f"{name}.bias") if bias else None
    if w.is_floating_point():
        return F.linear(x, w, b)
    if w.dtype == torch.uint8:
        return F.linear(x, unpacked(w, p[f"{name}.scale"], x.dtype), b)
    scale = p[f"{name}.scale"]
    rows = x.flatten(0, -2)
    y: Tensor
    if len(rows) <= FEW and _has_kernel(x, w):
        y = torch.ops.aten._weight_int8pack_mm(rows.contiguous(), w, scale.to(x.dtype)).unflatten(0, x.shape[:-1])
    else:
        y = F.linear(x, w.to(x.dtype)) * scale.to(x.dtype)
    return y if b is None else y + b


def _has_kernel(x: Tensor, w: Tensor) -> bool:
    """Whether torch's product with int8 is of use: other types are a hundred times slower, other widths may crash."""
    return x.dtype == torch.bfloat16 and x.device.type == "cpu" and w.shape[1] % 32 == 0


def unpacked(w: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """The matrix (N, K) that steps stand for: int8 with a scale for each row, or two of 4 bits in a byte, as
    `fnlm.quantize` lays them."""
    if w.dtype == torch.int8:
        return w.to(dtype) * scale.to(dtype)[:, None]
    halves = w.unflatten(1, (-1, GROUP // 2))
    steps = torch.cat([halves & 15, halves >> 4], 2).to(dtype) - 8
    return (steps * scale.to(dtype)[..., None]).flatten(1)
