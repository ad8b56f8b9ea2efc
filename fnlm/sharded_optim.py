"""Optimizers on shards: elementwise links stay, norms become global, matrices are made whole for a moment."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar, NamedTuple

from torch import Tensor

from fnlm import optim
from fnlm.collectives import Axis
from fnlm.optim.base import Needs, needs, rewrite, transform
from fnlm.optim.clip import ClipByGlobalNorm
from fnlm.optim.muon import MuonState, ScaleByMuon
from fnlm.sharding.layout import Layout
from fnlm.sharding.reductions import global_norm
from fnlm.sharding.whole import by_axis, gather_whole, scatter_whole
from fnlm.types import Params, Transform, Tree


def shard_optimizer(optimizer: Transform, layout: Layout) -> Transform:
    """The same optimizer on parameters at rest under a layout; equal to it on whole parameters.

    ValueError, with the reason, for a link that cannot be: one that looks at all parameters together, or has no rule.
    """
    if not layout.split_axes:
        return optimizer
    return rewrite(lambda link: _sharded(link, layout), optimizer)


def _sharded(link: Transform, layout: Layout) -> Transform:
    rule: Any = link.rule
    if isinstance(rule, ClipByGlobalNorm) and rule.norm is optim.global_norm:
        return transform(replace(rule, norm=_Norm(layout)))
    need = needs(link)
    if need == "element":
        return link
    if isinstance(rule, ScaleByMuon):
        return transform(ShardedMuon(rule, layout))
    if need == "matrix":
        return transform(OnWhole(link, layout))
    name = "a link without a rule" if rule is None else type(rule).__name__
    raise ValueError(
        f"{name} looks at all parameters together and cannot run where they are split over "
        f"{', '.join(layout.split_axes)}; give it a rule whose `needs` is 'element' or 'matrix', or choose ddp_bucketed"
    )


@dataclass(frozen=True, eq=False)
class _Norm:
    """The global norm of gradients at rest."""

    layout: Layout

    def __call__(self, tree: Params) -> Tensor:
        return global_norm(tree, self.layout)


@dataclass(frozen=True, eq=False)
class OnWhole:
    """Any rule for matrices: gradients and parameters are gathered, every rank computes, and keeps its part.

    The state is that of whole parameters, the same on every rank: right for the small states of factored moments.
    """

    inner: Transform
    layout: Layout
    needs: ClassVar[Needs] = "element"

    def init(self, params: Params) -> Tree:
        whole = {k: p.new_zeros(()).expand(self.layout.shapes[k]) for k, p in params.items()}
        return self.inner.init(whole)

    def update(self, grads: Params, state: Tree, params: Params) -> tuple[Params, Tree]:
        names = list(params)
        wide = {k: grads[k].to(params[k].dtype) for k in names}
        updates, state = self.inner.update(self._whole(wide), state, self._whole(params))
        return {k: updates[k][self.layout.slices(k)].contiguous() for k in names}, state

    def _whole(self, tree: Params) -> Params:
        out = dict(tree)
        for axis, names in by_axis(tree, self.layout):
            out |= gather_whole({k: tree[k] for k in names}, self.layout, axis)
        return out


class _Round(NamedTuple):
    """Matrices that are gathered together; matrix i is the work of rank i of the axis."""

    axis: Axis
    names: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class ShardedMuon:
    """Muon on shards: the momentum stays split, each matrix is gathered and orthogonalised by one rank, and sent back.

    As many matrices travel together as there are ranks along the axis, so that each rank has at most one to turn.
    """

    rule: ScaleByMuon
    layout: Layout
    needs: ClassVar[Needs] = "element"

    def init(self, params: Params) -> MuonState:
        return self.rule.init(params)

    def update(self, grads: Params, state: MuonState, params: Params) -> tuple[Params, MuonState]:
        rule = self.rule
        grads = {k: g.to(params[k].dtype) for k, g in grads.items()}
        mu = {k: state.mu[k].to(g.dtype).lerp(g, 1 - rule.momentum) for k, g in grads.items()}
        ahead = {k: g.lerp(mu[k], rule.momentum) for k, g in grads.items()} if rule.nesterov else mu
        updates: Params = {}
        for turn in self._rounds(list(grads)):
            updates |= self._turn(turn, ahead)
        updates |= {k: rule.orthogonal(x) for k, x in ahead.items() if k not in updates}
        stored = {k: m.to(state.mu[k].dtype) for k, m in mu.items()}
        return {k: updates[k] for k in grads}, MuonState(stored)

    def _rounds(self, names: list[str]) -> list[_Round]:
        found = []
        for axis, group in by_axis(names, self.layout):
            for i in range(0, len(group), axis.size):
                found.append(_Round(axis, tuple(group[i : i + axis.size])))
        return found

    def _turn(self, turn: _Round, ahead: Params) -> Params:
        axis, names = turn
        whole = gather_whole({k: ahead[k] for k in names}, self.layout, axis)
        mine = {k: self.rule.orthogonal(whole[k]) for i, k in enumerate(names) if i == axis.index}
        del whole
        return scatter_whole(mine, names, self.layout, axis, ahead[names[0]])
