"""x W^T + b by name, for matrices as they are trained and as `fnlm.quantize` leaves them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fnlm.types import Params

FEW = 16  # rows up to which a CPU takes int8 as it is; for more, a dense product of a copy is as fast


def linear(p: Params, name: str, x: Tensor, bias: bool = True) -> Tensor:
    """(..., K) -> (..., N) with `NAME.weight` (N, K), and `NAME.bias` (N,) if there is one and `bias`."""
    w, b = p[f"{name}.weight"], p.get(f"{name}.bias") if bias else None
    if w.dtype != torch.int8:
        return F.linear(x, w, b)
    scale = p[f"{name}.scale"]
    rows = x.flatten(0, -2)
    y: Tensor
    if len(rows) <= FEW and x.dtype == torch.bfloat16 and x.device.type == "cpu":  # other types: a hundred times slower
        y = torch.ops.aten._weight_int8pack_mm(rows.contiguous(), w, scale.to(x.dtype)).unflatten(0, x.shape[:-1])
    else:
        y = F.linear(x, w.to(x.dtype)) * scale.to(x.dtype)
    return y if b is None else y + b
