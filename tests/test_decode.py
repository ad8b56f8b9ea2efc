"""decode is forward, whatever the architecture, the split of the text and the company in the batch."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import fnlm
from fnlm.collectives import Axes, Axis
from fnlm.decode import Prepared, decode, init_cache, padded, picked, prefill, prepare
from fnlm.params import shapes
from fnlm.tree import equal, flatten
from fnlm.types import Params
from tests.reference import BASE, CASES, random_params, random_tokens
from tests.test_axes import on_ranks, part_of

MORE: dict[str, dict[str, Any]] = {
    "demo": {
        "norm_affine": False, "embed_norm": True, "qk_norm": True, "mlp": "relu2", "positions": "rope",
        "tied": False, "n_heads": 2, "ngrams": ((2, 40),),
    },
    "parallel-gqa-window-bias": {
        "parallel_residual": True, "n_kv_heads": 2, "window": 4, "bias": True, "mlp": "swiglu",
        "qk_norm": True, "positions": "rope", "rope_fraction": 0.5,
    },
    "alibi-gqa": {"positions": "alibi", "n_kv_heads": 2},
}  # fmt: skip
ALL = {**CASES, **MORE}
DOUBLE = torch.float64


def model(name: str, dtype: torch.dtype = DOUBLE) -> tuple[fnlm.ModelConfig, Params]:
    cfg = fnlm.ModelConfig(**{**BASE, **ALL[name]})
    return cfg, random_params(shapes(cfg), dtype=dtype)


def last(params: Params, tokens: Tensor, cfg: fnlm.ModelConfig) -> Tensor:
    return fnlm.forward(params, tokens, cfg)[:, -1]


def splits(seed: int, total: int) -> list[int]:
    """Random pieces that add up to `total`."""
    cuts = fnlm.random.bernoulli(fnlm.key(seed), 0.4, (total - 1,)).nonzero().flatten() + 1
    edges = [0, *cuts.tolist(), total]
    return torch.tensor(edges).diff().tolist()


@pytest.mark.parametrize("name", ALL)
def test_any_split_is_forward(name: str) -> None:
    cfg, params = model(name)
    tokens = random_tokens(cfg.vocab_size, 2, cfg.seq_len)
    ready = prepare(params, cfg)
    for seed, pieces in enumerate([[1] * 13, [13], *(splits(s, 13) for s in range(4))]):
        cache, at = init_cache(cfg, 2, dtype=DOUBLE), 0
        for n in pieces:
            source: Any = params if seed % 2 else ready
            logits, cache = decode(source, tokens[:, at : at + n], cfg, cache)
            at += n
            torch.testing.assert_close(logits, last(params, tokens[:, :at], cfg), rtol=0, atol=1e-10)
            assert cache.pos.tolist() == [at, at]


@pytest.mark.parametrize("name", ALL)
def test_ragged_rows_are_single_rows(name: str) -> None:
    """Four rows go at different paces, some rest at times; each says what forward says of it alone."""
    cfg, params = model(name)
    tokens = random_tokens(cfg.vocab_size, 4, cfg.seq_len)
    paces = [[3, 0, 1, 1, 4], [0, 5, 1, 0, 1], [1, 1, 1, 1, 1], [0, 0, 0, 0, 2]]
    cache, at = init_cache(cfg, 4, 12, dtype=DOUBLE), [0] * 4
    ready = prepare(params, cfg)
    for counts in zip(*paces, strict=True):
        rows = [tokens[b, at[b] : at[b] + n].tolist() for b, n in enumerate(counts)]
        new, lengths = padded(rows)
        logits, cache = decode(ready, new, cfg, cache, lengths=lengths)
        at = [a + n for a, n in zip(at, counts, strict=True)]
        assert cache.pos.tolist() == at
        for b, n in enumerate(counts):
            if n:
                want = last(params, tokens[b : b + 1, : at[b]], cfg)[0]
                torch.testing.assert_close(logits[b], want, rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", ["plain", "demo", "window-alibi", "parallel-gqa-window-bias", "ngrams"])
@pytest.mark.parametrize("chunk", [1, 3, 256])
def test_prefill_of_ragged_prompts(name: str, chunk: int) -> None:
    cfg, params = model(name)
    prompts = [random_tokens(cfg.vocab_size, 1, n)[0].tolist() for n in (7, 1, 12, 4)]
    logits, cache = prefill(params, prompts, cfg, init_cache(cfg, 4, dtype=DOUBLE), chunk=chunk)
    for row, prompt in zip(logits, prompts, strict=True):
        torch.testing.assert_close(row, last(params, torch.tensor([prompt]), cfg)[0], rtol=0, atol=1e-10)
    assert cache.pos.tolist() == [7, 1, 12, 4]
    new = torch.tensor([[5], [6], [7], [8]])  # and on, all rows together at their own positions
    logits, cache = decode(params, new, cfg, cache)
    for row, prompt, token in zip(logits, prompts, new.tolist(), strict=True):
        want = last(params, torch.tensor([[*prompt, *token]]), cfg)[0]
        torch.testing.assert_close(row, want, rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", ["demo", "llama", "alibi", "plain"])
def test_float32(name: str) -> None:
    cfg, params = model(name, torch.float32)
    tokens = random_tokens(cfg.vocab_size, 2, cfg.seq_len)
    cache = init_cache(cfg, 2)
    for t in range(cfg.seq_len):
        logits, cache = decode(params, tokens[:, t : t + 1], cfg, cache)
        assert logits.dtype == torch.float32
        torch.testing.assert_close(logits, last(params, tokens[:, : t + 1], cfg), rtol=1e-5, atol=1e-5)


def test_bfloat16_gives_float32_logits() -> None:
    cfg, params = model("llama", torch.float32)
    ready = prepare(params, cfg, torch.bfloat16)
    tokens = random_tokens(cfg.vocab_size, 2, 6)
    logits, cache = decode(ready, tokens, cfg, init_cache(cfg, 2, dtype=torch.bfloat16))
    assert (logits.dtype, cache.k.dtype) == (torch.float32, torch.bfloat16)
    torch.testing.assert_close(logits, last(params, tokens, cfg), rtol=0.1, atol=0.3)


def test_a_resting_row_keeps_every_bit() -> None:
    cfg, params = model("demo")
    _, cache = prefill(params, [[1, 2, 3], [4, 5, 6, 7]], cfg, init_cache(cfg, 2, dtype=DOUBLE))
    k, v, seen = cache.k[:, 1].clone(), cache.v[:, 1].clone(), cache.tokens[1].clone()
    for n in (1, 3):
        _, cache = decode(params, torch.ones(2, n, dtype=torch.int64), cfg, cache, lengths=torch.tensor([n, 0]))
    assert torch.equal(cache.k[:, 1], k)
    assert torch.equal(cache.v[:, 1], v)
    assert torch.equal(cache.tokens[1], seen)
    assert cache.pos.tolist() == [7, 4]


def test_what_is_forgotten_does_not_count() -> None:
    """Lowering a row's position is all it takes to go back."""
    cfg, params = model("ngrams")
    _, cache = prefill(params, [[1, 2, 3, 4, 5, 6]], cfg, init_cache(cfg, 1, dtype=DOUBLE))
    logits, _ = decode(params, torch.tensor([[9, 8]]), cfg, cache._replace(pos=torch.tensor([3])))
    torch.testing.assert_close(logits, last(params, torch.tensor([[1, 2, 3, 9, 8]]), cfg), rtol=0, atol=1e-10)


