"""What a training step asks of those it runs with: how parameters come into use, and how numbers become common.

`fnlm.sharding` answers for every strategy; here is the answer of one device.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

import torch
from torch import Tensor

from fnlm.forward import Use
from fnlm.types import Batch, Key, Params


class Link(Protocol):
    """How parameters at rest become parameters in use, in one step, and how gradients come home."""

    def forward(self, params: Params, last: bool = True, /) -> AbstractContextManager[None]:
        """The forward pass of a micro-batch on parameters at rest; `last`: none follows."""

    def use(self, group: str, params: Params, /) -> Params:
        """What stands just before a group computes."""

    def finish(self, grads: dict[str, Tensor | None], /) -> Params:
        """From what autograd gave to gradients at rest; {} where they come with a later micro-batch."""


class Ranks(Protocol):
    """What a step asks of the ranks it runs on; `fnlm.sharding.Ranks` answers for every strategy."""

    def link(self, params: Params, /) -> Link:
        """The traffic of one step."""

    def mine(self, piece: Batch, keys: Key | None, /) -> tuple[Batch, Key | None]:
        """This rank's part of a micro-batch and of its keys, one per row."""

    def total(self, x: Tensor, /) -> Tensor:
        """The sum over the ranks that split a batch."""

    def norm(self, tree: Params, /) -> Tensor:
        """The global norm of what lies as parameters do."""

    def everywhere(self, ok: Tensor, /) -> bool:
        """Whether all ranks say so, of a 0-d bool."""


class Here:
    """The link of one device: parameters rest where they are used."""

    def __init__(self, use: Use) -> None:
        self.use, self._like = use, dict[str, tuple[torch.Size, torch.dtype, torch.device]]()

    def forward(self, params: Params, last: bool = True) -> AbstractContextManager[None]:
        self._like = {k: (x.shape, x.dtype, x.device) for k, x in params.items()}
        return nullcontext()

    def finish(self, grads: dict[str, Tensor | None]) -> Params:
        out = {}
        for name, (shape, dtype, device) in self._like.items():
            g = grads[name]  # None: the loss does not depend on it
            out[name] = torch.zeros(shape, dtype=dtype, device=device) if g is None else g
        return out
