"""Which of Hugging Face's architectures computes what a config of ours does, and the model in its terms."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

from torch import Tensor

from fnlm.config import ModelConfig
from fnlm.interop.families import FAMILIES, Family, weights
from fnlm.interop.ties import filled, join
from fnlm.types import Params

FREE = {"vocab_size", "n_layers", "n_heads", "d_model", "seq_len", "n_kv_heads", "d_head", "d_ff", "norm_eps", "tied"}
FREE |= {"norm_affine", "bias", "qkv_bias", "norm_bias", "window", "norm", "mlp", "positions", "init", "init_std"}
FREE |= {"rope_theta", "rope_fraction", "rope_scaling", "rope_factor", "rope_original", "rope_low", "rope_high"}
FREE |= {
    "dropout_embed",
    "dropout_attn",
    "dropout_residual",
    "dropout_ngram",
    "zero_init_out",
    "zero_init_head",
    "mup_base",
}
"""Fields that a home has in any value, unless it says otherwise."""


def home(cfg: ModelConfig) -> Family:
    """The architecture that has all that `cfg` asks for. ValueError that names what the nearest one lacks."""
    found = sorted(((obstacles(cfg, family), i) for i, family in enumerate(FAMILIES)), key=lambda x: (len(x[0]), x[1]))
    lacking, i = found[0]
    if lacking:
        raise ValueError(
            f"no architecture of Hugging Face's has this: in the nearest, {FAMILIES[i].architecture}, there is no "
            f"{' and no '.join(lacking)}"
        )
    return FAMILIES[i]


def obstacles(cfg: ModelConfig, family: Family) -> list[str]:
    """The options, as name=value, that this architecture does not have."""
    known = {f.name: (f.default,) for f in fields(cfg) if f.name not in FREE} | family.home  # a new field is not theirs
    pairs = ((name, _value(cfg, name), allowed) for name, allowed in known.items())
    return [f"{name}={value!r}" for name, value, allowed in pairs if value not in allowed]


def _value(cfg: ModelConfig, name: str) -> Any:
    """A field's value, None where it changes nothing."""
    same = {
        "n_kv_heads": cfg.kv_heads == cfg.n_heads,
        "d_head": cfg.n_heads * cfg.head_dim == cfg.d_model,
        "window": cfg.window is not None and cfg.window >= cfg.seq_len,
        "qkv_bias": cfg.has_qkv_bias == cfg.bias,
    }
    return None if same.get(name) else getattr(cfg, name)


def cut(cfg: ModelConfig, params: Params, vocab_size: int) -> tuple[ModelConfig, Params]:
    """The model without the rows behind `vocab_size`, which stand for no token, so that nobody samples them."""
    rows: Params = {
        name: params[name][:vocab_size] for name in ("embed.tokens.weight", "head.weight") if name in params
    }
    return replace(cfg, vocab_size=vocab_size), {**params, **rows}


def theirs(cfg: ModelConfig, params: Params, family: Family) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The architecture's part of config.json, and its tensors by name, sorted as the safetensors library does.

    What it always has and the model has not is written so that it does nothing: biases of 0, norms of 1.
    """
    full = replace(cfg, **family.full)
    whole = filled(params, full)
    tensors = {tie.theirs: join(tie, whole, full) for tie in weights(full, family)}
    return family.described(full), {name: tensors[name] for name in sorted(tensors)}
