"""Speculation says what the model says: the same tokens where they are certain, else the same distribution."""

from __future__ import annotations

import itertools
import math
import random as chance
from typing import Any

import pytest
import torch
from torch import Tensor

import fnlm
from fnlm import random
from fnlm.decode import Prepared, init_cache, prefill, prepare
from fnlm.generate import complete, generate, stream
from fnlm.params import shapes
from fnlm.sampling import Settings, choose, draws, filtered, history_of
from fnlm.speculate import MOST, Begin, Draft, Lookup, accepting, decided, lookup, next_length, with_model
from fnlm.tokenizers import Byte
from fnlm.tokens import Token, slid
from tests.reference import random_params

SHAPES: list[dict[str, Any]] = [
    {"positions": "rope", "n_heads": 4, "n_kv_heads": 2},
    {"positions": "learned", "n_heads": 2, "norm": "rmsnorm", "mlp": "swiglu"},
    {"positions": "alibi", "n_heads": 2, "window": 7},
    {"positions": "rope", "n_heads": 2, "ngrams": ((2, 40),), "qk_norm": True, "token_shift": 0.5},
]
V = 23


def model(
    shape: dict[str, Any], vocab: int = V, seq_len: int = 48, dtype: torch.dtype = torch.float64, seed: int = 0
) -> tuple[Prepared, fnlm.ModelConfig]:
    cfg = fnlm.ModelConfig(**{"vocab_size": vocab, "n_layers": 1, "d_model": 16, "seq_len": seq_len, **shape})
    return prepare({k: 2 * v for k, v in random_params(shapes(cfg), seed=seed, dtype=dtype).items()}, cfg), cfg


def written(
    ready: Prepared, cfg: fnlm.ModelConfig, prompt: list[int], settings: Settings, key: Tensor, **how: Any
) -> list[Token]:
    return [token for (token,) in generate(ready, cfg, [prompt], settings, key, eot_ids=frozenset([0]), **how)]


def same(a: list[Token], b: list[Token]) -> bool:
    return [(t.id, t.finish) for t in a] == [(t.id, t.finish) for t in b]


def settings_of(dice: chance.Random, greedy: bool, most: int) -> Settings:
    more: dict[str, Any] = dice.choice(
        [
            {},
            {"repetition_penalty": 1.3, "presence_penalty": 0.2},
            {"frequency_penalty": 0.5},
            {"min_tokens": most},
            {"stop_ids": (3,)},
            {"top_k": 5},
            {"top_p": 0.8, "min_p": 0.05},
            {"typical_p": 0.7, "forbidden": (4,)},
            {"logit_bias": {5: 2.0}},
        ]
    )
    return Settings(temperature=0 if greedy else dice.choice([0.3, 1.0]), max_tokens=most, **more)


MODELS = [model(shape) for shape in SHAPES]
MODELS32 = [model(shape, dtype=torch.float32) for shape in SHAPES]
OTHERS = [with_model(*model(shape, seq_len=30), V) for shape in SHAPES]


def cases(n: int, seed: int, models: list[tuple[Prepared, fnlm.ModelConfig]], greedy: bool, others: bool) -> int:
    """Random prompts with repetitions, settings and drafters: each text is the plain one. How many were guessed."""
    dice, guessed = chance.Random(seed), 0
    for _ in range(n):
        which, most = dice.randrange(len(models)), dice.randint(1, 20)
        ready, cfg = models[which]
        settings = settings_of(dice, greedy, most)
        part = [dice.randrange(V) for _ in range(dice.randint(1, 6))]
        prompt = [*part * dice.randint(1, 3), *(dice.randrange(V) for _ in range(dice.randint(0, 9)))][
            : cfg.seq_len - 1
        ]
        key = fnlm.key(dice.randrange(2**32))
        begin: Begin = dice.choice([lookup, OTHERS[which], *OTHERS]) if others else lookup
        got = written(ready, cfg, prompt, settings, key, draft=begin)
        assert same(got, written(ready, cfg, prompt, settings, key)), (settings, prompt)
        assert sum(t.guessed for t in got) <= sum(t.drafted for t in got)
        guessed += sum(t.guessed for t in got)
    return guessed


def test_greedy_is_plain_greedy() -> None:
    assert cases(12, 1, MODELS32, greedy=True, others=True) > 10


def test_lookup_draws_what_is_drawn_without_it() -> None:
    assert cases(15, 2, MODELS, greedy=False, others=False) > 5


@pytest.mark.slow
def test_greedy_is_plain_greedy_in_a_thousand_cases() -> None:
    assert cases(1000, 3, MODELS32, greedy=True, others=True) > 1000


def test_the_model_itself_as_draft_is_always_right() -> None:
    ready, cfg = MODELS[0]
    for more in ({"temperature": 0}, {"temperature": 1.0, "top_k": 9}):
        settings = Settings(max_tokens=28, forbidden=(0,), **more)
        tokens = written(ready, cfg, [1, 2, 3], settings, fnlm.key(1), draft=with_model(ready, cfg, V))
        assert [t.drafted for t in tokens if t.drafted] == [8, 8, 8]
        assert [t.guessed for t in tokens] == [False, *(([True] * 8 + [False]) * 3)]