def test_picked_rows_go_on() -> None:
    cfg, params = model("demo")
    _, cache = prefill(params, [[1, 2, 3], [4, 5], [6]], cfg, init_cache(cfg, 3, dtype=DOUBLE))
    logits, after = decode(params, torch.tensor([[7], [8], [9]]), cfg, picked(cache, torch.tensor([1, 0, 1])))
    for row, text in zip(logits, ([4, 5, 7], [1, 2, 3, 8], [4, 5, 9]), strict=True):
        torch.testing.assert_close(row, last(params, torch.tensor([text]), cfg)[0], rtol=0, atol=1e-10)
    assert (after.pos.tolist(), cache.pos.tolist()) == ([3, 4, 3], [3, 2, 1])


def test_inputs_are_unchanged_but_for_the_cache() -> None:
    cfg, params = model("demo")
    tokens, lengths = torch.tensor([[1, 2], [3, 0]]), torch.tensor([2, 1])
    before = {k: v.clone() for k, v in params.items()}
    versions = {k: v._version for k, v in params.items()}
    cache = init_cache(cfg, 2, dtype=DOUBLE)
    first = cache.k
    _, after = decode(params, tokens, cfg, cache, lengths=lengths)
    assert equal(before, params)
    assert versions == {k: v._version for k, v in params.items()}
    assert (tokens.tolist(), lengths.tolist(), cache.pos.tolist()) == ([[1, 2], [3, 0]], [2, 1], [0, 0])
    assert after.k is first  # donated: not copied
    assert all(torch.isfinite(x).all() for x in flatten(after).values())


