"""Where the model, the optimizer and the step meet a strategy: layouts of a ModelConfig, states and steps on shards."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from fnlm import random
from fnlm.collectives import Axes
from fnlm.config import ModelConfig
from fnlm.params import init_params, shapes
from fnlm.sharded_optim import shard_optimizer
from fnlm.sharding.layout import Layout
from fnlm.sharding.link import Link
from fnlm.sharding.mesh import Mesh
from fnlm.sharding.ranks import Ranks
from fnlm.sharding.specs import P
from fnlm.sharding.strategy import Strategy, strategy
from fnlm.sharding.whole import shard
from fnlm.step import DTYPES, Judge, Loss, Metrics, Plan, init_state, make_step
from fnlm.types import Batch, Key, Params, TrainState, Transform

Rules = tuple[tuple[str, P], ...]


def tensor_rules(cfg: ModelConfig) -> Rules:
    """What the tensor axis splits (Shoeybi et al. 2019, 3): heads, the MLP's inner width, the vocabulary.

    A rank has whole key heads together with the query heads that they serve.
    """
    q = cfg.head_dim * (cfg.n_heads // cfg.kv_heads)
    return (
        (r"embed\.tokens\.weight|head\.weight", P("tensor")),
        (r"blocks\..*\.attn\.q\.(weight|bias)", P("tensor", unit=q)),
        (r"blocks\..*\.attn\.[kv]\.(weight|bias)", P("tensor", unit=cfg.head_dim)),
        (r"blocks\..*\.attn\.out\.weight", P(None, "tensor", unit=q)),
        (r"blocks\..*\.mlp\.(up|gate)\.(weight|bias)", P("tensor")),
        (r"blocks\..*\.mlp\.down\.weight", P(None, "tensor")),
    )


def groups(cfg: ModelConfig) -> dict[str, list[str]]:
    """The units of communication in forward order, with full names: "root", "blocks.0", ..."""
    out: dict[str, list[str]] = {"root": [], **{f"blocks.{i}": [] for i in range(cfg.n_layers)}}
    for name in shapes(cfg):
        out[".".join(name.split(".")[:2]) if name.startswith("blocks.") else "root"].append(name)
    return out


def layout_of(cfg: ModelConfig, how: str | Strategy, mesh: Mesh) -> Layout:
    """The layout of a model under a strategy on a mesh.

    ValueError, with the remedy, for a wrong mesh and for fewer key heads than tensor ranks.
    """
    check_model(cfg, mesh)
    return Layout(strategy(how), mesh, shapes(cfg), groups(cfg), tensor_rules(cfg))


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
    build: Callable[[Axes], Loss], layout: Layout, plan: Plan | None = None
) -> Callable[[Params, Batch], Tensor]:
    """The loss of a batch of all ranks without gradients: run(params at rest, batch) -> 0-d mean over all weights."""
    loss, ranks = build(axes_of(layout)), Ranks(layout)
    dtype = DTYPES[(plan or Plan()).precision]

    @torch.no_grad()
    def run(params: Params, batch: Batch) -> Tensor:
        mine, _ = ranks.mine(batch, None)
        wide = {k: p if dtype == torch.float32 else p.to(dtype) for k, p in params.items()}
        link = Link(layout, next(iter(params.values())).dtype)
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
) -> Callable[[TrainState, Batch | Sequence[Batch]], tuple[TrainState, Metrics]]:
    """`make_step` under a strategy: step(state at rest, batch of all ranks) -> (state, metrics of all ranks).

    `build(axes)` makes the loss for the axes a model is split over. Every rank gives the same batch and computes its
    own rows of it; with `local` it gives its own rows, in this case without keys of its own (see `Ranks.mine`).
    """
    ranks = Ranks(layout, local)
    return make_step(
        build(axes_of(layout)), shard_optimizer(optimizer, layout), replace(plan or Plan(), ranks=ranks), judge
    )
