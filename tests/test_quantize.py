"""Matrices in int8: how far off they are, and that decoding with them is forward with what they stand for."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

import fnlm
from fnlm.decode import decode, init_cache, prepare
from fnlm.linear import linear
from fnlm.params import shapes
from fnlm.quantize import dequantize, quantize
from fnlm.tree import equal
from tests.reference import BASE, CASES, random_params, random_tokens


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("name", CASES)
def test_decode_is_forward_with_what_the_steps_stand_for(name: str, bits: Any) -> None:
    cfg = fnlm.ModelConfig(**{**BASE, **CASES[name], **({"d_model": 96} if bits == 4 else {})})
    small = quantize(random_params(shapes(cfg), dtype=torch.float32), bits)
    tokens = random_tokens(cfg.vocab_size, 2, 8)
    cache = init_cache(cfg, 2)
    ready = prepare(small, cfg)
    for part in (tokens[:, :5], tokens[:, 5:6], tokens[:, 6:]):
        logits, cache = decode(ready, part, cfg, cache)
    want = fnlm.forward(dequantize(small), tokens, replace(cfg, tied=False))[:, -1]
    torch.testing.assert_close(logits, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("rows", [1, 7, 16, 17, 200])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products(rows: int, dtype: torch.dtype) -> None:
    p: Any = {"a.weight": torch.randn(24, 32, dtype=dtype), "a.bias": torch.randn(24, dtype=dtype)}
    small, x = quantize(p | {"head.weight": torch.ones(1, 1)}), torch.randn(2, rows, 32, dtype=dtype)
    want = linear(dequantize(small), "a", x)
    torch.testing.assert_close(linear(small, "a", x), want, rtol=0.02, atol=0.1 if dtype == torch.bfloat16 else 1e-4)


def test_every_entry_is_within_half_a_step() -> None:
    w = torch.randn(20, 30)
    w[3], w[4] = 0, w[4] * 1e-30
    small = quantize({"head.weight": w, "norm.weight": torch.ones(4), "embed.tokens.weight": w})
    assert (small["head.weight"].dtype, small["head.scale"].shape) == (torch.int8, (20,))
    assert small["embed.tokens.weight"] is w
    error = (dequantize(small)["head.weight"] - w).abs()
    assert bool((error <= small["head.scale"][:, None] * 0.5001).all())
    assert equal(quantize(small), small)


def test_every_matrix_of_a_block_is_small() -> None:
    cfg = fnlm.ModelConfig(vocab_size=64, n_layers=2, n_heads=4, d_model=64, seq_len=16, tied=False)
    params = fnlm.init_params(cfg, fnlm.key(0))
    ready = prepare(quantize({k: v.bfloat16() for k, v in params.items()}), cfg)
    tokens = random_tokens(64, 2, 8)
    logits, _ = decode(ready, tokens, cfg, init_cache(cfg, 2, dtype=torch.bfloat16))
    torch.testing.assert_close(logits, fnlm.forward(params, tokens, cfg)[:, -1], rtol=0.1, atol=0.05)
    matrices = [p for block in ready.blocks for p in block.values() if p.ndim == 2]
    assert {p.dtype for p in matrices} == {torch.int8}


def test_four_bits_are_within_a_step() -> None:
    w = torch.randn(20, 96, generator=torch.Generator().manual_seed(0))
    w[3], w[4], w[5, :40] = 0, w[4] * 1e-30, w[5, :40] * 1e4
    params = {"head.weight": w, "a.weight": w, "b.weight": w[:, :48], "c.weight": w.bfloat16(), "norm.weight": w[0]}
    small, whole = quantize(params, bits=4), dequantize(quantize(params, bits=4))
    assert (small["a.weight"].dtype, small["a.weight"].shape, small["a.scale"].shape) == (
        torch.uint8,
        (20, 48),
        (20, 3),
    )
    assert small["head.weight"].dtype == small["b.weight"].dtype == torch.int8
    steps = small["a.scale"].abs().repeat_interleave(32, 1)
    assert bool(((whole["a.weight"] - w).abs() <= 1.001 * steps).all())  # one side has 8 steps, the other 7
    assert float((whole["a.weight"] - w)[6:].pow(2).mean().sqrt()) < 0.1
    assert (small["c.scale"].dtype, whole["c.weight"].dtype) == (torch.bfloat16, torch.bfloat16)
    assert equal(quantize(small, bits=4), small)
    low, high = small["a.weight"][7, 16] & 15, small["a.weight"][7, 16] >> 4
    for at, step in ((32, low), (48, high)):
        assert whole["a.weight"][7, at].item() == pytest.approx(
            (int(step) - 8) * small["a.scale"][7, 1].item(), rel=1e-6
        )


def test_other_bits_are_refused() -> None:
    with pytest.raises(ValueError, match="bits=3 must be 8 or 4"):
        quantize({}, bits=3)  # type: ignore[arg-type]
