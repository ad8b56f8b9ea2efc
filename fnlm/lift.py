"""Bridges to nn.Module, both ways, over torch.func.functional_call: any torch model gets our step and optimizers."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from fnlm import random
from fnlm.config import Compute, ModelConfig
from fnlm.forward import forward
from fnlm.params import init_params
from fnlm.types import Key, Params

Apply = Callable[..., Any]


def from_module(module: nn.Module) -> tuple[Apply, Params]:
    """A module as a pure function: (apply, params) with apply(params, *args, **kwargs) = module(*args, **kwargs).

    A tensor that several names share has one entry, under its first name. Buffers stay as they are now: what a call
    writes into them (BatchNorm's averages) is dropped, so calls do not affect one another; `from_stateful_module`
    returns them. The module itself is copied and never changed, and train or eval mode is fixed at this moment.
    """
    run, params, buffers = from_stateful_module(module)

    def apply(params: Params, *args: Any, **kwargs: Any) -> Any:
        return run(params, buffers, *args, **kwargs)[0]

    return apply, params


def from_stateful_module(module: nn.Module) -> tuple[Apply, Params, Params]:
    """A module with buffers as results: (apply, params, buffers), apply(params, buffers, *args) -> (out, new buffers)."""
    skeleton = deepcopy(module)
    names = {"parameter": _aliases(skeleton.named_parameters), "buffer": _aliases(skeleton.named_buffers)}
    params = {first: p.detach().clone() for first, p in skeleton.named_parameters()}
    buffers = {first: b.detach().clone() for first, b in skeleton.named_buffers()}

    def apply(params: Params, buffers: Params, *args: Any, **kwargs: Any) -> tuple[Any, Params]:
        _check_names(params, names["parameter"])
        fresh = {k: b.clone() for k, b in buffers.items()}
        values = {alias: params[first] for alias, first in names["parameter"].items()}
        values |= {alias: fresh[first] for alias, first in names["buffer"].items()}
        out = functional_call(skeleton, values, args, kwargs, tie_weights=False)
        return out, fresh

    return apply, params, buffers


def _aliases(named: Callable[..., Any]) -> dict[str, str]:
    """Every name, one per module that really holds the tensor, mapped to the first name of the same tensor."""
    first: dict[int, str] = {}
    return {name: first.setdefault(id(x), name) for name, x in named(remove_duplicate=False)}


def _check_names(params: Params, names: dict[str, str]) -> None:
    known = set(names.values())
    if params.keys() != known:
        missing, extra = sorted(known - params.keys()), sorted(params.keys() - known)
        raise ValueError(f"parameters do not fit the module: missing {missing or 'none'}, unknown {extra or 'none'}")


class _Module(nn.Module):
    def __init__(self, cfg: ModelConfig, params: Params, compute: Compute) -> None:
        super().__init__()
        self.cfg, self.compute = cfg, compute
        for name, value in params.items():
            *path, leaf = name.split(".")
            owner: nn.Module = self
            for part in path:
                if part not in owner._modules:
                    owner.add_module(part, nn.Module())
                owner = owner.get_submodule(part)
            owner.register_parameter(leaf, nn.Parameter(value))

    def forward(self, tokens: Tensor, key: Key | None = None) -> Tensor:
        return forward(dict(self.named_parameters()), tokens, self.cfg, key=key, compute=self.compute)


def as_module(cfg: ModelConfig, params: Params | None = None, *, compute: Compute = Compute()) -> nn.Module:
    """Our model as a module with the same parameter names: module(tokens) -> logits (B, T, V); dropout needs a key.

    `functional_call(as_module(cfg), params, (tokens,))` equals `forward(params, tokens, cfg)`. Without `params` it
    starts from key(0). The module holds copies.
    """
    params = init_params(cfg, random.key(0)) if params is None else params
    return _Module(cfg, {k: v.detach().clone() for k, v in params.items()}, compute)


def stack(trees: list[Params]) -> Params:
    """Many models as one dict with a leading dimension, for torch.func.vmap."""
    return {k: torch.stack([t[k] for t in trees]) for k in trees[0]}
