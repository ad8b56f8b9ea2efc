"""Where the model, the optimizer and the step meet a strategy: layouts of a ModelConfig, states and steps on shards."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from fnlm import lora, random
from fnlm.collectives import Axes, Axis, pvary
from fnlm.config import ModelConfig
from fnlm.forward import Use
from fnlm.params import init_params, shapes
from fnlm.sharded_optim import shard_optimizer
from fnlm.sharding.layout import Layout, Made
from fnlm.sharding.link import Link
from fnlm.sharding.mesh import Mesh
from fnlm.sharding.ranks import Ranks
from fnlm.sharding.specs import P, spec_of
from fnlm.sharding.strategy import Strategy, strategy
from fnlm.sharding.whole import shard
from fnlm.step import DTYPES, Judge, Loss, Metrics, Plan, init_state, make_step
from fnlm.trainable import Subset
from fnlm.types import Batch, Key, Params, TrainState, Transform

Rules = tuple[tuple[str, P], ...]


def tensor_rules(cfg: ModelConfig) -> Rules:
    """What the tensor axis splits (Shoeybi et al. 2019, 3): heads, the MLP's inner width, the vocabulary.

    A rank has whole key heads together with the query heads that they serve, and of adapters what goes with its part.
    """
    q = cfg.head_dim * (cfg.n_heads // cfg.kv_heads)
    return (
        (r"embed\.tokens\.weight|head\.weight", P("tensor")),
        (r"blocks\..*\.attn\.q\.(weight|bias|lora_b)", P("tensor", unit=q)),
        (r"blocks\..*\.attn\.[kv]\.(weight|bias|lora_b)", P("tensor", unit=cfg.head_dim)),
        (r"blocks\..*\.attn\.out\.(weight|lora_a)", P(None, "tensor", unit=q)),
        (r"blocks\..*\.mlp\.(up|gate)\.(weight|bias|lora_b)", P("tensor")),
        (r"blocks\..*\.mlp\.down\.(weight|lora_a)", P(None, "tensor")),
    )


def groups(cfg: ModelConfig, names: Iterable[str] | None = None) -> dict[str, list[str]]:
    """The units of communication in forward order, with full names: "root", "blocks.0", ...

    `names`: those of the model, and of adapters after them; None: of the model alone.
    """
    out: dict[str, list[str]] = {"root": [], **{f"blocks.{i}": [] for i in range(cfg.n_layers)}}
    for name in names or shapes(cfg):
        out[group_of(name)].append(name)
    return out


def group_of(name: str) -> str:
    """The group of a parameter."""
    return ".".join(name.split(".")[:2]) if name.startswith("blocks.") else "root"


def layout_of(cfg: ModelConfig, how: str | Strategy, mesh: Mesh, subset: Subset | None = None) -> Layout:
    """The layout of a model, or of one that is trained in part, under a strategy on a mesh.

    ValueError, with the remedy, for a wrong mesh and for fewer key heads than tensor ranks.
    """
    check_model(cfg, mesh)
    row, rules = strategy(how), tensor_rules(cfg)
    if subset is None or subset.is_all:
        return Layout(row, mesh, shapes(cfg), groups(cfg), rules)
    made = adapted(subset.scale, rules, mesh.axis("tensor")) if subset.targets else None
    return Layout(row, mesh, subset.sizes, groups(cfg, subset.sizes), rules, subset.names, made)


def adapted(scale: float, rules: Rules, tensor: Axis | None) -> Made:
    """What adapters make of the parameters of a group: the model's own, in the dtype that adapters are computed in.

    An adapter that is whole where its map is split has a part of its gradient on each rank.
    """

    def common(name: str, x: Tensor) -> Tensor:
        return x if spec_of(rules, name).axes else pvary(x, tensor)

    def made(used: Params) -> Params:
        adapters = {k: common(k, x) for k, x in used.items() if lora.is_adapter(k)}
        own = {k: x for k, x in used.items() if not lora.is_adapter(k)}
        return lora.apply(own, adapters, scale, next(x.dtype for x in adapters.values())) if adapters else own

    return made


def with_resting(loss: Loss, resting: Params, layout: Layout) -> Loss:
    """A loss of the parameters that are trained alone: the others, and adapters where there are any, are joined in."""
    if not resting:
        return loss
    names = [k for k in layout.shapes if not lora.is_adapter(k)]
    beside = {g: [s.name for s in p.slots if lora.is_adapter(s.name)] for g, p in layout.groups.items()}

    def joined(own: Params, batch: Batch, key: Key | None, use: Use) -> Tensor:
        adapters = {g: {k.removeprefix(f"{g}."): own[k] for k in some} for g, some in beside.items()}

        def all_of(group: str, params: Params) -> Params:
            return use(group, {**params, **adapters.get(group, {})})

        return loss({k: own[k] if k in own else resting[k] for k in names}, batch, key, all_of)

    return joined


def lowered(resting: Params, plan: Plan, layout: Layout) -> Params:
    """What rests, cast once to the dtype computed in; what adapters are added to, only where it must travel."""
    dtype = DTYPES[plan.precision]
    if dtype == torch.float32:
        return resting
    adapters = (k for k in layout.shapes if k.endswith(lora.A) and layout.state is None)
    kept = {k.removesuffix(lora.A) + lora.WEIGHT for k in adapters}
    return {k: x if k in kept else x.to(dtype) for k, x in resting.items()}


def check_model(cfg: ModelConfig, mesh: Mesh) -> None:
    """ValueError for fewer heads or columns of the MLP than ranks to split them over, and for positions left over.

    Of as many or more, the last ranks may still have none: 25 heads on 8 ranks are six times 4, then 1, then 0.
    """
    n = mesh.size("tensor")
    for what, units in (("n_kv_heads", cfg.kv_heads), ("d_ff", cfg.ff_dim)):
        if units < n:
            raise ValueError(f"{what}={units} is too few for tensor={n}; choose at most tensor={units}")
    if cfg.seq_len % mesh.size("context"):
        raise ValueError(
            f"seq_len={cfg.seq_len} is not divisible by context={mesh.size('context')}; "
            f"choose a multiple of {mesh.size('context')}"
        )


def axes_of(layout: Layout) -> Axes:
    """The axes that the forward of a model speaks along."""
    mesh = layout.mesh
    tensor = mesh.axis("tensor")
    sequence = layout.strategy.sequence_parallel and tensor is not None
    return Axes(mesh.axis("data"), tensor, mesh.axis("context"), sequence)


def sharded_params(cfg: ModelConfig, layout: Layout, key: Key) -> Params:
    """Fresh parameters of a model, this rank's part: each rank draws the whole and keeps its own."""
    return shard(init_params(cfg, key), layout)


