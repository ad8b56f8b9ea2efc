"""Models by name, each a line, and the settings they are trained and finetuned with; and a TrainConfig's optimizer."""

from __future__ import annotations

from dataclasses import replace

from fnlm import optim
from fnlm.config import ModelConfig, TrainConfig
from fnlm.params import is_hidden_matrix, is_matrix, mup_lr_scale
from fnlm.types import Transform


def _gpt2(n_layers: int, n_heads: int, d_model: int) -> ModelConfig:
    """Radford et al. 2019, table 2: learned positions, tanh GELU, biases, a tied head."""
    return ModelConfig(vocab_size=50257, n_layers=n_layers, n_heads=n_heads, d_model=d_model, seq_len=1024, mlp="gelu-tanh", bias=True)  # fmt: skip


# fmt: off
PRESETS: dict[str, ModelConfig] = {
    # Ours: small enough to learn its world in minutes on a laptop.
    "demo": ModelConfig(vocab_size=512, n_layers=4, n_heads=2, d_model=128, seq_len=128, mlp="relu2", positions="rope", norm="rmsnorm", norm_affine=False, qk_norm=True, tied=False, init="fan-in", zero_init_out=True, zero_init_head=True, embed_norm=True, ngrams=((2, 16384),)),
    # The lowest loss on Tiny Shakespeare within a budget of seconds, and the same without n-gram embeddings.
    "shakespeare-speedrun": ModelConfig(vocab_size=65, n_layers=5, n_heads=2, d_model=128, seq_len=128, mlp="relu2", positions="rope", rope_theta=1000.0, norm_affine=False, qk_norm=True, tied=False, init="fan-in", zero_init_out=True, zero_init_head=True, embed_norm=True, ngrams=((2, 4356), (3, 16384), (4, 65536))),
    "shakespeare-speedrun-pure": ModelConfig(vocab_size=65, n_layers=5, n_heads=2, d_model=128, seq_len=128, mlp="relu2", positions="rope", rope_theta=1000.0, norm_affine=False, qk_norm=True, tied=False, init="fan-in", zero_init_out=True, zero_init_head=True, embed_norm=True),
    # nanoGPT's two character models.
    "shakespeare-char": ModelConfig(vocab_size=65, n_layers=6, n_heads=6, d_model=384, seq_len=256, dropout_embed=0.2, dropout_attn=0.2, dropout_residual=0.2),
    "shakespeare-char-cpu": ModelConfig(vocab_size=65, n_layers=4, n_heads=4, d_model=128, seq_len=64),
    # Ryan-GPT: 12,492,800 weights outside the norms.
    "ryan-12m": ModelConfig(vocab_size=16000, n_layers=6, n_heads=5, d_model=320, seq_len=512, d_ff=1280, positions="rope"),
    # OpenAI's four.
    "gpt2": _gpt2(12, 12, 768),
    "gpt2-medium": _gpt2(24, 16, 1024),
    "gpt2-large": _gpt2(36, 20, 1280),
    "gpt2-xl": _gpt2(48, 25, 1600),
    # TinyStories-GPT: d_ff is two thirds of 4 d, as SwiGLU has three matrices.
    "tinystories-100m": ModelConfig(vocab_size=100277, n_layers=12, n_heads=12, d_model=768, seq_len=1024, d_ff=2048, positions="rope", mlp="swiglu"),
    # The Llama shape (Touvron et al. 2023, with grouped queries), at the size of SmolLM2-135M.
    "llama-135m": ModelConfig(vocab_size=49152, n_layers=30, n_heads=9, n_kv_heads=3, d_model=576, seq_len=2048, d_ff=1536, norm="rmsnorm", mlp="swiglu", positions="rope", rope_theta=100000.0),
}

