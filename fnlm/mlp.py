"""The MLP of a block, and a projection that recomputes its activations instead of keeping them."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fnlm.attention import BLOCK
from fnlm.collectives import Axes, psum, pvary
from fnlm.config import Kernels, Mlp, ModelConfig
from fnlm.kernels import needs_plain, once_differentiable
from fnlm.types import Params


def mlp(p: Params, x: Tensor, cfg: ModelConfig, axes: Axes, kernels: Kernels) -> Tensor:
    """down(activate(up x)), or down(silu(gate x) * up x) for SwiGLU (Shazeer 2020, eq. 5): (B, T, D) -> (B, T, D)."""
    x = pvary(x, axes.tensor)
    names = ("gate", "up") if cfg.mlp == "swiglu" else ("up",)
    inner = [F.linear(x, p[f"mlp.{name}.weight"], p.get(f"mlp.{name}.bias")) for name in names]
    if kernels == "auto" and x.shape[1] > BLOCK and not needs_plain():
        out: Tensor = _Projected.apply(cfg.mlp, p["mlp.down.weight"], *inner)  # type: ignore[no-untyped-call]
    else:
        out = F.linear(activate(cfg.mlp, *inner), p["mlp.down.weight"])
    out = psum(out, axes.tensor)
    return out + p["mlp.down.bias"] if cfg.bias else out


def activate(kind: Mlp, h: Tensor, up: Tensor | None = None) -> Tensor:
    """The nonlinearity, elementwise (relu squared: So et al. 2021); SwiGLU takes the gate and what it multiplies."""
    if up is not None:
        return F.silu(h) * up
    if kind == "relu":
        return F.relu(h)
    if kind == "relu2":
        return F.relu(h).square()
    return F.gelu(h, approximate="tanh" if kind == "gelu-tanh" else "none")


class _Projected(torch.autograd.Function):
    """activate(inner) @ weight.T, keeping `inner` alone: a tenth less activations at GPT-2's size, 1 % more time."""

    @staticmethod
    def forward(ctx: Any, kind: Mlp, weight: Tensor, *inner: Tensor) -> Tensor:
        ctx.kind = kind
        ctx.save_for_backward(weight, *inner)
        return F.linear(activate(kind, *inner), weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        weight, *kept = ctx.saved_tensors
        with torch.enable_grad():
            inner = [h.detach().requires_grad_() for h in kept]
            active = activate(ctx.kind, *inner)
        d_weight = g.flatten(0, -2).T @ active.detach().flatten(0, -2)
        return None, d_weight, *torch.autograd.grad(active, inner, g @ weight)
