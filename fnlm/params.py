"""The parameters of a model: their names, shapes, groups, initial values, counts, and masks by name."""

from __future__ import annotations

import hashlib
import math
import re

import torch
from torch import Tensor

from fnlm import random
from fnlm.config import ModelConfig
from fnlm.types import Key, Params

Shape = tuple[int, ...]


def shapes(cfg: ModelConfig) -> dict[str, Shape]:
    """Every parameter's name and shape, in forward order; linear weights are (out, in)."""
    d = cfg.d_model
    out: dict[str, Shape] = {"embed.tokens.weight": (cfg.vocab_size, d)}
    out |= {f"embed.ngram{order}.weight": (rows, d) for order, rows in cfg.ngrams}
    if cfg.positions == "learned":
        out["embed.positions.weight"] = (cfg.seq_len, d)
    if cfg.embed_norm:
        out |= _norm("embed_norm", d, cfg)
    for i in range(cfg.n_layers):
        out |= {f"blocks.{i}.{name}": shape for name, shape in _block(cfg).items()}
    out |= _norm("norm", d, cfg)
    return out if cfg.tied else out | {"head.weight": (cfg.vocab_size, d)}


def _block(cfg: ModelConfig) -> dict[str, Shape]:
    d, f, q, kv = cfg.d_model, cfg.ff_dim, cfg.n_heads * cfg.head_dim, cfg.kv_heads * cfg.head_dim
    out = _norm("attn_norm", d, cfg)
    for name, o, i in (("q", q, d), ("k", kv, d), ("v", kv, d), ("out", d, q)):
        out |= _linear(f"attn.{name}", o, i, cfg.bias if name == "out" else cfg.has_qkv_bias)
    if cfg.qk_norm:
        out |= _norm("attn.q_norm", cfg.head_dim, cfg) | _norm("attn.k_norm", cfg.head_dim, cfg)
    out |= _norm("mlp_norm", d, cfg)
    for name in ("gate", "up") if cfg.mlp == "swiglu" else ("up",):
        out |= _linear(f"mlp.{name}", f, d, cfg.bias)
    return out | _linear("mlp.down", d, f, cfg.bias)


def _norm(name: str, n: int, cfg: ModelConfig) -> dict[str, Shape]:
    weight: dict[str, Shape] = {f"{name}.weight": (n,)} if cfg.norm_affine else {}
    biased = cfg.norm_affine and cfg.has_norm_bias and cfg.norm == "layernorm"
    bias: dict[str, Shape] = {f"{name}.bias": (n,)} if biased else {}
    return weight | bias


def _linear(name: str, n_out: int, n_in: int, bias: bool) -> dict[str, Shape]:
    return {f"{name}.weight": (n_out, n_in)} | ({f"{name}.bias": (n_out,)} if bias else {})


def init_params(
    cfg: ModelConfig, key: Key, *, dtype: torch.dtype = torch.float32, device: torch.device | str | None = None
) -> Params:
    """Fresh parameters: each tensor is drawn from its own key, so a name's values do not depend on the others."""
    out = {}
    for name, shape in shapes(cfg).items():
        std, own = init_std(name, shape, cfg), random.fold_in(key, number_of(name))
        if is_norm(name) and name.endswith(".weight"):
            x = torch.ones(shape, dtype=dtype)
        elif std == 0:
            x = torch.zeros(shape, dtype=dtype)
        else:
            x = random.normal(own, shape, dtype=dtype).mul_(std)
        out[name] = x.to(device or x.device)
    return out


def number_of(name: str) -> int:
    """A name as 63 bits."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little") >> 1


def init_std(name: str, shape: Shape, cfg: ModelConfig) -> float:
    """The standard deviation a parameter starts with.

        scheme   tokens, positions    n-gram rows   linear (out, in)        attn.out, mlp.down      head
        gpt2     std (0.02)           std           std                     std / sqrt(2 L)         std
        fan-in   1                    0             0.8 / sqrt(in)          the same                0.8 / sqrt(in)
        mup      std                  std           std sqrt(base / in)     the same / sqrt(2 L)    std

    Biases start at 0, and at 0 start output projections under `zero_init_out` and the head under `zero_init_head`
    (GPT-2: Radford et al. 2019, 2.3; muP: Yang et al. 2022, table 8, for Adam).
    """
    if name.endswith(".bias") or is_norm(name):
        return 0.0
    ends_residual = name.endswith((".attn.out.weight", ".mlp.down.weight"))
    if (ends_residual and cfg.zero_init_out) or (name == "head.weight" and cfg.zero_init_head):
        return 0.0
    if name.startswith("embed."):
        return cfg.init_std if cfg.init != "fan-in" else 0.0 if "ngram" in name else 1.0
    if cfg.init == "fan-in":
        return 0.8 / math.sqrt(shape[1])
    std = cfg.init_std
    if cfg.init == "mup" and name != "head.weight":
        std *= math.sqrt(cfg.mup_base / shape[1])
    return std / math.sqrt(2 * cfg.n_layers) if ends_residual else std


def mup_lr_scale(cfg: ModelConfig, name: str) -> float:
    """What muP multiplies Adam's rate by: base/in for matrices in blocks, else 1 (Yang et al. 2022, table 8)."""
    if cfg.init != "mup" or not is_matrix(name) or not name.startswith("blocks."):
        return 1.0
    return cfg.mup_base / dict(shapes(cfg))[name][1]


def is_norm(name: str) -> bool:
    """The weights and biases of norms."""
    return re.fullmatch(r"(.*[._])?norm\.(weight|bias)", name) is not None


def is_matrix(name: str) -> bool:
    """Weights that multiply: every `.weight` that is no norm's, embeddings and head too; the usual ones to decay."""
    return name.endswith(".weight") and not is_norm(name)


def is_hidden_matrix(name: str) -> bool:
    """The matrices inside blocks: those an orthogonalising optimizer such as Muon takes."""
    return name.startswith("blocks.") and is_matrix(name)


def count(cfg: ModelConfig) -> int:
    """The number of parameters; a tied head counts once."""
    return sum(math.prod(s) for s in shapes(cfg).values())


def flops_per_token(cfg: ModelConfig, seq_len: int | None = None) -> int:
    """Training FLOPs per token, forward and backward: 6 per multiplying weight + 12 L H K S for attention.

    Counted at full attention as peers do, lookups and norms not counted (PaLM: Chowdhery et al. 2022, appendix B).
    """
    s = min(seq_len or cfg.seq_len, cfg.window or cfg.seq_len)
    weights = sum(math.prod(shape) for name, shape in shapes(cfg).items() if is_hidden_matrix(name))
    weights += cfg.vocab_size * cfg.d_model
    return 6 * weights + 12 * cfg.n_layers * cfg.n_heads * cfg.head_dim * s


def zeros_like(params: Params) -> Params:
    """Zeros of the same shapes."""
    return {k: torch.zeros_like(v) for k, v in params.items()}


def cast(params: Params, dtype: torch.dtype) -> Params:
    """The same parameters in another dtype; those already in it are shared, not copied."""
    return {k: v.to(dtype) for k, v in params.items()}


def to_device(params: Params, device: torch.device | str) -> dict[str, Tensor]:
    """The same parameters on another device."""
    return {k: v.to(device) for k, v in params.items()}