TRAINING: dict[str, TrainConfig] = {
    "demo": TrainConfig(steps=3000, batch_size=16, optimizer="muon", lr=4e-3, schedule="wsd", weight_decay=0.1),
    "shakespeare-speedrun": TrainConfig(steps=1350, batch_size=16, optimizer="muon", lr=4e-3, muon_steps=4, schedule="wsd", decay_steps=810, warmup=27, weight_decay=0.1),
    "shakespeare-char": TrainConfig(steps=5000, batch_size=64, lr=1e-3, min_lr=1e-4, warmup=100, b2=0.99),
    "shakespeare-char-cpu": TrainConfig(steps=2000, batch_size=12, lr=1e-3, min_lr=1e-4, warmup=100, b2=0.99),
    "ryan-12m": TrainConfig(steps=80_000, batch_size=32, micro_batches=2, lr=6e-4, min_lr=6e-5, warmup=2000),
    "gpt2": TrainConfig(steps=600_000, batch_size=12, micro_batches=40, lr=6e-4, min_lr=6e-5, warmup=2000),
    "tinystories-100m": TrainConfig(steps=100_000, batch_size=8, lr=3e-4, min_lr=3e-5, warmup=2000),
    "llama-135m": TrainConfig(steps=100_000, batch_size=8, micro_batches=32, lr=3e-3, schedule="wsd", warmup=2000),
}
TRAINING |= {"shakespeare-speedrun-pure": TRAINING["shakespeare-speedrun"]}
TRAINING |= {name: TRAINING["gpt2"] for name in ("gpt2-medium", "gpt2-large", "gpt2-xl")}

_GPT2_FINETUNE = TrainConfig(steps=5000, batch_size=4, micro_batches=4, lr=1e-5, warmup=100, dropout=0.1)
FINETUNING: dict[str, TrainConfig] = {
    "demo": TrainConfig(steps=1000, batch_size=16, optimizer="muon", lr=1e-3, muon_lr=5e-3, schedule="linear"),
    "ryan-12m": TrainConfig(steps=1000, batch_size=32, micro_batches=2, lr=3e-5, min_lr=3e-6, warmup=50),
    **{name: _GPT2_FINETUNE for name in ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")},
}
# fmt: on


def schedule_of(train: TrainConfig, peak: float) -> optim.Schedule:
    """The learning rate over steps, rising to `peak`; the floor keeps the ratio min_lr / lr."""
    floor = peak * train.min_lr / train.lr if train.lr else 0.0
    if train.schedule == "cosine":
        return optim.warmup_cosine(peak, train.warmup, train.steps, floor)
    if train.schedule == "linear":
        return optim.warmup_linear(peak, train.warmup, train.steps, floor)
    if train.schedule == "wsd":
        decay = train.steps // 5 if train.decay_steps is None else train.decay_steps
        return optim.warmup_stable_decay(peak, train.warmup, train.steps, decay, floor)
    if train.schedule == "inverse-sqrt":
        return optim.inverse_sqrt(peak, train.warmup)
    return optim.constant(peak)


def optimizer_of(train: TrainConfig, cfg: ModelConfig) -> Transform:
    """The optimizer that a TrainConfig names, for a model: decay on matrices, muP's rates where the model asks for them."""
    lr, decay, clip = schedule_of(train, train.lr), train.weight_decay, train.clip
    if train.optimizer == "muon":
        inner = optim.muon(
            schedule_of(train, train.muon_lr), is_hidden_matrix, lr, steps=train.muon_steps, decay=decay, b1=train.b1, b2=train.b2, clip=clip
        )  # fmt: skip
    elif train.optimizer == "adamw":
        inner = optim.adamw(lr, train.b1, train.b2, decay=decay, mask=is_matrix, clip=clip)
    elif train.optimizer == "adam":
        inner = optim.adam(lr, train.b1, train.b2, clip=clip)
    elif train.optimizer == "lion":
        inner = optim.lion(lr, decay=decay, mask=is_matrix, clip=clip)
    elif train.optimizer == "adafactor":
        inner = optim.adafactor(lr, decay=decay, mask=is_matrix, clip=clip)
    else:
        inner = optim.sgd(lr, momentum=train.b1, nesterov=True, decay=decay, mask=is_matrix, clip=clip)
    return _tailed(inner, train, cfg)


def _tailed(inner: Transform, train: TrainConfig, cfg: ModelConfig) -> Transform:
    links = {"main": inner}
    if cfg.init == "mup":
        links["mup"] = optim.scale_by_name(lambda name: mup_lr_scale(cfg, name))
    if train.ema is not None:
        links["ema"] = optim.ema_params(train.ema)
    return inner if len(links) == 1 else optim.chain(**links)


def trained_model(cfg: ModelConfig, train: TrainConfig) -> ModelConfig:
    """The model as this training sees it: its dropouts replaced where the TrainConfig sets one."""
    if train.dropout is None:
        return cfg
    return replace(cfg, dropout_embed=train.dropout, dropout_attn=train.dropout, dropout_residual=train.dropout)
