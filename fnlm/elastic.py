"""The state of a run on any mesh: whole for a checkpoint, and from a checkpoint this rank's part of it.

What rests on disk are full tensors, whatever wrote them; so any strategy on any number of ranks continues any run.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import prod

import torch
from torch import Tensor

from fnlm import tree
from fnlm.sharded_optim import shard_optimizer
from fnlm.sharding.layout import Layout
from fnlm.sharding.specs import P, Shape, slices
from fnlm.sharding.whole import by_axis, gather_whole
from fnlm.step import Plan, init_state
from fnlm.types import Key, Params, TrainState, Transform, Tree

Boxed = tuple[tuple[int, int], ...]
TOGETHER = 64 << 20  # bytes of whole tensors that are gathered at once; what is not kept is dropped after each


class Elastic:
    """Where every tensor of a state lies under a layout. `like` is the whole state on the meta device."""

    def __init__(self, layout: Layout, optimizer: Transform, plan: Plan, key: Key) -> None:
        self.layout = layout
        # the last rank has the least of everything: what is whole there is whole everywhere
        last = {k: layout.local_shape(k, layout.mesh.world - 1) for k in layout.shapes}
        self.like = self._described(layout.shapes, optimizer, plan, key)
        least = _flat(self._described(last, shard_optimizer(optimizer, layout), plan, key))
        whole = _flat(self.like)
        self.specs = {path: self._spec(path, tuple(x.shape), tuple(least[path].shape)) for path, x in whole.items()}

    def _described(self, shapes: dict[str, Shape], optimizer: Transform, plan: Plan, key: Key) -> TrainState:
        """A state without storage: the optimizer has what is trained, the parameters are all."""
        params = _outline(shapes)
        own = {k: params[k] for k in self.layout.trained}
        return init_state(own, optimizer, plan, key)._replace(params=params)

    def _spec(self, path: str, whole: tuple[int, ...], least: tuple[int, ...]) -> P:
        name = path.rpartition("/")[2]
        return self.layout.specs[name] if name in self.layout.specs and whole != least else P()

    def box(self, path: str, shape: tuple[int, ...]) -> tuple[slice, ...]:
        """What this rank holds of a tensor of the whole state; `path` begins with `params/` or `opt_state/`."""
        return slices(shape, self.specs[path], self.layout.mesh)

    def owned(self, rank: int | None = None) -> dict[str, tuple[Shape, Shape | None]]:
        """For every tensor its whole shape, and where in it begins what a rank (None: this one) writes, or None.

        Of those that hold the same part one writes it; what many hold is spread over them, by bytes.
        """
        mesh, tensors = self.layout.mesh, _flat(self.like)
        shapes = {path: tuple(x.shape) for path, x in tensors.items()}
        number = mesh.rank if rank is None else rank
        writers = _writers(self._holders(shapes), {path: x.element_size() for path, x in tensors.items()}, mesh.world)
        return {path: (shape, writers.get((path, number))) for path, shape in shapes.items()}

    def _holders(self, shapes: dict[str, Shape]) -> dict[tuple[str, Boxed], list[int]]:
        """Who has which part of what; of parts with nothing in them nobody."""
        mesh, known = self.layout.mesh, dict[tuple[Shape, P, int], list[Boxed]]()
        found: dict[tuple[str, Boxed], list[int]] = {}
        for path, shape in shapes.items():
            spec = self.specs[path]
            if not spec.axes:
                found[path, tuple((0, n) for n in shape)] = list(range(mesh.world))
                continue
            if (shape, spec, spec.unit) not in known:
                known[shape, spec, spec.unit] = [
                    tuple((s.start, s.stop) for s in slices(shape, spec, mesh, r)) for r in range(mesh.world)
                ]
            for holder, box in enumerate(known[shape, spec, spec.unit]):
                found.setdefault((path, box), []).append(holder)
        return {key: ranks for key, ranks in found.items() if all(high > low for low, high in key[1])}

    def cut(self, state: TrainState) -> TrainState:
        """This rank's part of a whole state: copies, made without communication."""
        flat = {path: x[self.box(path, tuple(x.shape))].clone() for path, x in _flat(state).items()}
        return _rebuilt(flat, state)

    def whole(self, state: TrainState, keep: bool) -> TrainState | None:
        """The whole of a state in the host's memory, for those that `keep` it. Every rank calls it.

        `state.opt_state` may be None. What is on the CPU and whole already is not copied.
        """
        found: dict[str, Tensor] = {}
        flat = _flat(state)
        for group in self._groups(flat):
            found |= self._gathered({path: flat[path] for path in group}, keep)
        return _rebuilt(found, state) if keep else None

    def whole_params(self, params: Params, keep: bool) -> Params | None:
        """As `whole`, of parameters alone."""
        state = self.whole(TrainState(torch.tensor(0), params, None, torch.tensor(0)), keep)
        return state.params if state else None

    def _groups(self, flat: dict[str, Tensor]) -> Iterator[list[str]]:
        """Paths below one node, of one dtype, in the order of the state: what one gather may take."""
        group: list[str] = []
        last, size = ("", torch.float32), 0
        for path, x in flat.items():
            kind = path.rpartition("/")[0], x.dtype
            nbytes = self._bytes(path)
            if group and (kind != last or size + nbytes > TOGETHER):
                yield group
                group, size = [], 0
            group.append(path)
            last, size = kind, size + nbytes
        if group:
            yield group

    def _bytes(self, path: str) -> int:
        """Of a tensor when it is whole, in float32: a number that all ranks agree on."""
        return 4 * prod(self.layout.shapes[path.rpartition("/")[2]]) if self.specs[path].axes else 0

    def _gathered(self, some: dict[str, Tensor], keep: bool) -> dict[str, Tensor]:
        found = {path: x.cpu() for path, x in some.items() if keep and not self.specs[path].axes}
        named = {path.rpartition("/")[2]: path for path in some if self.specs[path].axes}
        for axis, names in by_axis(named, self.layout):
            made = gather_whole({k: some[named[k]] for k in names}, self.layout, axis)
            found |= {named[k]: x.cpu() for k, x in made.items()} if keep else {}
        return found


def _writers(
    holders: dict[tuple[str, Boxed], list[int]], itemsize: dict[str, int], world: int
) -> dict[tuple[str, int], Shape]:
    """Where begins what a rank writes of a path: first what only one has, then the largest to whoever has least."""
    nbytes = {(path, box): itemsize[path] * prod(high - low for low, high in box) for path, box in holders}
    load, out = [0] * world, dict[tuple[str, int], Shape]()
    for key in sorted(holders, key=lambda key: (len(holders[key]), -nbytes[key])):
        writer = min(holders[key], key=load.__getitem__)
        load[writer] += nbytes[key]
        out[key[0], writer] = tuple(low for low, _ in key[1])
    return out


def _outline(shapes: dict[str, tuple[int, ...]]) -> Params:
    return {k: torch.empty(shape, device="meta") for k, shape in shapes.items()}


def _flat(state: TrainState) -> dict[str, Tensor]:
    return tree.flatten({"params": state.params, "opt_state": state.opt_state})


def _rebuilt(flat: dict[str, Tensor], like: TrainState) -> TrainState:
    both: Tree = {"params": like.params, "opt_state": like.opt_state}
    params, opt_state = tree.unflatten(flat, both).values()
    return TrainState(like.step, params, opt_state, like.key)
