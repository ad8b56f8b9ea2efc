"""LayerNorm and RMSNorm by name."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from fnlm.collectives import Axis, pvary
from fnlm.config import ModelConfig
from fnlm.types import Params


def norm(p: Params, name: str, x: Tensor, cfg: ModelConfig, axis: Axis | None = None) -> Tensor:
    """LayerNorm (Ba et al. 2016) or RMSNorm (Zhang & Sennrich 2019) over the last dimension.

    `axis`: x differs along it, and the weights do not.
    """
    weight, bias = (None if w is None else pvary(w, axis) for w in (p.get(f"{name}.weight"), p.get(f"{name}.bias")))
    if cfg.norm == "rmsnorm":
        return F.rms_norm(x, x.shape[-1:], weight, cfg.norm_eps)
    return F.layer_norm(x, x.shape[-1:], weight, bias, cfg.norm_eps)