def test_prepared_parameters_are_shared_where_nothing_changes() -> None:
    cfg, params = model("llama")
    ready = prepare(params, cfg)
    assert isinstance(ready, Prepared)
    assert ready.blocks[1]["mlp.up.weight"] is params["blocks.1.mlp.up.weight"]
    assert ready.blocks[0]["attn.qkv.weight"].shape == (32, 16)
    assert ready.root["norm.weight"] is params["norm.weight"]


def test_a_model_split_over_ranks() -> None:
    """Tensor parallel: each rank caches its own heads and gives its own part of the logits."""
    cfg, params = model("alibi-gqa")
    tokens = random_tokens(cfg.vocab_size, 2, 9)
    want = last(params, tokens, cfg)

    def run(axis: Axis) -> Tensor:
        mine, cache = part_of(params, axis), init_cache(cfg, 2, dtype=DOUBLE, heads=cfg.kv_heads // axis.size)
        _, cache = decode(mine, tokens[:, :5], cfg, cache, axes=Axes(tensor=axis))
        return decode(mine, tokens[:, 5:], cfg, cache, axes=Axes(tensor=axis))[0]

    torch.testing.assert_close(torch.cat(on_ranks(2, run), -1), want, rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", ["plain", "alibi", "window"])
def test_one_row_may_be_shorter_than_its_tokens(name: str) -> None:
    cfg = fnlm.ModelConfig(**{**BASE, **{"plain": {}, "alibi": {"positions": "alibi"}, "window": {"window": 3}}[name]})
    params = random_params(shapes(cfg))
    tokens = random_tokens(cfg.vocab_size, 1, 7)
    cache = init_cache(cfg, 1, dtype=torch.float64)
    got, _ = decode(params, tokens, cfg, cache, lengths=torch.tensor([4]))
    torch.testing.assert_close(got, fnlm.forward(params, tokens[:, :4], cfg)[:, -1], rtol=1e-10, atol=1e-10)


def test_errors() -> None:
    cfg, params = model("plain")
    cache = init_cache(cfg, 1, 4, dtype=DOUBLE)
    wrong = [
        (lambda: decode(params, random_tokens(11, 1, 5), cfg, cache), "position 4 does not fit into a cache of 4"),
        (lambda: decode(params, random_tokens(11, 2, 1), cfg, cache), "2 rows of tokens do not suit a cache of 1"),
        (
            lambda: decode(params, random_tokens(11, 1, 2), cfg, cache, lengths=torch.tensor([3])),
            "lengths=[3] do not suit 1 rows of 2 tokens; give one of 0 to 2 for each",
        ),
        (lambda: init_cache(cfg, 1, 14), "a cache of 14 positions does not suit seq_len=13"),
        (lambda: prefill(params, [[1], []], cfg, cache), "prompt 1 is empty"),
    ]  # fmt: skip
    for call, says in wrong:
        with pytest.raises(ValueError, match=re.escape(says)):
            call()


def test_a_large_cache_is_zeros_that_cost_no_memory_yet() -> None:
    cfg = fnlm.ModelConfig(vocab_size=11, n_layers=4, n_heads=4, d_model=256, seq_len=4096)
    status = Path("/proc/self/statm")
    before = int(status.read_text().split()[1]) if status.exists() else 0
    cache = init_cache(cfg, 8, dtype=torch.bfloat16)  # 128 MiB
    if status.exists():
        assert int(status.read_text().split()[1]) - before < 4096  # pages
    cache.k[:, 3, :, 7] = 1
    assert cache.k.data_ptr() % 64 == cache.v.data_ptr() % 64 == 0
    assert (cache.k.shape, cache.k.is_contiguous()) == ((4, 8, 4, 4096, 64), True)
    assert float(cache.k.sum(dtype=torch.float32)) == 4 * 4 * 64
    assert not cache.v[:, :2, :, :50].any()