def sharded_state(
    params: Params, optimizer: Transform, layout: Layout, plan: Plan | None = None, key: Key | None = None
) -> TrainState:
    """The state before the first step from whole parameters, this rank's part of it; see `init_state`."""
    own = shard_optimizer(optimizer, layout)
    return init_state(shard(params, layout), own, plan or Plan(), random.key(0) if key is None else key)


def make_sharded_loss(
    build: Callable[[Axes], Loss], layout: Layout, plan: Plan | None = None, resting: Params | None = None
) -> Callable[[Params, Batch], Tensor]:
    """The loss of a batch of all ranks without gradients: run(params at rest, batch) -> 0-d mean over all weights."""
    low = lowered(resting or {}, plan or Plan(), layout)
    loss, ranks = with_resting(build(axes_of(layout)), low, layout), Ranks(layout)
    dtype = DTYPES[(plan or Plan()).precision]

    @torch.no_grad()
    def run(params: Params, batch: Batch) -> Tensor:
        mine, _ = ranks.mine(batch, None)
        wide = {k: p if dtype == torch.float32 else p.to(dtype) for k, p in params.items()}
        link = Link(layout, next(iter(params.values())).dtype, low)
        with link.forward(wide):
            value = loss(wide, mine, None, link.use).double()
        weight = mine.weights.sum(dtype=torch.float64)
        both = ranks.total(torch.stack([value * weight, weight]))
        return both[0] / torch.where(both[1] > 0, both[1], 1)

    return run


def make_sharded_step(
    build: Callable[[Axes], Loss],
    optimizer: Transform,
    layout: Layout,
    plan: Plan | None = None,
    judge: Judge | None = None,
    local: bool = False,
    resting: Params | None = None,
) -> Callable[[TrainState, Batch | Sequence[Batch]], tuple[TrainState, Metrics]]:
    """`make_step` under a strategy: step(state at rest, batch of all ranks) -> (state, metrics of all ranks).

    `build(axes)` makes the loss for the axes a model is split over. Every rank gives the same batch and computes its
    own rows of it; with `local` it gives its own rows, in this case without keys of its own (see `Ranks.mine`).
    `resting`: the parameters at rest that are not trained; the state has the others.
    """
    low = lowered(resting or {}, plan or Plan(), layout)
    loss = with_resting(build(axes_of(layout)), low, layout)
    ranks = Ranks(layout, local, low)
    return make_step(loss, shard_optimizer(optimizer, layout), replace(plan or Plan(), ranks=ranks), judge)
