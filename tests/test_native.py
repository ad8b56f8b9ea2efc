"""The native step is the torch step: every architecture, every weight type, any company, any number of threads."""

from __future__ import annotations

import os
import random
import shutil
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import fnlm
from fnlm import native
from fnlm.decode import KVCache, Prepared, decode, init_cache, prefill, prepare
from fnlm.native import build
from fnlm.params import shapes
from fnlm.quantize import quantize
from fnlm.types import Params
from tests.reference import BASE, CASES, random_params, random_tokens
from tests.test_decode import MORE

ALL = {**CASES, **MORE}
needs_library = pytest.mark.skipif(native.status().library is None, reason=native.status().says)
pytestmark = needs_library


def steps(ready: Prepared, cfg: fnlm.ModelConfig, tokens: Tensor, begin: int = 3) -> Tensor:
    """Logits (B, T, V) of tokens one by one, after a beginning that torch reads."""
    cache = init_cache(cfg, len(tokens), dtype=ready.root["embed.tokens.weight"].dtype)
    _, cache = decode(ready, tokens[:, :begin], cfg, cache, lengths=torch.full((len(tokens),), begin))
    out = []
    for t in range(begin, tokens.shape[1]):
        logits, cache = decode(ready, tokens[:, t : t + 1], cfg, cache)
        out.append(logits)
    return torch.stack(out, 1)


def close(cfg: fnlm.ModelConfig, params: Params, tolerance: float, rows: int = 2) -> None:
    """Within `tolerance` of the torch step in float64, or where the model itself is steep, as near as torch's float32."""
    own, plain = prepare(params, cfg), prepare(params, cfg, lowered=False)
    exact = prepare({k: v.double() for k, v in params.items()}, cfg)
    assert (own.native is not None, exact.native) == (True, None)
    tokens = random_tokens(cfg.vocab_size, rows, cfg.seq_len)
    want = steps(exact, cfg, tokens)
    error, usual = (float((steps(ready, cfg, tokens) - want).abs().max() / want.abs().max()) for ready in (own, plain))
    assert error <= max(tolerance, 4 * usual), (error, usual)


@pytest.mark.parametrize("name", ALL)
def test_float32_is_the_torch_step(name: str) -> None:
    cfg = fnlm.ModelConfig(**{**BASE, **ALL[name]})
    close(cfg, random_params(shapes(cfg), dtype=torch.float32), 1e-5)


@pytest.mark.parametrize("name", ["plain", "llama", "demo", "alibi-gqa", "parallel-gqa-window-bias"])
def test_bfloat16_is_nearer_to_float32_than_torch_is(name: str) -> None:
    cfg = fnlm.ModelConfig(**{**BASE, **ALL[name]})
    params = {k: v.bfloat16() for k, v in random_params(shapes(cfg), dtype=torch.float32).items()}
    tokens = random_tokens(cfg.vocab_size, 2, cfg.seq_len)
    want = steps(prepare({k: v.float() for k, v in params.items()}, cfg, lowered=False), cfg, tokens)
    own, plain = (
        float((steps(prepare(params, cfg, lowered=x), cfg, tokens) - want).abs().max()) for x in (True, False)
    )
    assert own <= plain + 1e-3, (own, plain)
    assert own <= 0.1 * float(want.abs().max())


def random_config(seed: int) -> fnlm.ModelConfig:
    draw = random.Random(seed)
    heads = draw.choice([1, 2, 3, 4, 6])
    head = draw.choice([2, 6, 8, 16, 18, 20, 64, 72])
    positions = draw.choice(["learned", "rope", "alibi", "none"])
    return fnlm.ModelConfig(
        vocab_size=draw.choice([11, 64, 131]), n_layers=draw.choice([1, 2]), n_heads=heads, d_head=head,
        d_model=draw.choice([5, 16, 32, 33, 48, 70]), seq_len=draw.choice([7, 21, 40]), d_ff=draw.choice([1, 17, 64, 90]),
        n_kv_heads=draw.choice([h for h in range(1, heads + 1) if heads % h == 0]), positions=positions,
        norm=draw.choice(["layernorm", "rmsnorm"]), norm_affine=draw.random() < 0.8, bias=draw.random() < 0.5,
        mlp=draw.choice(["gelu", "gelu-tanh", "relu", "relu2", "swiglu"]), qk_norm=draw.random() < 0.3,
        parallel_residual=draw.random() < 0.3, tied=draw.random() < 0.5, window=draw.choice([None, None, 1, 4, 30]),
        logit_softcap=draw.choice([None, 5.0]), init=draw.choice(["gpt2", "mup"]), token_shift=draw.choice([0, 0.5]),
        ngrams=draw.choice([(), ((2, 40), (3, 10))]), rope_fraction=draw.choice([1.0, 0.5]) if head % 4 == 0 else 1.0,
        embed_norm=draw.random() < 0.2,
    )  # fmt: skip


@pytest.mark.parametrize("seed", range(12))
def test_random_configs(seed: int) -> None:
    cfg = random_config(seed)
    close(cfg, random_params(shapes(cfg), dtype=torch.float32), 1e-5, rows=1 + seed % 10)


@pytest.mark.slow
def test_a_thousand_random_configs() -> None:
    for seed in range(100, 1100):
        cfg = random_config(seed)
        close(cfg, random_params(shapes(cfg), dtype=torch.float32), 1e-5, rows=1 + seed % 10)
