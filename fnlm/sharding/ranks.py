"""What a training step asks of its strategy: which part of a batch is this rank's, and how numbers become common."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from fnlm.sharding.layout import Layout
from fnlm.sharding.link import Link
from fnlm.sharding.mesh import Mesh
from fnlm.sharding.reductions import everywhere, global_norm, total
from fnlm.sharding.specs import span
from fnlm.sharding.strategy import batch_axes, row_axes
from fnlm.sharding.torch_ddp import TorchLink, TorchReducer
from fnlm.types import Batch, Key, Params


def rows_of(n: int, mesh: Mesh) -> slice:
    """This rank's rows of n; ranks may have unequal numbers. ValueError where a rank would have none."""
    axes = row_axes(mesh)
    ranks = mesh.size(*axes)
    if span(n, ranks, ranks - 1)[0] >= n:
        fit = max(r for r in range(1, ranks + 1) if span(n, r, r - 1)[0] < n)
        raise ValueError(
            f"{n} rows are too few for {ranks} ranks along {' x '.join(axes)}; "
            f"give a micro-batch at least {ranks} rows, or choose at most {fit} ranks"
        )
    return slice(*span(n, ranks, mesh.index(*axes)))


def positions_of(n: int, mesh: Mesh) -> slice:
    """This rank's positions of n. ValueError unless n is divisible by the context axis."""
    ranks = mesh.size("context")
    if n % ranks:
        raise ValueError(
            f"a sequence of {n} positions is not divisible by context={ranks}; choose a multiple of {ranks}"
        )
    return slice(*span(n, ranks, mesh.index("context")))


@dataclass(frozen=True)
class Ranks:
    """The step's view of a layout. `local`: what is given are this rank's rows already, not the global batch.

    `resting`: the parameters that are not trained, as they rest.
    """

    layout: Layout
    local: bool = False
    resting: Params = field(default_factory=dict, compare=False, repr=False)
    _ddp: list[TorchReducer] = field(default_factory=list, compare=False, repr=False)  # made at the first step

    def link(self, params: Params) -> Link | TorchLink:
        """The traffic of one step on parameters at rest."""
        if self.layout.strategy.reducer == "torch" and self.layout.copies is not None:
            if not self._ddp:
                self._ddp.append(TorchReducer(self.layout, params))
            return self._ddp[0].link()
        return Link(self.layout, next(iter(params.values())).dtype, self.resting)

    def mine(self, piece: Batch, keys: Key | None) -> tuple[Batch, Key | None]:
        """This rank's part of a global micro-batch and of its keys, one per row."""
        rows = slice(None) if self.local else rows_of(piece.tokens.shape[0], self.layout.mesh)
        own = Batch(*(x[rows] for x in piece))
        if self.layout.mesh.size("context") > 1:
            cols = positions_of(piece.tokens.shape[1], self.layout.mesh)
            own = Batch(*(x[:, cols] for x in own))
        return own, keys if keys is None else keys[rows]

    def total(self, x: Tensor) -> Tensor:
        """The sum over the ranks that split a batch."""
        return total(x, self.layout.mesh.axis(*batch_axes(self.layout.mesh)))

    def norm(self, tree: Params) -> Tensor:
        """The global norm of what lies as parameters do."""
        return global_norm(tree, self.layout)

    def everywhere(self, ok: Tensor) -> bool:
        """Whether all ranks say so, of a 0-d bool."""
        return everywhere(ok, self.layout.mesh)
