"""Bridges to nn.Module, both ways, over torch.func.functional_call: any torch model gets our step and optimizers."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.parameter import is_lazy

from fnlm import random
from fnlm.config import Compute, ModelConfig
from fnlm.forward import forward
from fnlm.params import init_params, shapes
from fnlm.types import Key, Params

Apply = Callable[..., Any]


def from_module(module: nn.Module) -> tuple[Apply, Params]:
    """A module as a pure function: (apply, params) with apply(params, *args, **kwargs) = module(*args, **kwargs).

    `params` are copies of what the module would train; a tensor that several names share has one entry, under its
    first name. Buffers and frozen parameters (requires_grad=False) stay as they are now, and what a call writes into
    them (BatchNorm's averages) is dropped; `from_stateful_module` returns it. The module itself is never changed, and
    its train or eval mode is fixed at this moment. A module that checkpoints itself, or reads a parameter that it also
    keeps in a plain list, gives NaN; see docs/research.md. ValueError for missing or unknown names, and a lazy module.
    """
    run, params, buffers = from_stateful_module(module)

    def apply(params: Params, /, *args: Any, **kwargs: Any) -> Any:
        return run(params, buffers, *args, **kwargs)[0]

    return apply, params


def from_stateful_module(module: nn.Module) -> tuple[Apply, Params, Params]:
    """A module whose state is an argument and a result: apply(params, buffers, *args, **kwargs) -> (out, new buffers).

    Returns (apply, params, buffers); `buffers` also holds the frozen parameters. Otherwise as `from_module`.
    """
    tensors = _registered(module)
    entry = _first_names(tensors)
    copies = {name: tensors[name].detach().clone() for name in dict.fromkeys(entry.values())}
    params = {k: x for k, x in copies.items() if tensors[k].requires_grad}
    buffers = {k: x for k, x in copies.items() if k not in params}
    template, here = deepcopy(module, {id(p): _hollow(p) for p in module.parameters() if p.requires_grad}), _Here()
    trained, held = frozenset(params), frozenset(buffers)  # the dicts are the caller's, and may change
    written = {k for k in buffers if not isinstance(tensors[k], nn.Parameter)}

    def apply(params: Params, buffers: Params, /, *args: Any, **kwargs: Any) -> tuple[Any, Params]:
        _check_names("parameters", params, trained)
        _check_names("buffers", buffers, held)
        given = {**params, **{k: x.clone() if k in written else x for k, x in buffers.items()}}
        values = {name: given[first] for name, first in entry.items()}
        # One name per module that holds a tensor: under two names of one module, functional_call would put the value
        # of the call, not the module's own, back at the end (pytorch#164759); `tie_weights` adds such names itself.
        # the compiler traces in one thread at a time, and does not know a thread's own
        skeleton = template if torch.compiler.is_compiling() else here.copy_of(template)
        out = functional_call(skeleton, values, args, kwargs, tie_weights=False)
        return out, {name: values[name] for name in buffers}

    return apply, params, buffers


class _Here(threading.local):
    """The module that this thread calls: functional_call puts tensors into it for the time of a call."""

    own: nn.Module | None = None

    def copy_of(self, template: nn.Module) -> nn.Module:
        self.own = self.own or deepcopy(template)
        return self.own


def _registered(module: nn.Module) -> dict[str, Tensor]:
    """Every parameter and buffer under one name for each module object that holds it, in torch's order."""
    out: dict[str, Tensor] = {}
    for prefix, owner in module.named_modules():
        out |= owner.named_parameters(prefix, recurse=False, remove_duplicate=False)
        out |= owner.named_buffers(prefix, recurse=False, remove_duplicate=False)
    lazy = [name for name, x in out.items() if is_lazy(x)]
    if lazy:
        raise ValueError(f"{', '.join(lazy)} have no shape yet; call the module once before it is lifted")
    return out


def _first_names(tensors: dict[str, Tensor]) -> dict[str, str]:
    """Each name mapped to the first name of the same tensor."""
    first: dict[int, str] = {}
    return {name: first.setdefault(id(x), name) for name, x in tensors.items()}


def _hollow(p: nn.Parameter) -> nn.Parameter:
    """NaN in the shape of p, without memory: what reads it in place of the given parameter cannot pass for a result."""
    return nn.Parameter(torch.full((), torch.nan, dtype=p.dtype, device=p.device).expand(p.shape))


def _check_names(kind: str, given: Params, known: Iterable[str]) -> None:
    if given.keys() != set(known):
        missing, unknown = sorted(set(known) - given.keys()), sorted(given.keys() - set(known))
        raise ValueError(f"{kind} do not fit the module: missing {_listed(missing)}; unknown {_listed(unknown)}")


def _listed(names: list[str], most: int = 5) -> str:
    shown = ", ".join(names[:most]) or "none"
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"


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
        # functional_call may give one tensor for two names: both are wanted
        params: Params = dict(self.named_parameters(remove_duplicate=False))
        return forward(params, tokens, self.cfg, key=key, compute=self.compute)


def as_module(cfg: ModelConfig, params: Params | None = None, *, compute: Compute = Compute()) -> nn.Module:
    """Our model as a module with the same parameter names: module(tokens, key=None) -> logits (B, T, V).

    `functional_call(as_module(cfg), params, (tokens,))` equals `forward(params, tokens, cfg)`, bit for bit. It holds
    copies of `params`, by default those of key(0). Dropout needs a key; train() and eval() change nothing.
    ValueError for missing or unknown names.
    """
    params = init_params(cfg, random.key(0)) if params is None else params
    _check_names("parameters", params, shapes(cfg))
    return _Module(cfg, {k: params[k].detach().clone() for k in shapes(cfg)}, compute)


def stack(trees: list[Params]) -> Params:
    """Models of one shape as one dict with a new leading dimension, for torch.func.vmap; ValueError if names differ."""
    if not trees:
        raise ValueError("no models to stack; give at least one")
    for tree in trees[1:]:
        _check_names("parameters", tree, trees[0])
    return {k: torch.stack([t[k] for t in trees]) for k in trees[0]}
