"""The native step is the torch step: every architecture, every weight type, any company, any number of threads."""

from __future__ import annotations

import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

import fnlm
from fnlm import clib
from fnlm.clib import build
from fnlm.decode import KVCache, Prepared, decode, init_cache, prefill, prepare
from fnlm.params import shapes
from fnlm.quantize import quantize
from fnlm.types import Params
from tests.reference import BASE, CASES, random_params, random_tokens
from tests.test_decode import MORE

ALL = {**CASES, **MORE}
needs_library = pytest.mark.skipif(clib.library("step").library is None, reason=clib.library("step").says)
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
    """Within `tolerance` of the torch step in float64, or where the model itself is steep, near as torch is."""
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
def test_bfloat16_is_as_near_to_float32_as_torch_is(name: str) -> None:
    """Both round what goes into a product and add to float32 between blocks."""
    cfg = fnlm.ModelConfig(**{**BASE, **ALL[name]})
    params = {k: v.bfloat16() for k, v in random_params(shapes(cfg), dtype=torch.float32).items()}
    tokens = random_tokens(cfg.vocab_size, 2, cfg.seq_len)
    want = steps(prepare({k: v.float() for k, v in params.items()}, cfg, lowered=False), cfg, tokens)
    own, plain = (
        float((steps(prepare(params, cfg, lowered=x), cfg, tokens) - want).abs().max()) for x in (True, False)
    )
    assert own <= 1.25 * plain + 1e-3, (own, plain)
    assert own <= 0.1 * float(want.abs().max())


