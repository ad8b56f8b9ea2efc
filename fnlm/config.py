"""What a model is (ModelConfig), how it is computed (Compute) and trained (TrainConfig): frozen, validated records."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

from fnlm.fields import at_least, check_ramp, did_you_mean, divisors, override
from fnlm.names import factors

__all__ = ["Compute", "ModelConfig", "TrainConfig", "check_ramp", "did_you_mean", "override"]

Norm = Literal["layernorm", "rmsnorm"]
Mlp = Literal["gelu", "gelu-tanh", "relu", "relu2", "swiglu"]
Positions = Literal["learned", "rope", "alibi", "none"]
RopeScaling = Literal["none", "linear", "llama3", "yarn"]
Init = Literal["gpt2", "fan-in", "mup"]
Kernels = Literal["auto", "plain", "sdpa"]
Remat = Literal["none", "block"]
Compile = Literal["off", "block", "step"]
Precision = Literal["fp32", "bf16", "fp16"]
Moments = Literal["fp32", "bf16"]
Documents = Literal["together", "apart"]
Optimizer = Literal["sgd", "adam", "adamw", "lion", "adafactor", "muon"]
Schedule = Literal["constant", "linear", "cosine", "wsd", "inverse-sqrt"]


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The architecture: everything that decides names, shapes and mathematics, nothing that decides speed.

    Raises ValueError with the offending numbers and the remedy.
    """

    vocab_size: int
    n_layers: int
    n_heads: int
    d_model: int
    seq_len: int
    n_kv_heads: int | None = None  # None: n_heads (multi-head); 1: multi-query; between: grouped-query attention
    d_head: int | None = None  # None: d_model / n_heads
    d_ff: int | None = None  # None: 4 d_model
    norm: Norm = "layernorm"
    norm_eps: float = 1e-5
    norm_affine: bool = True  # False: norms have no weights
    mlp: Mlp = "gelu"
    positions: Positions = "learned"
    rope_theta: float = 10000.0
    rope_fraction: float = 1.0  # the part of each head that is rotated
    rope_scaling: RopeScaling = "none"  # how a model trained on short texts was stretched to longer ones
    rope_factor: float = 1.0  # by how much, at least 1
    rope_original: int | None = None  # llama3 and yarn: the positions before
    rope_low: float = 1.0  # llama3 and yarn: waves that turn less often in rope_original positions are stretched,
    rope_high: float = 32.0  # those that turn more often are left alone
    tied: bool = True  # the head reads the token embedding
    bias: bool = False  # in every linear map and LayerNorm
    qkv_bias: bool | None = None  # of queries, keys and values; None: as bias
    norm_bias: bool | None = None  # of LayerNorms; None: as bias
    qk_norm: bool = False
    parallel_residual: bool = False  # attention and MLP read the same input (GPT-J, NeoX)
    embed_norm: bool = False  # a norm right after the embeddings
    logit_softcap: float | None = None
    window: int | None = None  # how many positions back a query sees, itself included; None: all
    dropout_embed: float = 0.0
    dropout_attn: float = 0.0
    dropout_residual: float = 0.0
    ngrams: tuple[tuple[int, int], ...] = ()  # (order, rows) of hashed n-gram input embeddings
    token_shift: float = 0.0  # this much of the embedding one position back is added to each
    dropout_ngram: float = 0.0  # whole rows of the orders above 2
    init: Init = "gpt2"
    init_std: float = 0.02
    zero_init_out: bool = False  # attention and MLP output projections start at zero
    zero_init_head: bool = False  # an untied head starts at zero
    mup_base: int = 256  # muP only: the width at which learning rates were tuned

    def __post_init__(self) -> None:
        _check_choices(self)
        for name in ("vocab_size", "n_layers", "n_heads", "d_model", "seq_len", "mup_base"):
            at_least(self, name, 1)
        for name in ("n_kv_heads", "d_head", "d_ff", "window"):
            if getattr(self, name) is not None:
                at_least(self, name, 1)
        for name in ("dropout_embed", "dropout_attn", "dropout_residual", "dropout_ngram"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} is not a probability below 1; choose 0 <= {name} < 1")
        if self.d_head is None and self.d_model % self.n_heads:
            raise ValueError(
                f"d_model={self.d_model} is not divisible by n_heads={self.n_heads}; "
                f"choose n_heads from {divisors(self.d_model)}, or give d_head"
            )
        if self.n_heads % self.kv_heads:
            raise ValueError(
                f"n_heads={self.n_heads} is not divisible by n_kv_heads={self.n_kv_heads}; "
                f"choose n_kv_heads from {divisors(self.n_heads)}"
            )
        self._check_positions()
        self._check_head()

    def _check_positions(self) -> None:
        if not 0 <= self.token_shift <= 1:
            raise ValueError(f"token_shift={self.token_shift} is not from 0 to 1; the usual value is 0.5")
        if self.norm_eps <= 0:
            raise ValueError(f"norm_eps={self.norm_eps} must be positive; the usual value is 1e-5")
        if self.positions == "rope" and (self.rope_dim % 2 or not 2 <= self.rope_dim <= self.head_dim):
            raise ValueError(
                f"rope rotates pairs, but rope_fraction={self.rope_fraction} of d_head={self.head_dim} is "
                f"{self.rope_dim} dimensions; choose a fraction that gives an even number from 2 to {self.head_dim}"
            )
        if self.rope_theta <= 0:
            raise ValueError(f"rope_theta={self.rope_theta} must be positive; the usual value is 10000")
        if self.rope_factor < 1:
            raise ValueError(f"rope_factor={self.rope_factor} must be at least 1; it is how much longer texts become")
        if self.rope_scaling in ("llama3", "yarn") and not self.rope_original:
            raise ValueError(f"rope_scaling={self.rope_scaling!r} needs rope_original, the positions trained before")
        if not 0 < self.rope_low < self.rope_high:
            raise ValueError(f"rope_low={self.rope_low} must lie between 0 and rope_high={self.rope_high}")
        for order, rows in self.ngrams:
            if order < 2 or rows < 1:
                raise ValueError(f"ngrams has ({order}, {rows}); choose an order of at least 2 and at least 1 row")
        if len({order for order, _ in self.ngrams}) < len(self.ngrams):
            raise ValueError(f"ngrams={self.ngrams} names an order twice; give each order once")

    def _check_head(self) -> None:
        if self.zero_init_head and self.tied:
            raise ValueError("zero_init_head=True needs an untied head: a tied one is the embedding; set tied=False")
        if self.logit_softcap is not None and self.logit_softcap <= 0:
            raise ValueError(f"logit_softcap={self.logit_softcap} must be positive; leave it out for no cap")

    @property
    def kv_heads(self) -> int:
        """Heads of keys and values."""
        return self.n_heads if self.n_kv_heads is None else self.n_kv_heads

    @property
    def head_dim(self) -> int:
        """K: the size of one head."""
        return self.d_model // self.n_heads if self.d_head is None else self.d_head

    @property
    def ff_dim(self) -> int:
        """F: the inner size of the MLP."""
        return 4 * self.d_model if self.d_ff is None else self.d_ff

    @property
    def has_qkv_bias(self) -> bool:
        """Whether the maps to queries, keys and values have biases."""
        return self.bias if self.qkv_bias is None else self.qkv_bias

    @property
    def has_norm_bias(self) -> bool:
        """Whether LayerNorms have biases."""
        return self.bias if self.norm_bias is None else self.norm_bias

    @property
    def rope_dim(self) -> int:
        """How many dimensions of each head RoPE rotates."""
        return round(self.head_dim * self.rope_fraction)

    @property
    def has_dropout(self) -> bool:
        """Whether a key changes the forward at all."""
        return any((self.dropout_embed, self.dropout_attn, self.dropout_residual, self.dropout_ngram))


