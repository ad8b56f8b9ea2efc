"""Adam's direction."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from fnlm.optim.base import Needs, check, check_decays, transform, zero_count
from fnlm.types import Params, Transform


class AdamState(NamedTuple):
    """`mu` and `nu`: running means of the gradient and of its square."""

    count: Tensor  # type: ignore[assignment]  # the paper's word; hides tuple.count
    mu: Params
    nu: Params


@dataclass(frozen=True)
class ScaleByAdam:
    """See `scale_by_adam`."""

    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    moments_dtype: torch.dtype | None = None
    needs: ClassVar[Needs] = "element"

    def init(self, params: Params) -> AdamState:
        def zeros() -> Params:
            return {k: torch.zeros_like(p, dtype=self.moments_dtype) for k, p in params.items()}

        return AdamState(zero_count(), zeros(), zeros())

    def update(self, grads: Params, state: AdamState, params: Params) -> tuple[Params, AdamState]:
        count = state.count + 1
        correct1, correct2 = 1 - self.b1 ** count.double(), (1 - self.b2 ** count.double()).sqrt()
        updates, mu, nu = {}, {}, {}
        for k, p in params.items():
            g = grads[k].to(p.dtype)
            m = state.mu[k].to(p.dtype).lerp(g, 1 - self.b1)
            v = (state.nu[k].to(p.dtype) * self.b2).addcmul(g, g, value=1 - self.b2)
            updates[k] = ((m / correct1) / (v.sqrt() / correct2 + self.eps)).to(p.dtype)
            mu[k], nu[k] = m.to(state.mu[k].dtype), v.to(state.nu[k].dtype)
        return updates, AdamState(count, mu, nu)

    def update_(self, names: Sequence[str], grads: list[Tensor], state: AdamState) -> list[Tensor]:
        count = int(state.count) + 1
        stored = [state.mu[k] for k in names], [state.nu[k] for k in names]
        mu, nu = ([s.to(g.dtype) for s, g in zip(moment, grads, strict=True)] for moment in stored)
        torch._foreach_lerp_(mu, grads, 1 - self.b1)
        torch._foreach_mul_(nu, self.b2)
        torch._foreach_addcmul_(nu, grads, grads, 1 - self.b2)
        if mu[0].dtype != stored[0][0].dtype:
            torch._foreach_copy_(stored[0], mu)
            torch._foreach_copy_(stored[1], nu)
        denominators = torch._foreach_sqrt(nu)
        torch._foreach_div_(denominators, (1 - self.b2**count) ** 0.5)
        torch._foreach_add_(denominators, self.eps)
        torch._foreach_copy_(grads, mu)
        torch._foreach_div_(grads, 1 - self.b1**count)
        torch._foreach_div_(grads, denominators)
        return grads


def scale_by_adam(
    b1: float = 0.9, b2: float = 0.95, eps: float = 1e-8, moments_dtype: torch.dtype | None = None
) -> Transform:
    """mean(g) / (sqrt(mean(g^2)) + eps), both without their bias towards 0 (Kingma & Ba 2015, algorithm 1).

    `moments_dtype` stores both moments in another dtype; the arithmetic stays in the parameters' dtype. Raises
    ValueError for b1 or b2 outside [0, 1), for eps <= 0, and where rounding to `moments_dtype` would keep a moment
    from decaying.
    """
    check(0 <= b1 < 1, f"b1={b1} is outside [0, 1); choose e.g. 0.9")
    check(0 <= b2 < 1, f"b2={b2} is outside [0, 1); choose e.g. 0.95")
    check(eps > 0, f"eps={eps} divides by 0 where no gradient came; choose e.g. 1e-8")
    check_decays("b1", b1, moments_dtype)
    check_decays("b2", b2, moments_dtype)
    return transform(ScaleByAdam(b1, b2, eps, moments_dtype))
