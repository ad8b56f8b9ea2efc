"""A thousand random cases: greedy texts cached, batched, in chunks and streamed are the same tokens, in float32."""

from __future__ import annotations

import random as chance
from typing import Any

import pytest
import torch

import fnlm
from fnlm.decode import Prepared, decode, init_cache, prefill, prepare
from fnlm.generate import Generation, complete, generate, stream
from fnlm.params import shapes
from fnlm.sampling import Settings
from fnlm.tokenizers import Byte
from fnlm.types import Params
from tests.reference import random_params
from tests.test_generate import drained

BYTE = Byte()
CHOICES: dict[str, list[dict[str, Any]]] = {
    "norm": [{}, {"norm": "rmsnorm"}, {"norm_affine": False}, {"embed_norm": True}],
    "mlp": [{}, {"mlp": "swiglu"}, {"mlp": "relu2"}, {"mlp": "gelu-tanh", "bias": True}],
    "positions": [
        {"positions": "rope"}, {"positions": "learned"}, {"positions": "alibi"}, {"positions": "none"},
        {"positions": "rope", "rope_fraction": 0.5},
    ],
    "heads": [{"n_heads": 4, "n_kv_heads": 2}, {"n_heads": 4, "n_kv_heads": 1}, {"n_heads": 2}, {"n_heads": 1}],
    "window": [{}, {}, {"window": 1}, {"window": 5}, {"window": 17}],
    "other": [
        {}, {"qk_norm": True}, {"parallel_residual": True}, {"logit_softcap": 3.0}, {"tied": False},
        {"ngrams": ((2, 60), (3, 40))}, {"token_shift": 0.5}, {"n_layers": 2},
    ],
}  # fmt: skip


def model(dice: chance.Random, vocab: int, seq_len: int) -> tuple[fnlm.ModelConfig, Params, Prepared]:
    """A random architecture with random parameters, sharp enough not to say one thing for ever."""
    picked = {k: v for options in CHOICES.values() for k, v in dice.choice(options).items()}
    cfg = fnlm.ModelConfig(**{"vocab_size": vocab, "n_layers": 1, "d_model": 16, "seq_len": seq_len, **picked})
    params = random_params(shapes(cfg), seed=dice.randrange(10**6), dtype=torch.float32)
    return cfg, params, prepare(params, cfg)


def case(seed: int) -> None:
    """Ragged prompts: a batch is each alone is forward of the whole text, whatever the chunks of the prompt."""
    dice = chance.Random(seed)
    v, size = 40, dice.randint(12, 48)
    cfg, params, ready = model(dice, v, size)
    prompts = [[dice.randrange(v) for _ in range(dice.randint(1, size - 1))] for _ in range(dice.randint(1, 4))]
    settings = Settings(temperature=0, max_tokens=dice.randint(1, 12))
    rows: list[list[int]] = [[] for _ in prompts]
    for tokens in generate(ready, cfg, prompts, settings, fnlm.key(seed), eot_ids=frozenset()):
        for token in tokens:
            rows[token.row].append(token.id)
    for prompt, ids in zip(prompts, rows, strict=True):
        assert len(ids) == min(settings.max_tokens or 0, size - len(prompt))
        logits = fnlm.forward(params, torch.tensor([[*prompt, *ids[:-1]]]), cfg)[0, len(prompt) - 1 :]
        assert logits.argmax(-1).tolist() == ids, seed  # uncached
        chunk = dice.randint(1, len(prompt) + 3)
        logits, cache = prefill(ready, [prompt], cfg, init_cache(cfg, 1), chunk=chunk)
        for token in ids[:-1]:  # alone, the prompt in chunks
            assert int(logits.argmax()) == token, (seed, chunk)
            logits, cache = decode(ready, torch.tensor([[token]]), cfg, cache)
        assert int(logits.argmax()) == ids[-1], (seed, chunk)


def test_greedy_is_greedy_in_some_cases() -> None:
    for seed in range(12):
        case(seed)


@pytest.mark.slow
def test_greedy_is_greedy_in_a_thousand_cases() -> None:
    for seed in range(1000):
        case(seed)


def streamed(seed: int, words: list[str]) -> None:
    """The pieces joined are the text, the text is the ids decoded, and `complete` says the same."""
    dice = chance.Random(seed)
    cfg, _, ready = MODELS[seed % len(MODELS)]
    prompt = dice.choice(words) * dice.randint(1, 3)
    stop = tuple(dice.choice("aeiou \n\u00e9") for _ in range(dice.randint(0, 2)))
    most = dice.randint(1, 20)
    settings = Settings(temperature=dice.choice([0, 1.0]), top_k=dice.choice([None, 50]), max_tokens=most, stop=stop)
    pieces, whole = drained(stream(ready, cfg, BYTE, BYTE.encode(prompt), settings, fnlm.key(seed)))
    assert "".join(pieces) == whole.text
    text = BYTE.decode(whole.ids)
    assert whole.text == (text if whole.finish == "length" else text[: len(whole.text)])
    assert not any(s in whole.text for s in stop)
    (alike,) = complete(ready, cfg, BYTE, [prompt], settings, fnlm.key(seed))
    assert Generation(*alike) == whole


MODELS = [model(chance.Random(i), BYTE.vocab_size, 64) for i in range(4)]
WORDS = ["a", "Once upon", "\u00e9t\u00e9", "\u6f22\u5b57", "\U0001f642", "x\n"]


def test_streamed_is_decoded_in_some_cases() -> None:
    for seed in range(20):
        streamed(seed, WORDS)


@pytest.mark.slow
def test_streamed_is_decoded_in_a_thousand_cases() -> None:
    for seed in range(1000):
        streamed(seed, WORDS)
