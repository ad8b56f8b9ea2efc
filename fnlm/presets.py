"""Models by name, each a line, and the settings they are trained and finetuned with; and a TrainConfig's optimizer."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from fnlm import optim
from fnlm.config import ModelConfig, TrainConfig
from fnlm.lora import is_adapter
from fnlm.params import is_hidden_matrix, is_matrix, mup_lr_scale
from fnlm.trainable import rates_of
from fnlm.types import Transform


def _model(v: int, layers: int, heads: int, d: int, t: int, **rest: Any) -> ModelConfig:
    return ModelConfig(vocab_size=v, n_layers=layers, n_heads=heads, d_model=d, seq_len=t, **rest)


_GPT2: Any = {"mlp": "gelu-tanh", "bias": True}  # Radford et al. 2019; learned positions, tied head: the defaults
_LLAMA: Any = {"norm": "rmsnorm", "mlp": "swiglu", "positions": "rope"}  # Touvron et al. 2023
# What learns fastest per second at small sizes: docs/design.md has the measurements.
_FAST: Any = {
    "norm_affine": False, "embed_norm": True, "qk_norm": True, "mlp": "relu2", "positions": "rope",
    "rope_theta": 1000.0, "tied": False, "init": "fan-in", "zero_init_out": True, "zero_init_head": True,
}  # fmt: skip
_FEW = ((2, 4096), (3, 8192), (4, 16384))
_DROP: Any = {"dropout_embed": 0.2, "dropout_attn": 0.2, "dropout_residual": 0.2}

# fmt: off
PRESETS: dict[str, ModelConfig] = {
    #                            vocab   L   H     D     T
    "demo":              _model(   657,  2,  2,  128,  256, **_FAST, token_shift=0.5, ngrams=_FEW),
    "shakespeare-speedrun": _model( 65,  5,  2,  128,  128, **_FAST, ngrams=((2, 4356), (3, 16384), (4, 65536))),
    "shakespeare-speedrun-pure": _model(65, 5, 2, 128, 128, **_FAST),
    "shakespeare-char":  _model(    65,  6,  6,  384,  256, **_DROP),  # nanoGPT's two character models
    "shakespeare-char-cpu": _model( 65,  4,  4,  128,   64),
    "ryan-12m":          _model( 16000,  6,  5,  320,  512, d_ff=1280, positions="rope"),
    "gpt2":              _model( 50257, 12, 12,  768, 1024, **_GPT2),
    "gpt2-medium":       _model( 50257, 24, 16, 1024, 1024, **_GPT2),
    "gpt2-large":        _model( 50257, 36, 20, 1280, 1024, **_GPT2),
    "gpt2-xl":           _model( 50257, 48, 25, 1600, 1024, **_GPT2),
    "tinystories-100m":  _model(100277, 12, 12,  768, 1024, d_ff=2048, positions="rope", mlp="swiglu"),
    "llama-135m":        _model( 49152, 30,  9,  576, 2048, n_kv_heads=3, d_ff=1536, **_LLAMA, rope_theta=100000.0),
}

_T = TrainConfig
TRAINING: dict[str, TrainConfig] = {
    "demo": _T(steps=1800, batch_size=8, optimizer="muon", lr=1e-2, schedule="wsd"),
    "shakespeare-speedrun": _T(steps=1350, batch_size=16, optimizer="muon", lr=1e-2, muon_table_decay=1.0, muon_steps=4,
                               schedule="wsd", decay_steps=810, warmup=27),
    "shakespeare-char": _T(steps=5000, batch_size=64, lr=1e-3, min_lr=1e-4, warmup=100, b2=0.99),
    "shakespeare-char-cpu": _T(steps=2000, batch_size=12, lr=1e-3, min_lr=1e-4, warmup=100, b2=0.99),
    "ryan-12m": _T(steps=80_000, batch_size=32, micro_batches=2, lr=6e-4, min_lr=6e-5, warmup=2000),
    "gpt2": _T(steps=600_000, batch_size=12, micro_batches=40, lr=6e-4, min_lr=6e-5, warmup=2000),
    "tinystories-100m": _T(steps=100_000, batch_size=8, lr=3e-4, min_lr=3e-5, warmup=2000),
    "llama-135m": _T(steps=100_000, batch_size=8, micro_batches=32, lr=3e-3, schedule="wsd", warmup=2000),
}
_LARGER = ("gpt2-medium", "gpt2-large", "gpt2-xl")
TRAINING |= {"shakespeare-speedrun-pure": TRAINING["shakespeare-speedrun"], **dict.fromkeys(_LARGER, TRAINING["gpt2"])}

FINETUNING: dict[str, TrainConfig] = {
    "demo": _T(steps=1800, batch_size=8, optimizer="muon", lr=5e-3, schedule="linear"),
    "ryan-12m": _T(steps=1000, batch_size=32, micro_batches=2, lr=3e-5, min_lr=3e-6, warmup=50, documents="apart"),
    "gpt2": _T(steps=5000, batch_size=4, micro_batches=4, lr=1e-5, warmup=100, dropout=0.1, documents="apart"),
}
FINETUNING |= dict.fromkeys(_LARGER, FINETUNING["gpt2"])
# fmt: on


def schedule_of(train: TrainConfig, peak: float) -> optim.Schedule:
    """The learning rate over steps, rising to `peak`; the floor keeps the ratio min_lr / lr."""
    floor = peak * train.min_lr / train.lr if train.lr else 0.0
    if train.schedule == "cosine":
        return optim.warmup_cosine(peak, train.warmup, train.steps, floor)
    if train.schedule == "linear":
        return optim.warmup_linear(peak, train.warmup, train.steps, floor)
    if train.schedule == "wsd":
        usual = max(1, min(train.steps // 5, train.steps - train.warmup))
        decay = usual if train.decay_steps is None else train.decay_steps
        return optim.warmup_stable_decay(peak, train.warmup, train.steps, decay, floor)
    if train.schedule == "inverse-sqrt":
        return optim.inverse_sqrt(peak, train.warmup)
    return optim.constant(peak)


def optimizer_of(train: TrainConfig, cfg: ModelConfig) -> Transform:
    """The optimizer that a TrainConfig names, for a model: decay on matrices and adapters, rates by layer and by name,
    muP's rates where the model is muP.
    """
    lr, decay, clip = schedule_of(train, train.lr), train.weight_decay, train.clip
    stored = torch.bfloat16 if train.moments == "bf16" else None
    if train.optimizer == "muon":
        rate, b1, b2 = schedule_of(train, train.muon_lr), train.b1, train.b2
        inner = optim.muon(rate, is_hidden_matrix, lr, steps=train.muon_steps, decay=decay,
                           b1=b1, b2=b2, adam_decay=train.muon_table_decay, adam_mask=is_decayed, clip=clip,
                           moments_dtype=stored)  # fmt: skip
    elif train.optimizer == "adamw":
        inner = optim.adamw(lr, train.b1, train.b2, decay=decay, mask=is_decayed, clip=clip, moments_dtype=stored)
    elif train.optimizer == "adam":
        inner = optim.adam(lr, train.b1, train.b2, clip=clip, moments_dtype=stored)
    elif train.optimizer == "lion":
        inner = optim.lion(lr, decay=decay, mask=is_decayed, clip=clip)
    elif train.optimizer == "adafactor":
        inner = optim.adafactor(lr, decay=decay, mask=is_decayed, clip=clip)
    else:
        inner = optim.sgd(lr, momentum=train.b1, nesterov=True, decay=decay, mask=is_decayed, clip=clip)
    return _tailed(inner, train, cfg)


def is_decayed(name: str) -> bool:
    """What weight decay draws to zero: matrices, and adapters, whose product is added to one."""
    return is_matrix(name) or is_adapter(name)


def _tailed(inner: Transform, train: TrainConfig, cfg: ModelConfig) -> Transform:
    links = {"main": inner}
    if cfg.init == "mup":
        links["mup"] = optim.scale_by_name(lambda name: mup_lr_scale(cfg, name))
    if rates := rates_of(cfg, train):
        links["rates"] = optim.scale_by_name(rates.__getitem__)
    if train.ema is not None:
        links["ema"] = optim.ema_params(train.ema)
    return inner if len(links) == 1 else optim.chain(**links)


def trained_model(cfg: ModelConfig, train: TrainConfig) -> ModelConfig:
    """The model as this training sees it: its dropouts replaced where the TrainConfig sets one."""
    if train.dropout is None:
        return cfg
    return replace(cfg, dropout_embed=train.dropout, dropout_attn=train.dropout, dropout_residual=train.dropout)


def windowed(cfg: ModelConfig, train: TrainConfig) -> ModelConfig:
    """The model on the windows that it is trained with, whose `length` may be less than its own.

    ValueError for more, and for less where positions are learned.
    """
    if train.length is None or train.length == cfg.seq_len:
        return cfg
    if train.length > cfg.seq_len:
        raise ValueError(f"length={train.length} is more than seq_len={cfg.seq_len}; choose at most that")
    if cfg.positions == "learned":
        raise ValueError(f"length={train.length} would leave learned positions untrained; leave length out")
    return replace(cfg, seq_len=train.length)
