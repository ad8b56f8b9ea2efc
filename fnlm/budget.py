"""What a model costs, as pure functions of its config: parameters by kind, FLOPs, the KV cache, memory."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from fnlm import tree
from fnlm.attended import suits
from fnlm.attention import BLOCK
from fnlm.blocked import keeps
from fnlm.config import Compute, ModelConfig, Precision, TrainConfig
from fnlm.data import Sizes
from fnlm.losses import chunk_rows
from fnlm.params import count, flops_per_token, is_hidden_matrix, is_norm, shapes
from fnlm.presets import optimizer_of, trained_model
from fnlm.trainable import subset_of

BYTES: dict[str, int] = {"fp32": 4, "bf16": 2, "fp16": 2}
_TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Counts(NamedTuple):
    """Parameters by kind: `embeddings` are the token (a tied head with it), n-gram and position tables; `hidden` the
    matrices of the blocks; `biases` those of linear maps."""

    total: int
    embeddings: int
    head: int
    norms: int
    hidden: int
    biases: int

    @property
    def without_embeddings(self) -> int:
        return self.total - self.embeddings

    @property
    def without_norms(self) -> int:
        return self.total - self.norms


def counts(cfg: ModelConfig) -> Counts:
    """How many parameters a model has, by kind."""
    kinds = dict.fromkeys(("embeddings", "head", "norms", "hidden", "biases"), 0)
    for name, shape in shapes(cfg).items():
        kinds[_kind(name)] += math.prod(shape)
    return Counts(count(cfg), **kinds)


def _kind(name: str) -> str:
    if is_norm(name):
        return "norms"
    if is_hidden_matrix(name):
        return "hidden"
    return "embeddings" if name.startswith("embed.") else "head" if name == "head.weight" else "biases"


def inference_flops_per_token(cfg: ModelConfig, seq_len: int | None = None) -> int:
    """The forward pass alone: a third of `flops_per_token`, whose backward pass counts twice the forward."""
    return flops_per_token(cfg, seq_len) // 3


def training_flops(cfg: ModelConfig, train: TrainConfig, seq_len: int | None = None) -> int:
    """FLOPs of all steps of a training, evaluation not counted."""
    return flops_per_token(cfg, seq_len) * training_tokens(cfg, train, seq_len)


def training_tokens(cfg: ModelConfig, train: TrainConfig, seq_len: int | None = None) -> int:
    """Tokens that a training sees, repetitions counted."""
    sizes = Sizes(train.ramp, train.batch_size * train.micro_batches)
    return sizes.first(train.steps) * (seq_len or cfg.seq_len)


def kv_cache_bytes(cfg: ModelConfig, tokens: int = 1, precision: Precision = "bf16") -> int:
    """Keys and values of every layer for so many positions of one sequence; a window is not deducted."""
    return 2 * cfg.n_layers * cfg.kv_heads * cfg.head_dim * tokens * BYTES[precision]


def parameter_bytes(cfg: ModelConfig, precision: Precision) -> int:
    """The parameters at rest in one precision."""
    return count(cfg) * BYTES[precision]


class TrainingMemory(NamedTuple):
    """Bytes alive at the end of a backward pass; see `training_memory`."""

    parameters: int
    optimizer_state: int
    low_precision_copy: int
    gradients: int
    activations: int

    @property
    def total(self) -> int:
        return sum(self)


def training_memory(cfg: ModelConfig, train: TrainConfig, seq_len: int | None = None) -> TrainingMemory:
    """What one device holds in a training step without sharding, in bytes; parts peak at different times.

    Parameters are float32; so are the moments, exactly as the optimizer makes them. The copy is the parameters in the
    precision computed in. Gradients have that precision, with several micro-batches float32 sums beside it, with fp16
    the unscaled ones. What is frozen, or has adapters, has neither moments nor gradients. Activations are
    `activation_bytes` of one micro-batch. Not in it: torch itself (0.2 GB on a CPU, more with a GPU's libraries), the
    temporaries of operations and of the optimizer, the allocator's slack, tokens, and a second copy of the parameters
    that the caller may hold. Peaks measured on a CPU lay 0.06 to 0.13 GB above.
    """
    n, size, subset = count(cfg), BYTES[train.precision], subset_of(cfg, train)
    trained = sum(math.prod(subset.sizes[name]) for name in subset.names)
    wide = 4 * trained if train.micro_batches > 1 or train.precision == "fp16" else 0
    return TrainingMemory(
        parameters=4 * (n + (trained if train.lora else 0)),
        optimizer_state=optimizer_bytes(cfg, train),
        low_precision_copy=0 if train.precision == "fp32" else size * n,
        gradients=size * trained + wide,
        activations=activation_bytes(trained_model(cfg, train), train.batch_size, seq_len, train.precision),
    )


def optimizer_bytes(cfg: ModelConfig, train: TrainConfig) -> int:
    """The optimizer's state, counted on the state itself, made without memory on the meta device."""
    sizes, own = subset_of(cfg, train).sizes, subset_of(cfg, train).names
    params = {name: torch.empty(shape, device="meta") for name, shape in sizes.items() if name in own}
    state = tree.flatten(optimizer_of(train, cfg).init(params))
    return sum(leaf.numel() * leaf.element_size() for leaf in state.values())


def activation_bytes(
    cfg: ModelConfig, batch_size: int, seq_len: int | None = None, precision: Precision = "bf16"
) -> int:
    """What the forward keeps for the backward, as with `Compute()` on a CPU, in bytes; an estimate.

    Values a token: in each block what `_block_values` says; at the end 2 D. Besides, once: each block's joint matrix
    of q, k and v, the gradient of the head, and one chunk of logits. Not in it: statistics of norms (two numbers each),
    tokens, position tables, temporaries of a single operation. A GPU's fused kernels keep somewhat less; `remat` and
    `compile` keep much less and somewhat less.
    """
    t = seq_len or cfg.seq_len
    d, v, rows, size = cfg.d_model, cfg.vocab_size, batch_size * t, BYTES[precision]
    library = suits(torch.empty(0, dtype=_TYPES[precision]), cfg, Compute()) and not cfg.dropout_attn
    joined = 0 if _by_hand(cfg, t, library) and not keeps(t) else cfg.n_layers * d * _qkv_width(cfg)
    once = joined + v * d + chunk_rows(rows, v * size, None) * v
    root = 2 * d + (cfg.embed_norm + (cfg.dropout_embed > 0)) * d
    return (rows * (cfg.n_layers * _block_values(cfg, t, size, library) + root) + once) * size


def _qkv_width(cfg: ModelConfig) -> int:
    return (cfg.n_heads + 2 * cfg.kv_heads) * cfg.head_dim


def _by_hand(cfg: ModelConfig, t: int, library: bool) -> bool:
    """Whether the sublayers with hand-written gradients compute a block."""
    return (library or t > BLOCK) and not (cfg.parallel_residual or cfg.dropout_attn or cfg.dropout_residual)


def _block_values(cfg: ModelConfig, t: int, size: int, library: bool) -> int:
    """Values of `size` bytes that a block keeps of one token.

    By hand: x twice, q, k, v and y: (H + 2 H_kv) K + H K, and F before the nonlinearity (SwiGLU: 2 F); up to KEEP
    positions also both norms' outputs, the attention weights, H times the keys seen, and F after the nonlinearity.
    Composed: norms: D for the input (RMSNorm: in float32, and as much again before its weight) and D for the output,
    twice, with QK norm their inputs too; attention: H times the keys seen, with dropout three times that; MLP: F before
    and F after the nonlinearity (SwiGLU: 4 F, ReLU: F); residuals: D for each dropout mask. Attention by the library
    keeps two float32 numbers a head, and neither weights nor what QK norm has read.
    """
    d, h, f = cfg.d_model, cfg.n_heads, cfg.ff_dim
    heads = _qkv_width(cfg) + h * cfg.head_dim
    seen = t if t <= BLOCK else (t + BLOCK) // 2
    weights = h * (2 * 4 // size if library else seen)
    if _by_hand(cfg, t, library):
        cheap = 2 * d + f + (0 if library else weights) if keeps(t) else 0
        return 2 * d + heads + (2 if cfg.mlp == "swiglu" else 1) * f + cheap + (weights if library else 0)
    kept = (1 + cfg.norm_affine) * 4 // size if cfg.norm == "rmsnorm" else 1
    shared = int(cfg.parallel_residual and cfg.norm == "layernorm")  # both norms keep the same tensor
    norms = (2 * (kept + 1) - shared) * d
    norms += kept * (h + cfg.kv_heads) * cfg.head_dim if cfg.qk_norm and not library else 0
    attention = (3 if cfg.dropout_attn else 1) * weights
    masks = 2 * d if cfg.dropout_residual else 0
    return norms + heads + attention + {"swiglu": 4, "relu": 1}.get(cfg.mlp, 2) * f + masks
