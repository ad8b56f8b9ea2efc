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
    """The way there and back of one step; `dtype` is that of the parameters at rest, in which gradients are summed.

    `resting`: those that are not trained; they come into use as the others, and no gradient goes home.
    """

    def __init__(self, layout: Layout, dtype: torch.dtype, resting: Params | None = None) -> None:
        self.layout, self.resting = layout, resting or {}
        self.there = Gathering(layout) if layout.state is not None else None
        self.back = Reducing(layout, dtype) if layout.state is not None or layout.copies is not None else None
        self.like: dict[str, tuple[torch.Size, torch.dtype, torch.device]] = {}
        self.left: dict[str, set[str]] = {}

    @contextmanager
    def forward(self, params: Params, last: bool = True) -> Iterator[None]:
        """The forward pass of one micro-batch on parameters at rest; `last`: none follows."""
        self.like = {k: (p.shape, p.dtype, p.device) for k, p in params.items()}
        if self.back is not None:
            self.back.begin(last)
            trained = self.layout.trained
            self.left = {g: {s.name for s in p.slots if s.name in trained} for g, p in self.layout.groups.items()}
        if self.there is None:
            yield
        else:
            with self.there.forward({**params, **self.resting}, last):
                yield

    def use(self, group: str, params: Params) -> Params:
        """The parameters of a group in use; the forward calls it once, just before the group computes."""
        names = tuple(params)
        pack = self.layout.groups.get(group)
        full = [s.name for s in pack.slots] if pack else []
        if not _same_names(names, full):
            here = ", ".join(self.layout.groups)
            raise ValueError(f"{group!r} with {', '.join(names)} is no group of the layout, which has {here}")
        used = dict(zip(full, params.values(), strict=True))
        if self.back is not None:
            whole = self.there.lift(group) if self.there is not None else used
            trained = self.layout.trained
            used = {f: _lift(self, f, p, whole[f]) if f in trained else whole[f] for f, p in used.items()}
        made = self._made(group, used)
        return {k: made[f] for k, f in zip(names, full, strict=True) if f in made}

    def _made(self, group: str, used: Params) -> Params:
        """What the layout makes of a group in use."""
        if self.layout.made is None:
            return used
        out = self.layout.made(used)
        new = {k: x for k, x in out.items() if x is not used.get(k)}
        for x in new.values():
            _at_once(x.grad_fn)
        if self.there is not None:
            self.there.remember(group, new)
        return out

    def arrive(self, name: str, grad: Tensor | None) -> None:
        """A gradient is complete; None where the loss does not depend on the parameter."""
        assert self.back is not None
        group = self.layout.group_of[name]
        self.left[group].discard(name)
        if self.there is not None and not self.left[group] and group not in self.layout.partly:
            self.there.used(group)
        if grad is not None:
            self.back.arrive(name, grad)

    def finish(self, grads: dict[str, Tensor | None]) -> Params:
        """After the backward pass: the gradients at rest of this micro-batch, or of all where they add up; else {}.

        `grads`: what autograd gave; taken as it is where nothing travels.
        """
        if self.there is not None:
            self.there.end()
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


AT_ONCE = (1 << 63) - 1
"""A place in autograd's queue before all others."""


def _lift(link: Link, name: str, param: Tensor, whole: Tensor) -> Tensor:
    """One parameter in use. Autograd takes the node that was made last first, and this one was made before its group's.

    So it is told to take it at once, or gradients would wait for those of the whole group.
    """
    out: Tensor = _Lift.apply(link, name, param, (whole,))  # type: ignore[no-untyped-call]
    if out.grad_fn is not None and hasattr(out.grad_fn, "_set_sequence_nr"):
        out.grad_fn._set_sequence_nr(AT_ONCE)
    return out


def _at_once(node: Any) -> None:
    """Take what was made of parameters in use at once too, down to them."""
    if node is not None and hasattr(node, "_set_sequence_nr"):
        node._set_sequence_nr(AT_ONCE)
        for before, _ in node.next_functions:
            _at_once(before)


class _Lift(torch.autograd.Function):
    """One parameter, from rest to use; the transpose brings its gradient home."""

    @staticmethod
    def forward(ctx: Any, link: Link, name: str, param: Tensor, whole: tuple[Tensor]) -> Tensor:
        ctx.link, ctx.name = link, name
        ctx.set_materialize_grads(False)
        return param.view_as(param) if whole[0] is param else whole[0]

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[None, ...]:
        ctx.link.arrive(ctx.name, grad)
        return None, None, None, None  # the link has it: the sum arrives after this call
