"""How fast RoPE turns each pair of dimensions, and how models were stretched to texts longer than they were trained on.

In what other tools call `rope_scaling`: linear (Chen et al. 2023), llama3 (Dubey et al. 2024, code of Llama 3.1), yarn
(Peng et al. 2023, section 3.4 with its temperature). "dynamic" changes nothing within the context it is given.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fnlm.config import ModelConfig


def frequencies(cfg: ModelConfig, device: torch.device) -> Tensor:
    """Radians a position for each of the R/2 pairs, float64 (Su et al. 2021, 3.4.2)."""
    exponent = torch.arange(0, cfg.rope_dim, 2, device=device, dtype=torch.float64) / cfg.rope_dim
    plain = cfg.rope_theta**-exponent
    if cfg.rope_scaling == "none":
        return plain
    if cfg.rope_scaling == "linear":
        return plain / cfg.rope_factor
    share = _turns(plain, cfg) if cfg.rope_scaling == "llama3" else _dimensions(plain, cfg)
    return share * plain + (1 - share) * plain / cfg.rope_factor


def amplitude(cfg: ModelConfig) -> float:
    """What cos and sin are multiplied by: YaRN's 0.1 ln(factor) + 1, which sharpens attention (its eq. 22)."""
    return 0.1 * math.log(cfg.rope_factor) + 1 if cfg.rope_scaling == "yarn" else 1.0


def _turns(plain: Tensor, cfg: ModelConfig) -> Tensor:
    """How much of each frequency stays: a ramp over the turns that a pair makes in the original context."""
    assert cfg.rope_original is not None
    turns = cfg.rope_original * plain / (2 * math.pi)
    return ((turns - cfg.rope_low) / (cfg.rope_high - cfg.rope_low)).clamp(0, 1)


def _dimensions(plain: Tensor, cfg: ModelConfig) -> Tensor:
    """The same as a ramp over whole dimensions, between those that make `rope_high` and `rope_low` turns."""
    assert cfg.rope_original is not None

    high, low = (
        cfg.rope_dim * math.log(cfg.rope_original / (turns * 2 * math.pi)) / (2 * math.log(cfg.rope_theta))
        for turns in (cfg.rope_high, cfg.rope_low)
    )
    first, last = math.floor(high), math.ceil(low)
    first, last = max(first, 0), min(last, cfg.rope_dim - 1)
    at = torch.arange(len(plain), device=plain.device, dtype=plain.dtype)
    return 1 - ((at - first) / max(last - first, 1e-3)).clamp(0, 1)