def random_config(seed: int) -> fnlm.ModelConfig:
    draw = random.Random(seed)
    heads = draw.choice([1, 2, 3, 4, 6])
    head = draw.choice([2, 6, 8, 16, 18, 20, 64, 72])
    positions = draw.choice(["learned", "rope", "alibi", "none"])
    return fnlm.ModelConfig(
        vocab_size=draw.choice([11, 64, 131]), n_layers=draw.choice([1, 2]), n_heads=heads, d_head=head,
        d_model=draw.choice([5, 16, 32, 33, 48, 70]), seq_len=draw.choice([7, 21, 40]), d_ff=draw.choice([1, 17, 90]),
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


def weights(kind: str, cfg: fnlm.ModelConfig) -> Params:
    params = random_params(shapes(cfg), dtype=torch.float32)
    if kind == "fp32":
        return params
    params = {k: v.bfloat16() for k, v in params.items()}
    return params if kind == "bf16" else quantize(params, bits=int(kind[3:]))


COMPANY = fnlm.ModelConfig(
    vocab_size=61, n_layers=2, n_heads=4, n_kv_heads=2, d_model=96, d_ff=100, seq_len=40, positions="rope",
    mlp="swiglu", norm="rmsnorm", qk_norm=True, ngrams=((2, 40),), window=9, tied=False,
)  # fmt: skip
KINDS = ["fp32", "bf16", "int8", "int4"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows", [2, 3, 8, 11])
def test_a_text_is_the_same_bits_alone_in_company_and_many_tokens_at_once(kind: str, rows: int) -> None:
    cfg = COMPANY
    ready = prepare(weights(kind, cfg), cfg)
    dtype = ready.root["embed.tokens.weight"].dtype
    texts = [random_tokens(cfg.vocab_size, rows, cfg.seq_len)[b, : 20 + b].tolist() for b in range(rows)]
    alone, caches = [], []
    for text in texts:
        logits, cache = prefill(ready, [text[:18]], cfg, init_cache(cfg, 1, dtype=dtype), chunk=17)
        caches.append(KVCache(*(x.clone() for x in cache)))
        each = []
        for token in text[18:]:
            logits, cache = decode(ready, torch.tensor([[token]]), cfg, cache)
            each.append(logits[0])
        alone.append(torch.stack(each))
        again = KVCache(*(x.clone() for x in caches[-1]))
        (at_once,), after = decode(ready, torch.tensor([text[18:]])[:, :16], cfg, again, every=True)
        assert torch.equal(at_once, alone[-1][:16])
        assert torch.equal(after.k[..., : 18 + len(at_once), :], cache.k[..., : 18 + len(at_once), :])
    k, v, pos, tokens = zip(*caches, strict=True)
    cache = KVCache(torch.cat(k, 1), torch.cat(v, 1), torch.cat(pos), torch.cat(tokens))
    for t in range(max(map(len, texts)) - 18):
        there = [18 + t < len(text) for text in texts]
        new = torch.tensor([[text[18 + t] if on else 0] for text, on in zip(texts, there, strict=True)])
        logits, cache = decode(ready, new, cfg, cache, lengths=torch.tensor(there).long())
        for b, on in enumerate(there):
            assert not on or torch.equal(logits[b], alone[b][t])


@pytest.mark.parametrize("kind", KINDS)
def test_the_number_of_threads_changes_no_bit(kind: str) -> None:
    cfg, ready = COMPANY, prepare(weights(kind, COMPANY), COMPANY)
    tokens, dtype = random_tokens(COMPANY.vocab_size, 3, 12), ready.root["embed.tokens.weight"].dtype
    found = []
    try:
        for threads in (1, 2, 3, 5):
            torch.set_num_threads(threads)
            cache, logits = init_cache(cfg, 3, dtype=dtype), []
            for t in range(12):
                each, cache = decode(ready, tokens[:, t : t + 1], cfg, cache)
                logits.append(each)
            found.append(torch.stack(logits))
    finally:
        torch.set_num_threads(1)
    assert all(torch.equal(x, found[0]) for x in found)


def test_a_row_that_rests_is_not_written_and_nothing_but_the_cache_is() -> None:
    cfg = COMPANY
    params = weights("bf16", cfg)
    ready, before = prepare(params, cfg), {k: v.clone() for k, v in params.items()}
    _, cache = prefill(ready, [[1, 2, 3], [4, 5, 6, 7]], cfg, init_cache(cfg, 2, dtype=torch.bfloat16))
    k, v, seen = cache.k[:, 1].clone(), cache.v[:, 1].clone(), cache.tokens[1].clone()
    _, after = decode(ready, torch.ones(2, 1, dtype=torch.int64), cfg, cache, lengths=torch.tensor([1, 0]))
    assert torch.equal(after.k[:, 1], k)
    assert torch.equal(after.v[:, 1], v)
    assert torch.equal(after.tokens[1], seen)
    assert after.pos.tolist() == [4, 4]
    assert all(torch.equal(params[name], value) for name, value in before.items())
    _, after = decode(ready, torch.ones(2, 1, dtype=torch.int64), cfg, after, lengths=torch.tensor([0, 0]))
    assert after.pos.tolist() == [4, 4]


def test_what_the_library_does_not_know_torch_takes() -> None:
    cfg = COMPANY
    params = random_params(shapes(cfg), dtype=torch.float32)
    assert prepare(params, cfg, lowered=False).native is None
    assert prepare(params, cfg, torch.float64).native is None
    assert prepare(params, cfg, torch.float16).native is None
    ready = prepare(params, cfg)
    cache = init_cache(cfg, 1, dtype=torch.float64)
    assert not fnlm.native.takes(cache.k, cache.v)
    assert ready.blocks[0]["mlp.up.weight"].data_ptr() == params["blocks.0.mlp.up.weight"].data_ptr()


def logits_with(library: Path, threads: int = 3) -> Tensor:
    """The last logits of a few steps, in a process whose library is this one and whose team is its own."""
    script = (
        "import ctypes, sys, torch; from fnlm.clib import build\n"
        "from tests.test_native import COMPANY, prepare, random_tokens, steps, weights\n"
        "compiled = build.built; build._openmp = lambda: (None, None); build.library.cache_clear()\n"
        f"build.built = lambda n, *a: build.Path({str(library)!r}) if n == 'step' else compiled(n, *a)\n"
        f"torch.set_num_threads({threads})\n"
        "out = steps(prepare(weights('bf16', COMPANY), COMPANY), COMPANY, random_tokens(61, 3, 12))\n"
        "sys.stdout.buffer.write(out.contiguous().numpy().tobytes())\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, check=True)
    return torch.frombuffer(bytearray(done.stdout), dtype=torch.float32)


@pytest.mark.slow
def test_a_team_of_its_own_and_every_width_of_vectors() -> None:
    """Without torch's OpenMP the bits are the same; without the processor's vectors they are near."""
    compiler = shutil.which("cc") or "gcc"
    want = steps(prepare(weights("bf16", COMPANY), COMPANY), COMPANY, random_tokens(61, 3, 12)).flatten()
    assert torch.equal(logits_with(build.built("step", compiler)), want)
    narrow = logits_with(build.built("step", compiler, options=["-DFNLM_PORTABLE"]))
    torch.testing.assert_close(narrow, want, rtol=0.02, atol=0.02 * float(want.abs().max()))
