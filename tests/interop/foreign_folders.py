"""Small models of each family as Hugging Face lays them out, made without transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

import fnlm
from fnlm.interop.families import FAMILIES, Family, weights
from fnlm.interop.ties import join
from fnlm.params import shapes

SMALL: dict[str, Any] = {"vocab_size": 300, "n_layers": 2, "n_heads": 4, "d_model": 32, "d_ff": 48, "seq_len": 24}
_ROPE = {**SMALL, "positions": "rope"}
_LLAMA = {**_ROPE, "norm": "rmsnorm", "mlp": "swiglu", "norm_eps": 1e-6}
CONFIGS: dict[str, list[dict[str, Any]]] = {
    "GPT2LMHeadModel": [
        {**SMALL, "bias": True},
        {**SMALL, "bias": True, "mlp": "relu", "tied": False},
        {**SMALL, "bias": True, "mlp": "gelu-tanh", "norm_eps": 1e-6},
    ],
    "LlamaForCausalLM": [
        {**_LLAMA, "n_kv_heads": 2},
        {**_LLAMA, "n_kv_heads": 1, "d_head": 12, "tied": False, "bias": True, "rope_theta": 500.0},
        {**_LLAMA, "rope_scaling": "linear", "rope_factor": 4.0},
        {**_LLAMA, "rope_scaling": "llama3", "rope_factor": 8.0, "rope_original": 8, "rope_high": 4.0},
        {**_LLAMA, "rope_scaling": "yarn", "rope_factor": 4.0, "rope_original": 6},
    ],
    "MistralForCausalLM": [{**_LLAMA, "n_kv_heads": 2, "window": 5, "tied": False}],
    "Qwen2ForCausalLM": [{**_LLAMA, "n_kv_heads": 2, "qkv_bias": True}],
    "Qwen3ForCausalLM": [{**_LLAMA, "n_kv_heads": 2, "d_head": 10, "qk_norm": True}],
    "GPTNeoXForCausalLM": [
        {**_ROPE, "bias": True, "rope_fraction": 0.25, "parallel_residual": True, "tied": False},
        {**_ROPE, "bias": True, "mlp": "gelu-tanh"},
    ],
    "StableLmForCausalLM": [
        {**_ROPE, "mlp": "swiglu", "n_kv_heads": 2, "norm_bias": True, "rope_fraction": 0.25, "tied": False},
        {**_ROPE, "mlp": "swiglu", "norm_bias": True, "qkv_bias": True, "rope_fraction": 0.5},
    ],
}
CASES = [(family, values) for family in FAMILIES for values in CONFIGS[family.architecture]]
NAMES = [f"{family.model_type}-{i}" for family in FAMILIES for i in range(len(CONFIGS[family.architecture]))]


def params_of(cfg: fnlm.ModelConfig) -> fnlm.Params:
    """Parameters none of which is 0 or 1, norms and biases included."""
    made = torch.Generator().manual_seed(1)
    return {k: 0.2 * torch.randn(s, generator=made) + k.endswith("norm.weight") for k, s in shapes(cfg).items()}


def written(folder: Path, family: Family, values: dict[str, Any], **config: Any) -> tuple[Any, fnlm.Params]:
    """A folder of this family, and what it holds."""
    cfg = fnlm.ModelConfig(**values)
    params = params_of(cfg)
    own = {"architectures": [family.architecture], "model_type": family.model_type, **family.described(cfg)}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({**own, **config}))
    tensors = {t.theirs: join(t, params, cfg).contiguous() for t in weights(cfg, family)}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "tokenizer.json").write_text(BYTES)
    return cfg, params


def _bytes() -> str:
    from fnlm.interop.vocabulary import from_merges
    from fnlm.tokenizers.byte_level import CHARACTER

    return from_merges({CHARACTER[b]: b for b in range(256)} | {"<|endoftext|>": 256}, [], {"<|endoftext|>": 256})


BYTES = _bytes()
