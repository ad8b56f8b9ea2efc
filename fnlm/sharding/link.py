"""One step's traffic: parameters travel from rest to use, gradients travel home.

A link is made for every step and gone after it. `use` stands in the forward just before a group computes; its transpose
is where the gradients of that group come home. Autograd never sees the sums, as a reduction outlives the node that
started it: `finish` hands them over.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from fnlm.sharding.gathering import Gathering
from fnlm.sharding.layout import Layout
from fnlm.sharding.reducing import Reducing
from fnlm.types import Params


class Link:
    """The way there and back of one step; `dtype` is that of the parameters at rest, in which gradients are summed."""

    def __init__(self, layout: Layout, dtype: torch.dtype) -> None:
        self.layout = layout
        self.there = Gathering(layout) if layout.state is not None else None
        self.back = Reducing(layout, dtype) if layout.state is not None or layout.copies is not None else None
        self.like: dict[str, tuple[torch.Size, torch.dtype, torch.device]] = {}

    @contextmanager
    def forward(self, params: Params, last: bool = True) -> Iterator[None]:
        """The forward pass of one micro-batch on parameters at rest; `last`: none follows."""
        self.like = {k: (p.shape, p.dtype, p.device) for k, p in params.items()}
        if self.back is not None:
            self.back.begin(last)
        if self.there is None:
            yield
        else:
            with self.there.forward(params, last):
                yield

    def use(self, group: str, params: Params) -> Params:
        """The parameters of a group in use; the forward calls it once, just before the group computes."""
        names = tuple(params)
        pack = self.layout.groups.get(group)
        if pack is None or not _same_names(names, [s.name for s in pack.slots]):
            here = ", ".join(self.layout.groups)
            raise ValueError(f"{group!r} with {', '.join(names)} is no group of the layout, which has {here}")
        if self.back is None:
            return params
        out: tuple[Tensor, ...] = _Lift.apply(self, group, *params.values())  # type: ignore[no-untyped-call]
        return dict(zip(names, out, strict=True))

    def finish(self, grads: dict[str, Tensor | None]) -> Params:
        """After the backward pass: the gradients at rest of this micro-batch, or of all where they add up; else {}.

        `grads`: what autograd gave; taken as it is where nothing travels.
        """
        if self.back is not None:
            return self.back.finish(next(iter(self.like.values()))[2])
        out = {}
        for name, (shape, dtype, device) in self.like.items():
            g = grads[name]  # None: the loss does not depend on it
            out[name] = torch.zeros(shape, dtype=dtype, device=device) if g is None else g
        return out


def _same_names(own: Sequence[str], full: Sequence[str]) -> bool:
    """Whether the names inside a group are those of the layout, but for a prefix."""
    return len(own) == len(full) and all(f.endswith(o) for o, f in zip(own, full, strict=True))


class _Lift(torch.autograd.Function):
    """One group's parameters, from rest to use; the transpose brings its gradients home."""

    @staticmethod
    def forward(ctx: Any, link: Link, group: str, *params: Tensor) -> tuple[Tensor, ...]:
        ctx.link, ctx.group = link, group
        if link.there is None:
            return tuple(p.view_as(p) for p in params)
        return tuple(link.there.lift(group).values())

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, ...]:
        link: Link = ctx.link
        if link.there is not None:
            link.there.used(ctx.group)
        assert link.back is not None
        link.back.arrive(ctx.group, grads)
        return None, None, *[None] * len(grads)  # the link has them: the sums arrive after this call
