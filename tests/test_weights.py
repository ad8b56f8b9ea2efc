"""Real weights: two trained models of other people, loaded by hand, give their authors' logits."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import fnlm
from fnlm.params import shapes


def described(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


def gpt2(folder: Path) -> tuple[fnlm.ModelConfig, fnlm.Params]:
    """GPT-2 stores linear weights (in, out), and q, k and v as one."""
    c, theirs = described(folder), load_file(folder / "model.safetensors")
    cfg = fnlm.ModelConfig(
        vocab_size=c["vocab_size"], n_layers=c["n_layer"], n_heads=c["n_head"], d_model=c["n_embd"], bias=True,
        seq_len=c["n_positions"], norm_eps=c["layer_norm_epsilon"], tied=c["tie_word_embeddings"], mlp="gelu-tanh",
    )  # fmt: skip
    ours = {
        "embed.tokens.weight": theirs["transformer.wte.weight"],
        "embed.positions.weight": theirs["transformer.wpe.weight"],
        "head.weight": theirs["lm_head.weight"],
    }
    ours |= {f"norm.{x}": theirs[f"transformer.ln_f.{x}"] for x in ("weight", "bias")}
    parts = {
        "attn_norm": "ln_1",
        "mlp_norm": "ln_2",
        "attn.out": "attn.c_proj",
        "mlp.up": "mlp.c_fc",
        "mlp.down": "mlp.c_proj",
    }
    for i, kind in itertools.product(range(cfg.n_layers), ("weight", "bias")):
        block = f"transformer.h.{i}"
        for our, their in parts.items():
            value = theirs[f"{block}.{their}.{kind}"]
            ours[f"blocks.{i}.{our}.{kind}"] = value.T if value.ndim == 2 else value
        for name, value in zip("qkv", theirs[f"{block}.attn.c_attn.{kind}"].chunk(3, -1), strict=True):
            ours[f"blocks.{i}.attn.{name}.{kind}"] = value.T if value.ndim == 2 else value
    return cfg, {name: ours[name].contiguous() for name in shapes(cfg)}


def llama(folder: Path) -> tuple[fnlm.ModelConfig, fnlm.Params]:
    c, theirs = described(folder), load_file(folder / "model.safetensors")
    cfg = fnlm.ModelConfig(
        vocab_size=c["vocab_size"], n_layers=c["num_hidden_layers"], n_heads=c["num_attention_heads"],
        n_kv_heads=c["num_key_value_heads"], d_model=c["hidden_size"], d_ff=c["intermediate_size"], norm="rmsnorm",
        norm_eps=c["rms_norm_eps"], seq_len=c["max_position_embeddings"], positions="rope", mlp="swiglu",
        rope_theta=c["rope_parameters"]["rope_theta"], tied=c["tie_word_embeddings"],
    )  # fmt: skip
    ours = {"embed.tokens.weight": theirs["model.embed_tokens.weight"], "norm.weight": theirs["model.norm.weight"]}
    parts = {"attn_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"}
    parts |= {f"attn.{x}": f"self_attn.{x}_proj" for x in "qkv"} | {"attn.out": "self_attn.o_proj"}
    parts |= {f"mlp.{x}": f"mlp.{x}_proj" for x in ("gate", "up", "down")}
    for i, (our, their) in itertools.product(range(cfg.n_layers), parts.items()):
        ours[f"blocks.{i}.{our}.weight"] = theirs[f"model.layers.{i}.{their}.weight"]
    return cfg, {name: ours[name] for name in shapes(cfg)}


@pytest.fixture(scope="module")
def sorter(test_data: Path) -> tuple[Path, fnlm.ModelConfig, fnlm.Params]:
    folder = test_data / "weights" / "mingpt-nano-sort"
    return folder, *gpt2(folder)


@pytest.fixture(scope="module")
def teller(test_data: Path) -> tuple[Path, fnlm.ModelConfig, fnlm.Params]:
    folder = test_data / "weights" / "stories260K"
    return folder, *llama(folder)


@pytest.mark.parametrize("kernels", ["auto", "plain", "sdpa"])
def test_gpt2_logits(sorter: tuple[Path, fnlm.ModelConfig, fnlm.Params], kernels: Any) -> None:
    folder, cfg, params = sorter
    assert {k: tuple(v.shape) for k, v in params.items()} == shapes(cfg)
    published = load_file(folder / "reference-partials.safetensors")
    got = fnlm.forward(params, published["idx"].long(), cfg, compute=fnlm.Compute(kernels=kernels))
    torch.testing.assert_close(got, published["lm_head"], rtol=0, atol=1e-5)


def sorted_by(model: tuple[Path, fnlm.ModelConfig, fnlm.Params], letters: Tensor) -> Tensor:
    _, cfg, params = model
    n = letters.shape[1]
    for _ in range(n):
        letters = torch.cat([letters, fnlm.forward(params, letters, cfg)[:, -1:].argmax(-1)], 1)
    return letters[:, n:]


def test_the_sorting_model_sorts_all_inputs(sorter: tuple[Path, fnlm.ModelConfig, fnlm.Params]) -> None:
    inputs = torch.tensor(list(itertools.product(range(3), repeat=6)))
    assert len(inputs) == 729
    assert torch.equal(sorted_by(sorter, inputs), inputs.sort(-1).values)


@pytest.mark.parametrize("kernels", ["auto", "plain", "sdpa"])
def test_llama_logits(teller: tuple[Path, fnlm.ModelConfig, fnlm.Params], kernels: Any) -> None:
    folder, cfg, params = teller
    assert {k: tuple(v.shape) for k, v in params.items()} == shapes(cfg)
    assert (cfg.n_heads, cfg.kv_heads) == (8, 4)
    reference = load_file(folder / "reference-logits.safetensors")
    got = fnlm.forward(params, reference["input_ids"][None], cfg, compute=fnlm.Compute(kernels=kernels))[0]
    # Logits reach 20, and the reference, itself computed in float32, is 3.4e-5 from what float64 gives.
    torch.testing.assert_close(got, reference["logits"], rtol=0, atol=5e-5)


def test_llama_tells_its_story_better_than_chance(teller: tuple[Path, fnlm.ModelConfig, fnlm.Params]) -> None:
    folder, cfg, params = teller
    ids = load_file(folder / "reference-logits.safetensors")["input_ids"][None]
    batch = fnlm.Batch(ids[:, :-1], ids[:, 1:], torch.ones(1, 63))
    assert float(fnlm.lm_loss(params, batch, cfg)) < 3  # a uniform guess costs log(512) = 6.2