@dataclass(frozen=True, kw_only=True)
class Compute:
    """How the same mathematics is computed; results agree to rounding.

    `kernels`: "auto" is the fastest that is right (flash attention on a GPU; blocked attention and a fused loss with
    hand-written gradients elsewhere; plain operations under torch.func transforms), "plain" is plain operations
    always, which torch.autograd can differentiate any number of times, "sdpa" is torch's attention on any device.
    `remat`: "block" recomputes each block in the backward pass: a fifth less memory, a fifth more time.
    `compile`: "block" is one graph for all layers, "step" one for the whole loss. `loss_chunks`: pieces of the fused
    loss; None chooses. `document_end` or `document_start`: the id that ends, or begins, a document; where one is set,
    no position of `forward` looks into a document before its own (`decode` is not concerned).
    """

    kernels: Kernels = "auto"
    remat: Remat = "none"
    compile: Compile = "off"
    loss_chunks: int | None = None
    document_end: int | None = None
    document_start: int | None = None

    def __post_init__(self) -> None:
        _check_choices(self)
        if self.loss_chunks is not None:
            at_least(self, "loss_chunks", 1)
        if self.document_end is not None and self.document_start is not None:
            raise ValueError("document_end and document_start are two ways to say one thing; set one of them")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How a model is trained: sizes in sequences and steps; a step sees batch_size x micro_batches sequences.

    Raises ValueError with the offending numbers and the remedy.
    """

    steps: int
    batch_size: int
    micro_batches: int = 1
    ramp: tuple[tuple[int, int], ...] = ()  # (until step, sequences of a step) pieces before the full size
    optimizer: Optimizer = "adamw"
    lr: float = 1e-3
    min_lr: float = 0.0
    warmup: int = 0
    schedule: Schedule = "cosine"
    decay_steps: int | None = None  # wsd only: the length of the final decay; None: a fifth of the steps
    b1: float = 0.9
    b2: float = 0.95
    weight_decay: float = 0.1
    clip: float | None = 1.0
    muon_lr: float = 0.02  # optimizer="muon": the rate of the hidden matrices; lr is that of the rest
    muon_steps: int = 5
    muon_table_decay: float = 0.0  # optimizer="muon": decay of embeddings and head, per unit of their rate lr
    moments: Moments = "fp32"  # how adam, adamw and muon store their running means; bf16 takes half the space
    ema: float | None = None
    dropout: float | None = None  # overrides the model's dropouts (embedding, attention, residual)
    documents: Documents = "together"  # apart: no token looks into another document of its window
    length: int | None = None  # tokens of a training window, up to the model's seq_len; None: seq_len
    freeze: str | None = None  # patterns of names, such as embed.*,blocks.[0-5].*: these parameters stay as they are
    layer_decay: float | None = None  # the rate of each layer is that of the one above it times this
    lr_scale: str | None = None  # patterns and factors, such as embed.*=0.1,norm=2: of the learning rate
    lora: int | None = None  # the rank of low-rank adapters, which alone are then trained
    lora_alpha: float | None = None  # adapters are added times alpha / rank; None: 2 rank
    lora_targets: str | None = None  # the maps that have them, by the ends of their names: q,v or attn.*; None: all
    precision: Precision = "bf16"
    seed: int = 1337

    def __post_init__(self) -> None:
        _check_choices(self)
        for name in ("steps", "batch_size", "micro_batches", "muon_steps"):
            at_least(self, name, 1)
        check_ramp(self.ramp)
        for _, size in self.ramp:
            if size > self.batch_size * self.micro_batches:
                raise ValueError(
                    f"ramp has {size} sequences, more than the full step of {self.batch_size * self.micro_batches}; "
                    "a ramp rises to batch_size x micro_batches"
                )
        if not 0 <= self.warmup <= self.steps:
            raise ValueError(f"warmup={self.warmup} does not fit into steps={self.steps}; choose 0 to {self.steps}")
        if not 0 <= self.min_lr <= self.lr:
            raise ValueError(f"min_lr={self.min_lr} must lie between 0 and lr={self.lr}")
        if self.moments == "bf16" and self.optimizer not in ("adam", "adamw", "muon"):
            raise ValueError(f"moments='bf16' is for adam, adamw and muon, not {self.optimizer}; leave moments out")
        if self.dropout is not None and not 0 <= self.dropout < 1:
            raise ValueError(f"dropout={self.dropout} is not a probability below 1")
        if self.ema is not None and not 0 <= self.ema < 1:
            raise ValueError(f"ema={self.ema} is outside [0, 1); choose e.g. 0.999")
        self._check_subset()

    def _check_subset(self) -> None:
        if self.length is not None:
            at_least(self, "length", 1)
        if self.layer_decay is not None and not 0 < self.layer_decay <= 1:
            raise ValueError(f"layer_decay={self.layer_decay} must lie above 0 and not above 1; 0.9 is usual")
        if self.lora is not None:
            at_least(self, "lora", 1)
        if self.lora is not None and self.freeze:
            raise ValueError("with lora all parameters are frozen but the adapters; leave freeze out")
        if self.lora is None and (self.lora_alpha is not None or self.lora_targets is not None):
            raise ValueError("lora_alpha and lora_targets are of adapters; give their rank too, as in lora=8")
        if self.lora_alpha is not None and self.lora_alpha <= 0:
            raise ValueError(f"lora_alpha={self.lora_alpha} must be positive; twice the rank is usual")
        _ = self.lr_scales

    @property
    def lr_scales(self) -> list[tuple[str, float]]:
        """The pairs of `lr_scale`. Raises ValueError for what is not PATTERN=FACTOR."""
        return factors("lr_scale", self.lr_scale or "")


_CHOICES: dict[str, tuple[str, ...]] = {
    name: get_args(alias)
    for name, alias in (
        ("norm", Norm), ("mlp", Mlp), ("positions", Positions), ("init", Init),
        ("rope_scaling", RopeScaling),
        ("kernels", Kernels), ("remat", Remat), ("compile", Compile), ("precision", Precision),
        ("optimizer", Optimizer), ("schedule", Schedule), ("moments", Moments),
    )
}  # fmt: skip


def _check_choices(config: Any) -> None:
    for f in fields(config):
        known, value = _CHOICES.get(f.name, ()), getattr(config, f.name)
        if known and value not in known:
            raise ValueError(f"{f.name}={value!r} is unknown{did_you_mean(str(value), known)}")