def chi_square(counts: Tensor, probs: Tensor) -> tuple[float, int]:
    """Of counts against probabilities, rare cells taken together: the statistic and its degrees of freedom."""
    want = probs * counts.sum()
    rare = want < 5
    c = torch.cat([counts[~rare], counts[rare].sum()[None]])
    w = torch.cat([want[~rare], want[rare].sum()[None]])
    some = w > 0
    assert c[~some].sum() == 0, "what cannot be drawn was drawn"
    return float(((c - w)[some] ** 2 / w[some]).sum()), int(some.sum()) - 1


def plausible(counts: Tensor, probs: Tensor) -> bool:
    """Within 4.5 standard deviations of a chi-square's mean (Wilson and Hilferty 1931)."""
    found, free = chi_square(counts, probs)
    z = ((found / free) ** (1 / 3) - (1 - 2 / (9 * free))) / math.sqrt(2 / (9 * free))
    return bool(abs(z) < 4.5)


@pytest.mark.parametrize("sure", [True, False])
def test_a_place_has_the_models_distribution_whatever_was_drafted(sure: bool) -> None:
    p, q = (torch.tensor(x).double().log() for x in ([0.4, 0.1, 0.0, 0.3, 0.2], [0.1, 0.5, 0.2, 0.2, 0.0]))
    n = 4000
    at, accept, drawn = draws(fnlm.key(1), n).tolist(), accepting(fnlm.key(1), n), draws(fnlm.key(2), n)
    counts, kept = torch.zeros(5), 0
    for i in range(n):
        x = 3 if sure else int(choose(q[None], drawn[i : i + 1]))
        token = decided(p, Draft([x], None if sure else q[None]), 0, at[i], accept[i])
        counts[token] += 1
        kept += token == x
    assert plausible(counts, p.exp().float())
    assert abs(kept / n - (0.3 if sure else 0.1 + 0.1 + 0.2)) < 0.03  # p(x); else the overlap of p and q


def law(ready: Prepared, cfg: fnlm.ModelConfig, params: Any, prompt: list[int], settings: Settings, n: int) -> Tensor:
    """The probability of every text of n tokens, by the formulas: (V ** n,)."""
    v = cfg.vocab_size
    probs = torch.ones(1, dtype=torch.float64)
    for step in range(n):
        texts = [[*prompt, *more] for more in itertools.product(range(v), repeat=step)]
        logits = fnlm.forward(params, torch.tensor(texts), cfg)[:, -1]
        history = history_of([prompt] * len(texts), v)
        for text, counts, seen in zip(texts, history.counts, history.seen, strict=True):
            for token in text[len(prompt) :]:
                counts[token] += 1
                seen[token] = True
        banned = (0,) if step < settings.min_tokens else ()
        probs = (probs[:, None] * filtered(logits, settings, history, banned).exp()).flatten()
    return probs


@pytest.mark.slow
@pytest.mark.parametrize("by", ["lookup", "model"])
def test_texts_have_the_models_distribution(by: str) -> None:
    """All filters and penalties on: 1,500 texts of three tokens over a vocabulary of five, against their law."""
    cfg = fnlm.ModelConfig(vocab_size=5, n_layers=1, n_heads=2, d_model=8, seq_len=16, positions="rope")
    params = {k: 0.8 * v for k, v in random_params(shapes(cfg), dtype=torch.float64).items()}
    ready, prompt = prepare(params, cfg), [1, 2, 3, 1, 2]
    settings = Settings(
        temperature=1.3, top_k=4, typical_p=0.97, top_p=0.98, min_p=0.02, repetition_penalty=1.2,
        presence_penalty=0.1, frequency_penalty=0.2, min_tokens=3, max_tokens=3, logit_bias={3: 0.4},
    )  # fmt: skip
    begin = lookup if by == "lookup" else with_model(*model({"n_heads": 2, "positions": "rope"}, 5, 16, seed=7), 5)
    counts, guessed, n = torch.zeros(5**3), 0, 1500
    for key in random.fold_in(fnlm.key(3), torch.arange(n)):
        tokens = written(ready, cfg, prompt, settings, key, draft=begin)
        counts[int("".join(str(t.id) for t in tokens), 5)] += 1
        guessed += sum(t.guessed for t in tokens)
    assert guessed > n / 20
    probs = law(ready, cfg, params, prompt, settings, 3)
    assert plausible(counts, probs.float())
    wrong = (probs + 0.3 * torch.roll(probs, 1)) / 1.3
    assert not plausible(counts, wrong.float())


