"""Muon's direction: the momentum of a matrix with its singular values brought near 1.

Shapes: (..., n, m); leading dims are independent matrices.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from fnlm.optim.base import Needs, check, check_decays, transform
from fnlm.types import Params, Transform

Coefficients = Literal["quintic", "polar"]
Adjust = Literal["none", "original", "match_rms_adamw"]

QUINTIC = (3.4445, -4.7750, 2.0315)
"""One polynomial for every step (Jordan et al. 2024, "Muon"); singular values end in about [0.7, 1.2]."""

POLAR = (
    (4.0848, -6.8946, 2.9270),
    (3.9505, -6.3029, 2.6377),
    (3.7418, -5.5913, 2.3037),
    (2.8769, -3.1427, 1.2046),
    (2.8366, -3.0525, 1.2012),
)
"""One polynomial per step, steep first and flat last (You Jiacheng 2025): the idea of Amsel et al. 2025, "The Polar
Express", with other numbers. Fewer steps keep the last ones."""


def newton_schulz(
    x: Tensor, steps: int = 5, coefficients: Coefficients = "quintic", dtype: torch.dtype = torch.bfloat16
) -> Tensor:
    """x (..., n, m) with its singular values brought near 1, in `dtype`; a matrix of zeros stays zero.

    X <- a X + (b A + c A^2) X with A = X X^T, after division by the Frobenius norm (Jordan et al. 2024, "Muon").
    """
    tall = x.shape[-2] > x.shape[-1]
    # contiguous: products of transposed batches take almost twice the time
    y = (x.mT if tall else x).to(dtype, memory_format=torch.contiguous_format)
    norm = torch.linalg.vector_norm(y, dim=(-2, -1), keepdim=True)
    # the steep polynomials diverge for a singular value above 1, which rounding may produce
    y = y / (norm.clamp(min=1e-7) if coefficients == "quintic" else norm * 1.01 + 1e-7)
    shape, y = y.shape, y.flatten(0, -3) if y.ndim > 3 else y
    multiply_add = torch.addmm if y.ndim == 2 else torch.baddbmm
    for a, b, c in POLAR[-steps:] if coefficients == "polar" else (QUINTIC,) * steps:
        gram = y @ y.mT
        y = multiply_add(y, multiply_add(gram, gram, gram, beta=b, alpha=c), y, beta=a)
    y = y.reshape(shape)
    return y.mT if tall else y


class MuonState(NamedTuple):
    """`mu`: the running mean of the gradient."""

    mu: Params


@dataclass(frozen=True)
class ScaleByMuon:
    """See `scale_by_muon`."""

    momentum: float = 0.95
    nesterov: bool = True
    steps: int = 5
    coefficients: Coefficients = "quintic"
    adjust: Adjust = "original"
    dtype: torch.dtype = torch.bfloat16
    moments_dtype: torch.dtype | None = None
    needs: ClassVar[Needs] = "matrix"

    def init(self, params: Params) -> MuonState:
        for k, p in params.items():
            check(p.ndim >= 2, f"muon is for matrices, {k!r} has shape {tuple(p.shape)}; "
                  f"give it to another part of a partition, e.g. adamw")  # fmt: skip
        return MuonState({k: torch.zeros_like(p, dtype=self.moments_dtype) for k, p in params.items()})

    def ratio(self, shape: torch.Size) -> float:
        """The factor on the update of an (..., n, m) matrix that makes one learning rate fit all shapes."""
        n, m = shape[-2:]
        if self.adjust == "original":
            return math.sqrt(max(1.0, n / m))
        return 0.2 * math.sqrt(max(n, m)) if self.adjust == "match_rms_adamw" else 1.0

    def orthogonal(self, x: Tensor) -> Tensor:
        """The update of an (..., n, m) momentum, in its dtype."""
        y = newton_schulz(x, self.steps, self.coefficients, self.dtype)
        # contiguous: adding a transposed update to the parameters takes ten times as long
        return y.to(x.dtype, memory_format=torch.contiguous_format) * self.ratio(x.shape)

    def update(self, grads: Params, state: MuonState, params: Params) -> tuple[Params, MuonState]:
        grads = {k: g.to(params[k].dtype) for k, g in grads.items()}
        mu = {k: state.mu[k].to(g.dtype).lerp(g, 1 - self.momentum) for k, g in grads.items()}
        ahead = {k: g.lerp(mu[k], self.momentum) for k, g in grads.items()} if self.nesterov else mu
        stored = {k: m.to(state.mu[k].dtype) for k, m in mu.items()}
        return {k: self.orthogonal(x) for k, x in ahead.items()}, MuonState(stored)

    def update_(self, names: Sequence[str], grads: list[Tensor], state: MuonState) -> list[Tensor]:
        """As said in `fnlm.optim.base.Rule`; the matrices have one shape and are multiplied as one batch."""
        stored = [state.mu[k] for k in names]
        mu = [m.to(g.dtype) for m, g in zip(stored, grads, strict=True)]
        torch._foreach_lerp_(mu, grads, 1 - self.momentum)
        if mu[0].dtype != stored[0].dtype:
            torch._foreach_copy_(stored, mu)
        if self.nesterov:
            torch._foreach_lerp_(grads, mu, self.momentum)
        return list(self.orthogonal(torch.stack(grads if self.nesterov else mu)).unbind())


def scale_by_muon(
    momentum: float = 0.95,
    nesterov: bool = True,
    steps: int = 5,
    coefficients: Coefficients = "quintic",
    adjust: Adjust = "original",
    dtype: torch.dtype = torch.bfloat16,
    moments_dtype: torch.dtype | None = None,
) -> Transform:
    """Momentum orthogonalised by Newton-Schulz steps in `dtype` (Jordan et al. 2024, "Muon"; as torch.optim.Muon).

    `adjust` multiplies by sqrt(max(1, n/m)) ("original") or 0.2 sqrt(max(n, m)) ("match_rms_adamw", Liu et al. 2025,
    "Muon is Scalable for LLM Training", eq. 4). `moments_dtype` stores the momentum in another dtype. Raises ValueError
    for momentum outside [0, 1), or too near 1 for `moments_dtype`, for steps outside [1, 99] ("polar": [1, 5]) and for
    unknown words; `init` raises it for a parameter that is no matrix.
    """
    check(0 <= momentum < 1, f"momentum={momentum} is outside [0, 1); choose e.g. 0.95")
    check_decays("momentum", momentum, moments_dtype)
    check(coefficients in ("quintic", "polar"), f"coefficients={coefficients!r}; choose 'quintic' or 'polar'")
    most = len(POLAR) if coefficients == "polar" else 99
    check(1 <= steps <= most, f"steps={steps} is outside [1, {most}] of coefficients={coefficients!r}; choose e.g. 5")
    words = ("none", "original", "match_rms_adamw")
    check(adjust in words, f"adjust={adjust!r}; choose one of {', '.join(words)}")
    return transform(ScaleByMuon(momentum, nesterov, steps, coefficients, adjust, dtype, moments_dtype))
