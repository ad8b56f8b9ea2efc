"""Which parameters a training changes, and how fast: all, those that nothing freezes, or adapters beside all others."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from fnlm import lora
from fnlm.config import ModelConfig, TrainConfig
from fnlm.forward import Use, identity
from fnlm.names import chosen
from fnlm.params import Shape, shapes
from fnlm.types import Batch, Key, Params


class Subset(NamedTuple):
    """What is trained of a model: `names`, in order; the rest rests, outside gradients and the optimizer.

    With adapters `sizes` holds theirs too, and they alone are trained. `scale` is theirs, `targets` the maps that have
    them. Parameters of a run are all that `sizes` names; in a step they are parted.
    """

    names: frozenset[str]
    sizes: dict[str, Shape]
    targets: tuple[str, ...] = ()
    rank: int = 0
    scale: float = 0.0

    @property
    def is_all(self) -> bool:
        """Whether nothing rests."""
        return len(self.names) == len(self.sizes)

    def rests(self, name: str) -> bool:
        """Whether a parameter stays as it is."""
        return name not in self.names

    def begun(self, params: Params, key: Key) -> Params:
        """A model's parameters, with fresh adapters where there are any."""
        fresh = lora.init(params, self.rank, key, ",".join(self.targets)) if self.targets else {}
        return {**params, **fresh}

    def parted(self, params: Params) -> tuple[Params, Params]:
        """Those trained, and those at rest."""
        own = {k: v for k, v in params.items() if not self.rests(k)}
        return own, {k: v for k, v in params.items() if k not in own}

    def joined(self, own: Params, resting: Params) -> Params:
        """The inverse of `parted`, in order."""
        return {k: own[k] if k in own else resting[k] for k in self.sizes} if resting else own

    def model(self, own: Params, resting: Params, dtype: torch.dtype | None = None) -> Params:
        """The model's own parameters: adapters are added in. Differentiable in `own`."""
        if not self.targets:
            return self.joined(own, resting)
        return lora.apply(resting, own, self.scale, dtype)

    def loss(self, inner: Callable[..., Tensor], resting: Params, dtype: torch.dtype | None) -> Callable[..., Tensor]:
        """What is minimised, as a function of what is trained alone.

        What rests is cast once to the `dtype` computed in (None: as it is); what adapters are added to, after that.
        """
        if self.is_all:
            return inner
        touched = {f"{name}.weight" for name in self.targets}
        low = {k: v.to(dtype) if dtype and k not in touched else v for k, v in resting.items()}

        def loss(own: Params, batch: Batch, key: Key | None = None, use: Use = identity) -> Tensor:
            return inner(self.model(own, low, dtype), batch, key, use)

        return loss


def subset_of(cfg: ModelConfig, train: TrainConfig) -> Subset:
    """What a TrainConfig trains of a model. ValueError, with the nearest names, for a pattern that names nothing."""
    sizes = shapes(cfg)
    if train.lora is not None:
        targets = tuple(lora.targets_of(sizes, train.lora_targets or "*"))
        own = lora.shapes(sizes, train.lora, targets)
        return Subset(frozenset(own), {**sizes, **own}, targets, train.lora, lora_scale(train.lora, train.lora_alpha))
    frozen = set(chosen(train.freeze or "", list(sizes), "freeze"))
    if len(frozen) == len(sizes):
        raise ValueError(f"freeze={train.freeze} leaves nothing to train; freeze less")
    return Subset(frozenset(k for k in sizes if k not in frozen), sizes)


def lora_scale(rank: int, alpha: float | None) -> float:
    """alpha / r; alpha is 2 r where none is given."""
    return 2.0 if alpha is None else alpha / rank


def rates_of(cfg: ModelConfig, train: TrainConfig) -> dict[str, float]:
    """What each parameter's learning rate is multiplied by; empty where all are 1.

    `layer_decay` d: d^(L - i) in block i, d^(L + 1) for the embeddings, 1 for the last norm and the head (ELECTRA,
    Clark et al. 2020; BEiT, Bao et al. 2022). `lr_scale` multiplies on top of it, by pattern.
    """
    names = list(subset_of(cfg, train).sizes)
    rates = dict.fromkeys(names, 1.0)
    if train.layer_decay is not None:
        rates = {k: train.layer_decay ** _depth(k, cfg.n_layers) for k in names}
    for pattern, factor in train.lr_scales:
        for name in chosen(pattern, names, "lr_scale"):
            rates[name] *= factor
    return {} if set(rates.values()) == {1.0} else rates


def _depth(name: str, layers: int) -> int:
    """How many layers stand between a parameter and the output."""
    block = re.match(r"blocks\.(\d+)\.", name)
    return layers - int(block[1]) if block else layers + 1 if name.startswith("embed") else 0
