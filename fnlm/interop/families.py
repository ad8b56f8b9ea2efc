"""The families of Hugging Face's that our forward computes: their configs, their tensors, and what has no home there.

GPT-2: learned positions, Conv1D. Llama, with Mistral (a window), Qwen2 (biases of q, k and v), Qwen3 (QK norm):
RMSNorm, SwiGLU, RoPE. GPT-NeoX (Pythia): LayerNorm, part of each head rotated. StableLM: LayerNorm, SwiGLU, RoPE.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from fnlm.config import ModelConfig
from fnlm.interop.described import Described, rope_of, rope_to
from fnlm.interop.ties import Tie, tie

ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_new": "gelu-tanh",
    "gelu_pytorch_tanh": "gelu-tanh",
    "gelu_fast": "gelu-tanh",
    "relu": "relu",
    "relu2": "relu2",
}
THEIRS = {"gelu": "gelu", "gelu-tanh": "gelu_new", "relu": "relu", "relu2": "relu2"}
SILU = {"silu": "swiglu", "swish": "swiglu"}
BOTH = ("weight", "bias")


class Family(NamedTuple):
    """One architecture.

    `config` reads theirs, `described` writes it; `home` says which values of our fields it has (fields not named: any),
    `full` what it always has; `ties` go through all tensors but the tied head; `ignored` are endings of buffers.
    """

    architecture: str
    model_type: str
    config: Callable[[Described], ModelConfig]
    described: Callable[[ModelConfig], dict[str, Any]]
    ties: Callable[[ModelConfig], Iterator[Tie]]
    home: dict[str, tuple[Any, ...]]
    full: dict[str, Any]
    head: str = "lm_head.weight"
    prefix: str = "model."
    ignored: tuple[str, ...] = ()
    tied: bool = False


def weights(cfg: ModelConfig, family: Family) -> list[Tie]:
    """All their tensors; of a tied head there is none."""
    return [*family.ties(cfg), *([] if cfg.tied else [Tie(family.head, ("head.weight",))])]


def _kinds(bias: bool) -> tuple[str, ...]:
    return BOTH if bias else BOTH[:1]


def _gpt2(c: Described) -> ModelConfig:
    c.must(scale_attn_weights=True, scale_attn_by_inverse_layer_idx=False, add_cross_attention=False)
    return c.model(
        vocab_size=c.whole("vocab_size", 50257), n_layers=c.whole("n_layer", 12), n_heads=c.whole("n_head", 12),
        d_model=c.whole("n_embd", 768), seq_len=c.whole("n_positions", 1024), norm="layernorm", positions="learned",
        d_ff=c.whole("n_inner", 4 * c.whole("n_embd", 768)), norm_eps=c.number("layer_norm_epsilon", 1e-5), bias=True,
        mlp=c.chosen("activation_function", "gelu_new", ACTIVATIONS), tied=bool(c.get("tie_word_embeddings", True)),
    )  # fmt: skip


def _to_gpt2(cfg: ModelConfig) -> dict[str, Any]:
    return {
        "vocab_size": cfg.vocab_size, "n_layer": cfg.n_layers, "n_head": cfg.n_heads, "n_embd": cfg.d_model,
        "n_positions": cfg.seq_len, "n_ctx": cfg.seq_len, "n_inner": cfg.ff_dim, "layer_norm_epsilon": cfg.norm_eps,
        "activation_function": THEIRS[cfg.mlp], "tie_word_embeddings": cfg.tied,
        "attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0,
    }  # fmt: skip


def _gpt2_ties(cfg: ModelConfig) -> Iterator[Tie]:
    yield Tie("transformer.wte.weight", ("embed.tokens.weight",))
    yield Tie("transformer.wpe.weight", ("embed.positions.weight",))
    for i in range(cfg.n_layers):
        block, own = f"transformer.h.{i}", f"blocks.{i}"
        yield from tie(f"{block}.ln_1", f"{own}.attn_norm", BOTH)
        for kind in BOTH:
            ours = (f"{own}.attn.q.{kind}", f"{own}.attn.k.{kind}", f"{own}.attn.v.{kind}")
            yield Tie(f"{block}.attn.c_attn.{kind}", ours, "transposed")
        yield from tie(f"{block}.attn.c_proj", f"{own}.attn.out", BOTH, "transposed")
        yield from tie(f"{block}.ln_2", f"{own}.mlp_norm", BOTH)
        yield from tie(f"{block}.mlp.c_fc", f"{own}.mlp.up", BOTH, "transposed")
        yield from tie(f"{block}.mlp.c_proj", f"{own}.mlp.down", BOTH, "transposed")
    yield from tie("transformer.ln_f", "norm", BOTH)


def _sizes(c: Described) -> dict[str, Any]:
    """What the Llama family, GPT-NeoX and StableLM call alike."""
    return {
        "vocab_size": c.whole("vocab_size"), "n_layers": c.whole("num_hidden_layers"), "positions": "rope",
        "n_heads": c.whole("num_attention_heads"), "d_model": c.whole("hidden_size"),
        "d_ff": c.whole("intermediate_size"), "seq_len": c.whole("max_position_embeddings"),
        "tied": bool(c.get("tie_word_embeddings", False)),
    }  # fmt: skip


def _to_sizes(cfg: ModelConfig) -> dict[str, Any]:
    return {
        "vocab_size": cfg.vocab_size, "num_hidden_layers": cfg.n_layers, "num_attention_heads": cfg.n_heads,
        "hidden_size": cfg.d_model, "intermediate_size": cfg.ff_dim, "max_position_embeddings": cfg.seq_len,
        "tie_word_embeddings": cfg.tied,
    }  # fmt: skip


def _llama_like(c: Described, **own: Any) -> ModelConfig:
    sizes = _sizes(c)
    heads = c.whole("num_key_value_heads", sizes["n_heads"])
    d_head = c.whole("head_dim") if c.get("head_dim") else None
    mlp, eps = c.chosen("hidden_act", "silu", SILU), c.number("rms_norm_eps", 1e-6)
    more = {"n_kv_heads": heads, "d_head": d_head, "mlp": mlp, "norm": "rmsnorm", "norm_eps": eps}
    return c.model(**{**sizes, **more, **rope_of(c), **own})


def _llama(c: Described) -> ModelConfig:
    bias = bool(c.get("attention_bias", False))
    c.must(mlp_bias=bias, pretraining_tp=1)
    return _llama_like(c, bias=bias)


def _mistral(c: Described) -> ModelConfig:
    window = c.whole("sliding_window") if c.get("sliding_window") else None
    return _llama_like(c, window=window)


def _qwen2(c: Described) -> ModelConfig:
    c.must(use_sliding_window=False)
    return _llama_like(c, qkv_bias=True)


def _qwen3(c: Described) -> ModelConfig:
    c.must(use_sliding_window=False, attention_bias=False)
    return _llama_like(c, qk_norm=True, d_head=c.whole("head_dim", 128))


def _to_llama_like(cfg: ModelConfig) -> dict[str, Any]:
    own = {"num_key_value_heads": cfg.kv_heads, "head_dim": cfg.head_dim, "hidden_act": "silu"}
    return {**_to_sizes(cfg), **own, "rms_norm_eps": cfg.norm_eps, **rope_to(cfg), "attention_dropout": 0.0}


def _to_llama(cfg: ModelConfig) -> dict[str, Any]:
    return {**_to_llama_like(cfg), "attention_bias": cfg.bias, "mlp_bias": cfg.bias}


def _to_mistral(cfg: ModelConfig) -> dict[str, Any]:
    return {**_to_llama_like(cfg), "sliding_window": cfg.window}


def _to_qwen(cfg: ModelConfig) -> dict[str, Any]:
    return {**_to_llama_like(cfg), "use_sliding_window": False, "attention_bias": False}


def _llama_ties(cfg: ModelConfig) -> Iterator[Tie]:
    norms, linear, qkv = (
        _kinds(x) for x in (cfg.has_norm_bias and cfg.norm == "layernorm", cfg.bias, cfg.has_qkv_bias)
    )
    yield Tie("model.embed_tokens.weight", ("embed.tokens.weight",))
    for i in range(cfg.n_layers):
        block, own = f"model.layers.{i}", f"blocks.{i}"
        yield from tie(f"{block}.input_layernorm", f"{own}.attn_norm", norms)
        for name in "qkv":
            yield from tie(f"{block}.self_attn.{name}_proj", f"{own}.attn.{name}", qkv)
        yield from tie(f"{block}.self_attn.o_proj", f"{own}.attn.out", linear)
        for name in "qk" if cfg.qk_norm else "":
            yield from tie(f"{block}.self_attn.{name}_norm", f"{own}.attn.{name}_norm", norms)
        yield from tie(f"{block}.post_attention_layernorm", f"{own}.mlp_norm", norms)
        for name in ("gate", "up", "down"):
            yield from tie(f"{block}.mlp.{name}_proj", f"{own}.mlp.{name}", linear)
    yield from tie("model.norm", "norm", norms)


def _neox(c: Described) -> ModelConfig:
    c.must(attention_bias=True)
    own = rope_of(c, ("rotary_pct", 0.25), "rotary_emb_base")
    return c.model(
        **_sizes(c), **own, norm="layernorm", norm_eps=c.number("layer_norm_eps", 1e-5), bias=True,
        mlp=c.chosen("hidden_act", "gelu", ACTIVATIONS), parallel_residual=bool(c.get("use_parallel_residual", True)),
    )  # fmt: skip


def _to_neox(cfg: ModelConfig) -> dict[str, Any]:
    rope = rope_to(cfg)
    own = {"rotary_pct": cfg.rope_fraction, "rotary_emb_base": cfg.rope_theta, "layer_norm_eps": cfg.norm_eps}
    mlp = {"hidden_act": THEIRS[cfg.mlp], "use_parallel_residual": cfg.parallel_residual, "attention_bias": True}
    return {**_to_sizes(cfg), **rope, **own, **mlp, "attention_dropout": 0.0, "hidden_dropout": 0.0}


def _neox_ties(cfg: ModelConfig) -> Iterator[Tie]:
    yield Tie("gpt_neox.embed_in.weight", ("embed.tokens.weight",))
    for i in range(cfg.n_layers):
        block, own = f"gpt_neox.layers.{i}", f"blocks.{i}"
        yield from tie(f"{block}.input_layernorm", f"{own}.attn_norm", BOTH)
        for kind in BOTH:
            ours = (f"{own}.attn.q.{kind}", f"{own}.attn.k.{kind}", f"{own}.attn.v.{kind}")
            yield Tie(f"{block}.attention.query_key_value.{kind}", ours, "by head")
        yield from tie(f"{block}.attention.dense", f"{own}.attn.out", BOTH)
        yield from tie(f"{block}.post_attention_layernorm", f"{own}.mlp_norm", BOTH)
        yield from tie(f"{block}.mlp.dense_h_to_4h", f"{own}.mlp.up", BOTH)
        yield from tie(f"{block}.mlp.dense_4h_to_h", f"{own}.mlp.down", BOTH)
    yield from tie("gpt_neox.final_layer_norm", "norm", BOTH)


def _stablelm(c: Described) -> ModelConfig:
    c.must(qk_layernorm=False, use_parallel_residual=False)
    sizes = _sizes(c)
    own = rope_of(c, ("partial_rotary_factor", 0.25))
    return c.model(
        **sizes, **own, n_kv_heads=c.whole("num_key_value_heads", 32), norm="layernorm",
        norm_eps=c.number("layer_norm_eps", 1e-5), norm_bias=True, qkv_bias=bool(c.get("use_qkv_bias")) or None,
        mlp=c.chosen("hidden_act", "silu", SILU),
    )  # fmt: skip


def _to_stablelm(cfg: ModelConfig) -> dict[str, Any]:
    own = {"num_key_value_heads": cfg.kv_heads, "partial_rotary_factor": cfg.rope_fraction, "hidden_act": "silu"}
    rest = {"layer_norm_eps": cfg.norm_eps, "use_qkv_bias": cfg.has_qkv_bias, "qk_layernorm": False}
    dropped = {"use_parallel_residual": False, "attention_dropout": 0.0, "hidden_dropout": 0.0}
    return {**_to_sizes(cfg), **own, **rope_to(cfg), **rest, **dropped}


_PLAIN: dict[str, tuple[Any, ...]] = {
    "init": ("gpt2", "fan-in"),  # muP divides the logits
    "embed_norm": (False,),
    "logit_softcap": (None,),
    "ngrams": ((),),
    "token_shift": (0.0,),
    "window": (None,),
    "qk_norm": (False,),
    "parallel_residual": (False,),
}
_GELU = tuple(THEIRS)
_LEARNED = {"norm": ("layernorm",), "positions": ("learned",), "mlp": _GELU, "n_kv_heads": (None,), "d_head": (None,)}
_LLAMA = {"norm": ("rmsnorm",), "positions": ("rope",), "mlp": ("swiglu",), "rope_fraction": (1.0,)}
_LLAMA |= {"bias": (False,), "qkv_bias": (None,)}
_NEOX = {**_LEARNED, "positions": ("rope",), "parallel_residual": (False, True)}
_STABLE = {"norm": ("layernorm",), "positions": ("rope",), "mlp": ("swiglu",), "bias": (False,), "d_head": (None,)}
_ALL = {"norm_affine": True, "bias": True, "norm_bias": None, "qkv_bias": None}
_AFFINE = {"norm_affine": True}

GPT2 = Family(
    "GPT2LMHeadModel", "gpt2", _gpt2, _to_gpt2, _gpt2_ties, {**_PLAIN, **_LEARNED}, _ALL, prefix="transformer.",
    ignored=(".attn.bias", ".attn.masked_bias"), tied=True,
)  # fmt: skip
LLAMA = Family(
    "LlamaForCausalLM", "llama", _llama, _to_llama, _llama_ties, {**_PLAIN, **_LLAMA, "bias": (False, True)}, _AFFINE,
    ignored=(".rotary_emb.inv_freq",),
)  # fmt: skip
MISTRAL = LLAMA._replace(
    architecture="MistralForCausalLM", model_type="mistral", config=_mistral, described=_to_mistral,
    home={k: v for k, v in {**_PLAIN, **_LLAMA}.items() if k != "window"},
)  # fmt: skip
QWEN2 = LLAMA._replace(
    architecture="Qwen2ForCausalLM", model_type="qwen2", config=_qwen2, described=_to_qwen,
    home={**_PLAIN, **_LLAMA, "qkv_bias": (True,), "d_head": (None,)},
)  # fmt: skip
QWEN3 = LLAMA._replace(
    architecture="Qwen3ForCausalLM", model_type="qwen3", config=_qwen3, described=_to_qwen,
    home={**_PLAIN, **_LLAMA, "qk_norm": (True,)},
)  # fmt: skip
NEOX = Family(
    "GPTNeoXForCausalLM", "gpt_neox", _neox, _to_neox, _neox_ties, {**_PLAIN, **_NEOX}, _ALL, "embed_out.weight",
    "gpt_neox.", (".attention.bias", ".attention.masked_bias", ".attention.rotary_emb.inv_freq"),
)  # fmt: skip
STABLELM = Family(
    "StableLmForCausalLM", "stablelm", _stablelm, _to_stablelm, _llama_ties, {**_PLAIN, **_STABLE},
    {"norm_affine": True, "norm_bias": True}, ignored=(".rotary_emb.inv_freq",),
)  # fmt: skip
FAMILIES = (GPT2, LLAMA, MISTRAL, QWEN2, QWEN3, NEOX, STABLELM)
BY_ARCHITECTURE = {family.architecture: family for family in FAMILIES}
