"""Weight decay as a link: after the core it is decoupled (AdamW), before it is L2 regularisation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from fnlm.optim.base import Needs, check, transform
from fnlm.types import NameMask, Params, Transform, Tree


@dataclass(frozen=True)
class AddDecayedWeights:
    """See `add_decayed_weights`."""

    rate: float
    mask: NameMask | None = None
    needs: ClassVar[Needs] = "element"

    def of(self, name: str) -> float:
        """The rate of one parameter: 0 outside the mask."""
        return self.rate if self.mask is None or self.mask(name) else 0.0

    def init(self, params: Params) -> Tree:
        return ()

    def update(self, grads: Params, state: Tree, params: Params) -> tuple[Params, Tree]:
        updates = dict(grads)
        for k in filter(self.of, grads):
            updates[k] = grads[k].to(params[k].dtype).add(params[k], alpha=self.of(k))
        return updates, state


def add_decayed_weights(rate: float, mask: NameMask | None = None) -> Transform:
    """Add rate * parameter to the update, where the mask accepts the name (Loshchilov & Hutter 2019, algorithm 2).

    Raises ValueError for a negative rate.
    """
    check(rate >= 0, f"rate={rate} would make the weights grow; give a number >= 0 (0.1 is usual)")
    return transform(AddDecayedWeights(rate, mask))
