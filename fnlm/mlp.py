"""The MLP of a block."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fnlm import clib
from fnlm.collectives import Axes, enter, leave, pvary
from fnlm.config import Kernels, Mlp, ModelConfig
from fnlm.kernels import needs_plain, squared_relu
from fnlm.linear import linear
from fnlm.types import Params


def mlp(p: Params, x: Tensor, cfg: ModelConfig, axes: Axes, kernels: Kernels) -> Tensor:
    """down(activate(up x)), or down(silu(gate x) * up x) for SwiGLU (Shazeer 2020, eq. 5): (B, T, D) -> (B, T, D)."""
    x = enter(x, axes)
    names = ("gate", "up") if cfg.mlp == "swiglu" else ("up",)
    inner = [linear(p, f"mlp.{name}", x) for name in names]
    h = activate(cfg.mlp, *inner, by_hand=kernels == "auto" and not needs_plain())
    out = leave(linear(p, "mlp.down", h, bias=False), axes)
    return out + pvary(p["mlp.down.bias"], axes.sequence) if cfg.bias else out


def activate(kind: Mlp, h: Tensor, up: Tensor | None = None, *, by_hand: bool) -> Tensor:
    """The nonlinearity, elementwise; SwiGLU takes the gate and what it multiplies."""
    if by_hand and not torch.is_grad_enabled() and clib.has_rows(h, up):
        return clib.activated(kind, h, up)
    if up is not None:
        return F.silu(h) * up
    if kind == "relu":
        return F.relu(h)
    if kind == "relu2":
        return squared_relu(h, by_hand)
    return F.gelu(h, approximate="tanh" if kind == "gelu-tanh" else "none")
