"""Sampling: the sets that filters keep, penalties by their formulas, frequencies, and what a draw depends on."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from fnlm import random
from fnlm.sampling import History, Settings, choose, draws, extended, filtered, history_of, sample, shaped

P = (0.4, 0.05, 0.25, 0.1, 0.2)  # by rank: 0 2 4 3 1
LOGITS = torch.tensor([P]).log()


def kept(**settings: Any) -> list[int]:
    """The ids that can be drawn; their probabilities are those of P in proportion."""
    logp = filtered(LOGITS, Settings(**{"temperature": 1.0, **settings}))[0]
    ids = logp.isfinite().nonzero().flatten().tolist()
    total = sum(P[i] for i in ids)
    torch.testing.assert_close(logp[ids].exp(), torch.tensor([P[i] / total for i in ids]))
    return ids


@pytest.mark.parametrize(
    ("settings", "ids"),
    [
        ({}, [0, 1, 2, 3, 4]),
        ({"top_k": 1}, [0]),
        ({"top_k": 3}, [0, 2, 4]),
        ({"top_k": 5}, [0, 1, 2, 3, 4]),
        ({"top_k": 500}, [0, 1, 2, 3, 4]),
        ({"top_p": 1e-9}, [0]),
        ({"top_p": 0.01}, [0]),
        ({"top_p": 0.4}, [0]),
        ({"top_p": 0.41}, [0, 2]),
        ({"top_p": 0.65}, [0, 2]),
        ({"top_p": 0.85}, [0, 2, 4]),
        ({"top_p": 0.951}, [0, 1, 2, 3, 4]),
        ({"top_p": 1.0}, [0, 1, 2, 3, 4]),
        ({"min_p": 0.0}, [0, 1, 2, 3, 4]),
        ({"min_p": 0.24}, [0, 2, 3, 4]),
        ({"min_p": 0.26}, [0, 2, 4]),
        ({"min_p": 1.0}, [0]),
        ({"top_k": 3, "top_p": 0.5}, [0, 2]),  # of 0.85: 0.47, 0.29, 0.24
        ({"top_k": 3, "top_p": 0.47}, [0]),
        ({"top_p": 0.85, "min_p": 0.6}, [0, 2]),
        ({"forbidden": (0,), "top_k": 1}, [2]),
        ({"logit_bias": {1: 10.0}, "forbidden": (0, 2, 3)}, None),
    ],
)
def test_the_set_that_is_kept(settings: dict[str, Any], ids: list[int] | None) -> None:
    if ids is None:
        logp = filtered(LOGITS, Settings(temperature=1.0, **settings))[0]
        odds = P[1] * math.exp(10) / P[4]
        torch.testing.assert_close(logp[[1, 4]].exp(), torch.tensor([odds / (odds + 1), 1 / (odds + 1)]))
        assert logp[[0, 2, 3]].tolist() == [-math.inf] * 3
    else:
        assert kept(**settings) == ids


def test_typical_keeps_what_surprises_as_expected() -> None:
    """Meister et al. 2023: sorted by |surprise - entropy|, until the mass is reached."""
    entropy = -sum(p * math.log(p) for p in P)
    order = sorted(range(5), key=lambda i: abs(-math.log(P[i]) - entropy))
    assert order[0] == 2  # not the likeliest
    for n in range(1, 5):
        mass = sum(P[i] for i in order[:n])
        assert kept(typical_p=mass - 0.01) == sorted(order[:n])


def test_temperature() -> None:
    for t in (0.01, 0.5, 2.0, 100.0):
        weights = torch.tensor([p ** (1 / t) for p in P], dtype=torch.float64)
        logp = filtered(LOGITS.double(), Settings(temperature=t))[0]
        torch.testing.assert_close(logp.exp(), weights / weights.sum(), rtol=1e-4, atol=1e-7)


def test_greedy_is_the_likeliest_whatever_the_key() -> None:
    logits = torch.randn(50, 11, generator=torch.Generator().manual_seed(0))
    keys = random.split(random.key(1), 50)
    assert torch.equal(sample(logits, keys, Settings(temperature=0)), logits.argmax(-1))
    low = Settings(temperature=0, forbidden=tuple(range(10)))
    assert sample(logits, keys, low).tolist() == [10] * 50


def test_padding_is_never_drawn() -> None:
    logits = torch.zeros(200, 8)
    logits[:, 5:] = 50.0
    keys = random.split(random.key(1), 200)
    ids = sample(logits, keys, Settings(temperature=1.0), vocab_size=5)
    assert set(ids.tolist()) == {0, 1, 2, 3, 4}
    assert int(sample(logits, keys, Settings(temperature=0), vocab_size=5).max()) < 5


def test_penalties_by_hand() -> None:
    logits = torch.tensor([[2.0, -2.0, 1.0, -1.0, 3.0]])
    history = history_of([[0, 1]], 5)
    for token in (2, 2, 3):
        history = extended(history, torch.tensor([token]))
    history = extended(history, torch.tensor([-1]))
    assert history.counts.tolist() == [[0, 0, 2, 1, 0]]
    assert history.seen.tolist() == [[True, True, True, True, False]]

    def of(**settings: Any) -> list[float]:
        return shaped(logits, Settings(**settings), history)[0].tolist()

    assert of(repetition_penalty=2.0) == [1.0, -4.0, 0.5, -2.0, 3.0]
    assert of(presence_penalty=0.5) == [2.0, -2.0, 0.5, -1.5, 3.0]
    assert of(frequency_penalty=0.5) == [2.0, -2.0, 0.0, -1.5, 3.0]
    assert of(repetition_penalty=2.0, frequency_penalty=1.0, logit_bias={4: -3.0}) == [1.0, -4.0, -1.5, -3.0, 0.0]
    assert of(repetition_penalty=2.0, forbidden=(4,))[4] == -math.inf
    assert logits.tolist() == [[2.0, -2.0, 1.0, -1.0, 3.0]]


def test_banned_ids_until_the_text_may_end() -> None:
    settings = Settings(temperature=1.0, stop_ids=(0,), min_tokens=3)
    assert filtered(LOGITS, settings, banned=(0, 2))[0].isfinite().tolist() == [False, True, False, True, True]


def frequencies(logits: Tensor, settings: Settings, n: int = 20_000) -> Tensor:
    at = draws(random.key(5), n)
    ids = choose(filtered(logits, settings).expand(n, -1), at)
    return torch.bincount(ids, minlength=logits.shape[-1]) / n


@pytest.mark.parametrize("settings", [{}, {"temperature": 2.0}, {"top_k": 3}, {"top_p": 0.8}, {"min_p": 0.3}])
def test_frequencies(settings: dict[str, Any]) -> None:
    chosen = Settings(**{"temperature": 1.0, **settings})
    want = filtered(LOGITS, chosen)[0].exp()
    got = frequencies(LOGITS, chosen)
    assert (got - want).abs().max() < 4 * math.sqrt(0.25 / 20_000)  # four standard deviations
    assert got[want == 0].sum() == 0


def test_each_step_draws_anew() -> None:
    keys = random.key(7)[None]
    ids = torch.cat([sample(LOGITS, keys, Settings(temperature=1.0), step=i) for i in range(500)])
    got = torch.bincount(ids, minlength=5) / 500
    assert (got - torch.tensor(P)).abs().max() < 4 * math.sqrt(0.25 / 500)
    assert torch.equal(draws(keys[0], 500)[:9], draws(keys[0], 9))


@pytest.mark.parametrize("more", [{}, {"top_k": 9}, {"top_p": 0.7, "repetition_penalty": 1.3}, {"typical_p": 0.8}])
def test_a_row_depends_on_itself_alone(more: dict[str, Any]) -> None:
    logits = 3 * torch.randn(64, 101, generator=torch.Generator().manual_seed(3))
    keys = random.split(random.key(2), 64)
    settings = Settings(temperature=0.9, **more)
    history = history_of([[i, 2 * i % 101] for i in range(64)], 101)
    together = sample(logits, keys, settings, 3, history)
    for i in (0, 17, 63):
        alone = History(history.seen[i : i + 1], history.counts[i : i + 1])
        assert sample(logits[i : i + 1], keys[i : i + 1], settings, 3, alone).item() == together[i]
    assert len(set(together.tolist())) > 20


def test_the_ends_of_the_unit_interval() -> None:
    logp = torch.tensor([[-math.inf, math.log(0.5), -math.inf, math.log(0.5), -math.inf]])
    assert choose(logp, torch.tensor([0.0], dtype=torch.float64)).tolist() == [1]
    assert choose(logp, torch.tensor([1 - 2**-53], dtype=torch.float64)).tolist() == [3]
    assert choose(torch.full((1, 5), math.nan), torch.tensor([0.5])).tolist() == [5]


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"temperature": -1}, "temperature=-1 is not a number from 0 to 100; 0 is greedy"),
        ({"temperature": math.nan}, "temperature=nan"),
        ({"temperature": "hot"}, "temperature='hot'"),
        ({"temperature": None}, "temperature=None"),
        ({"top_k": 0}, "top_k=0 is not a whole number of at least 1; leave it out"),
        ({"top_k": 2.5}, "top_k=2.5"),
        ({"top_k": True}, "top_k=True"),
        ({"top_p": 0}, "top_p=0 is not a number above 0 and at most 1; 0.9 keeps"),
        ({"top_p": 1.1}, "top_p=1.1"),
        ({"min_p": -0.1}, "min_p=-0.1 is not a number from 0 to 1"),
        ({"typical_p": 2}, "typical_p=2"),
        ({"repetition_penalty": 0}, "repetition_penalty=0 is not a number above 0"),
        ({"presence_penalty": math.inf}, "presence_penalty=inf"),
        ({"frequency_penalty": -101}, "frequency_penalty=-101"),
        ({"min_tokens": -1}, "min_tokens=-1"),
        ({"max_tokens": 0}, "max_tokens=0 is not a whole number of at least 1; None is up to"),
        ({"min_tokens": 9, "max_tokens": 8}, "min_tokens=9 is more than max_tokens=8"),
        ({"seed": -1}, "seed=-1"),
        ({"seed": 2**64}, "seed=18446744073709551616"),
        ({"stop": "END"}, "stop='END' must be a tuple of texts"),
        ({"stop": ("",)}, "none of them empty"),
        ({"stop_ids": (-1,)}, "stop_ids has -1"),
        ({"forbidden": (1.5,)}, "forbidden has 1.5"),
        ({"logit_bias": {3: math.nan}}, "logit_bias of 3 is nan"),
        ({"logit_bias": {-3: 1.0}}, "logit_bias has -3"),
    ],
)
def test_settings_are_checked(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError) as error:  # noqa: PT011  the text is compared below
        Settings(**settings)
    assert says in str(error.value)
    assert "\n" not in str(error.value)


def test_ids_outside_the_vocabulary() -> None:
    for settings in (Settings(forbidden=(5,)), Settings(logit_bias={7: 1.0})):
        with pytest.raises(ValueError, match="is not in the vocabulary of 5; choose 0 to 4"):
            filtered(LOGITS, settings)


@pytest.mark.parametrize("more", [{"top_p": 0.9}, {"typical_p": 0.7}, {"top_k": 40, "top_p": 0.8}, {"top_p": 0.999}])
@pytest.mark.parametrize("steep", [0.0, 0.01, 1.0, 30.0])
def test_a_few_are_looked_at_before_all_are_sorted(
    monkeypatch: pytest.MonkeyPatch, more: dict[str, Any], steep: float
) -> None:
    """Large vocabularies, steep and flat and with many equal logits: what a sort of everything keeps, to the bit."""
    logits = torch.randn(5, 20_000) * steep
    logits[1] = logits[1].round(decimals=1)
    settings = Settings(temperature=0.9, **more)
    quick = filtered(logits, settings)
    monkeypatch.setattr("fnlm.sampling.SOME", ())
    assert torch.equal(quick, filtered(logits, settings))
