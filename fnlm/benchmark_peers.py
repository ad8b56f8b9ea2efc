"""The model as an nn.Module, and PyTorch's FSDP2 (`fully_shard`) on it: what our strategies are measured beside."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from fnlm import random
from fnlm.collectives import LOCAL
from fnlm.config import Compute, ModelConfig
from fnlm.embedding import embed
from fnlm.forward import _block, _site_keys, head_weight, split_groups
from fnlm.losses import fused_cross_entropy
from fnlm.norms import norm
from fnlm.places import places_of
from fnlm.sharding.specs import span
from fnlm.sharding.wires import Book, Call
from fnlm.types import Batch, Key, Params, Transform


class Block(nn.Module):
    """The parameters of a block; called, it is the block."""

    def __init__(self, params: Params, cfg: ModelConfig, lean: bool) -> None:
        super().__init__()
        self.cfg, self.lean, self.names = cfg, lean, list(params)
        self.own = nn.ParameterList(nn.Parameter(p.clone()) for p in params.values())

    def forward(self, x: Tensor, places: Any, keys: list[Tensor] | None) -> Tensor:
        own = dict(zip(self.names, self.own, strict=True))
        return _block(own, x, self.cfg, places, keys, LOCAL, Compute(), self.lean)


class Model(nn.Module):
    """`make_lm_loss(cfg)` with parameters that modules hold, in the groups that ours travel in.

    `lean`: as our strategies that drop parameters ask of a block.
    """

    def __init__(self, params: Params, cfg: ModelConfig, lean: bool) -> None:
        super().__init__()
        self.cfg, parts = cfg, split_groups(params, cfg)
        self.names = list(parts["root"])
        self.own = nn.ParameterList(nn.Parameter(p.clone()) for p in parts["root"].values())
        self.blocks = nn.ModuleList(Block(parts[f"blocks.{i}"], cfg, lean) for i in range(cfg.n_layers))

    def forward(self, batch: Batch, key: Key | None = None) -> Tensor:
        root, cfg = dict(zip(self.names, self.own, strict=True)), self.cfg
        keys = _site_keys(key, batch.tokens.shape[0], cfg)
        x = embed(root, batch.tokens, cfg, keys and keys[:2], LOCAL)
        places = places_of(batch.tokens.shape[1], cfg, x, Compute(), LOCAL)
        for i, block in enumerate(self.blocks):
            x = block(x, places, keys and keys[2 + 3 * i : 5 + 3 * i])
        x, head = norm(root, "norm", x, cfg), head_weight(root, cfg)
        return fused_cross_entropy(x, head, batch.targets, batch.weights, cfg)

    def named(self) -> dict[str, nn.Parameter]:
        """The parameters by our names."""
        found = dict(zip(self.names, self.own, strict=True))
        for i, block in enumerate(self.blocks):
            assert isinstance(block, Block)
            found |= {f"blocks.{i}.{k}": p for k, p in zip(block.names, block.own, strict=True)}
        return found


def fsdp(params: Params, cfg: ModelConfig) -> Model:
    """The model with each block sharded, then the rest, over all processes; gradients are means over them."""
    whole, mesh = Model(params, cfg, True), init_device_mesh("cpu", (dist.get_world_size(),))
    for block in whole.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(whole, mesh=mesh)
    return whole


class FsdpStep:
    """A training step with FSDP2 and one of our elementwise optimizers on its shards, the norm clipped to `clip`."""

    def __init__(self, params: Params, cfg: ModelConfig, optimizer: Transform, clip: float, micro: int) -> None:
        self.model, self.optimizer, self.clip, self.micro = fsdp(params, cfg), optimizer, clip, micro
        self.own: dict[str, DTensor] = {k: p for k, p in self.model.named().items() if isinstance(p, DTensor)}
        self.state = optimizer.init(self.local())

    def local(self) -> Params:
        """This rank's shards."""
        return {k: p.to_local().detach() for k, p in self.own.items()}

    def __call__(self, batch: Batch, key: Key) -> float:
        """One step on this rank's rows of a batch of all; the loss of all ranks."""
        rows, total = batch.tokens.shape[0] // self.micro, batch.weights.sum()
        keys, value = random.fold_in(key, torch.arange(batch.tokens.shape[0])), torch.zeros((), dtype=torch.float64)
        for i in range(self.micro):
            first, last = span(rows, dist.get_world_size(), dist.get_rank())
            mine = slice(i * rows + first, i * rows + last)
            piece = Batch(*(x[mine] for x in batch))
            loss = self.model(piece, keys[mine]) * (piece.weights.sum() / total)
            loss.backward()
            value += loss.detach()
        dist.all_reduce(value)
        self._update()
        return float(value)

    @torch.no_grad()
    def _update(self) -> None:
        found = {k: p.grad for k, p in self.own.items() if isinstance(p.grad, DTensor)}
        whole: Any = nn.utils.get_total_norm(list(found.values()))
        n = dist.get_world_size()  # from means to sums
        size = n * (whole.full_tensor() if isinstance(whole, DTensor) else whole)
        grads = {k: g.to_local() * (n * self.clip / size.clamp(min=self.clip)) for k, g in found.items()}
        params = self.local()
        updates, self.state = self.optimizer.update(grads, self.state, params)
        for k, p in params.items():
            p += updates[k]
        for parameter in self.own.values():
            parameter.grad = None


VERBS = {"all_gather_single": "all_gather", "all_gather_into_tensor": "all_gather",
         "reduce_scatter_single": "reduce_scatter", "reduce_scatter_tensor": "reduce_scatter"}  # fmt: skip


@contextmanager
def counted(book: Book) -> Iterator[None]:
    """Within it, what torch.distributed gathers and scatters is written down, in all-gathers and reduce-scatters.

    `dist.all_gather_single(output, input, ...)` and its older names, which FSDP2 looks up when it calls them.
    """
    true: dict[str, Callable[..., Any]] = {k: getattr(dist, k) for k in VERBS if hasattr(dist, k)}

    def noted(name: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            tensors = [t for t in (*args, *kwargs.values()) if isinstance(t, Tensor)]
            book.append(Call(VERBS[name], "data", dist.get_world_size(), max(t.nbytes for t in tensors)))
            return true[name](*args, **kwargs)

        return call

    try:
        for name in true:
            setattr(dist, name, noted(name))
        yield
    finally:
        for name, fn in true.items():
            setattr(dist, name, fn)