def test_lookup() -> None:
    guess = Lookup()
    assert guess.propose([1, 2, 3, 4, 5, 1, 2], 3, 0).ids == [3, 4, 5]
    assert guess.propose([9], 3, 1).ids == []
    assert guess.propose([2, 3], 8, 3).ids == [4, 5, 1, 2, 9, 2, 3, 4]  # and round again
    assert guess.propose([7, 7, 7], 4, 6).ids == [7, 7, 7, 7]
    assert Lookup().propose([5, 6, 1, 5, 6, 2, 5, 6], 1, 0).ids == [2]  # the latest
    assert Lookup().propose([5, 6, 1, 5, 6], 0, 0).ids == []
    assert Lookup().propose([5, 6, 1, 6], 4, 0).ids == []  # one token is not enough


def test_lengths() -> None:
    assert [next_length(a, n) for a, n in ((8, 8), (0, 8), (3, 8), (2, 2), (7, 8), (0, 2))] == [MOST, 2, 6, MOST, 8, 2]


def test_a_text_that_repeats_itself_takes_few_steps() -> None:
    """A model that says 1 to 6 in a circle, and one that agrees with half of it."""
    v, calls = 8, 0
    cfg = fnlm.ModelConfig(
        vocab_size=v, n_layers=1, n_heads=1, d_model=v, d_ff=1, seq_len=64, tied=False, norm_affine=False,
        positions="none", zero_init_out=True,
    )  # fmt: skip
    params = fnlm.init_params(cfg, fnlm.key(0))
    params["embed.tokens.weight"] = torch.eye(v)
    params["head.weight"] = torch.eye(v).roll(1, 0)
    tokens = written(prepare(params, cfg), cfg, [0, 1], Settings(temperature=0, max_tokens=60, forbidden=(0,)), fnlm.key(0), draft=lookup)  # fmt: skip  # noqa: E501
    calls = len(tokens) - sum(t.guessed for t in tokens)
    assert len(tokens) == 60
    assert calls <= 20


def slides(ready: Prepared, cfg: fnlm.ModelConfig, begin: Begin | None, most: int) -> None:
    """Past the context's end, greedy: each token is what the model says of its window, in any company."""
    settings = Settings(temperature=0, max_tokens=most, forbidden=(0,))
    prompts = [[5, 6, 7, 8], [9] * (cfg.seq_len - 1), list(range(1, 23)) * 3]
    together: list[list[int]] = [[], [], []]
    how: dict[str, Any] = {"eot_ids": frozenset([0]), "draft": begin, "slide": True, "keep": 2}
    for tokens in generate(ready, cfg, prompts, settings, fnlm.key(1), **how):
        for t in tokens:
            together[t.row].append(t.id)
    for prompt, ids in zip(prompts, together, strict=True):
        assert len(ids) == most
        window = slid(prompt, cfg.seq_len, 2) if len(prompt) >= cfg.seq_len else list(prompt)
        for token in ids:
            window = slid(window, cfg.seq_len, 2) if len(window) > cfg.seq_len else window
            logits, _ = prefill(ready, [window], cfg, init_cache(cfg, 1, dtype=torch.float64))
            assert int(logits[0, 1:].argmax()) + 1 == token
            window.append(token)


@pytest.mark.parametrize("begin", [None, lookup, OTHERS[0]])
def test_a_text_slides(begin: Begin | None) -> None:
    slides(*model(SHAPES[3], seq_len=16), begin, 30)


@pytest.mark.slow
@pytest.mark.parametrize("begin", [None, lookup, OTHERS[1]])
@pytest.mark.parametrize("shape", range(len(SHAPES)))
def test_any_text_slides(shape: int, begin: Begin | None) -> None:
    slides(*MODELS[shape], begin, 120)


def test_slid() -> None:
    assert slid(list(range(20)), 16, 3) == [0, 1, 2, *range(12, 20)]
    assert slid(list(range(16)), 16, 0) == list(range(8, 16))
    with pytest.raises(ValueError, match=r"keep=8 and half of a context of 16 leave no room .* keep 7 or fewer"):
        slid([0] * 16, 16, 8)
    ready, cfg = MODELS[0]
    with pytest.raises(ValueError, match="give it max_tokens"):
        generate(ready, cfg, [[1]], Settings(max_tokens=None), fnlm.key(0), eot_ids=frozenset(), slide=True)


def test_a_stream_says_what_was_guessed() -> None:
    byte = Byte()
    ready, cfg = model({"positions": "rope", "n_heads": 2}, byte.vocab_size, 96)
    settings = Settings(temperature=0, max_tokens=80, stop=("zz",))
    plain = complete(ready, cfg, byte, ["abcabcabc", "xyz"], settings, fnlm.key(1))
    ours = complete(ready, cfg, byte, ["abcabcabc", "xyz"], settings, fnlm.key(1), draft=lookup)
    assert [g[:4] for g in ours] == [g[:4] for g in plain]
    assert all(0 < g.accepted <= g.drafted for g in ours)
    pieces = stream(ready, cfg, byte, list(b"abcabcabc"), settings, fnlm.key(1), draft=lookup)
    assert "".join(pieces) == ours[0].text
