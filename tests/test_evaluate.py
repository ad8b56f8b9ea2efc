"""Evaluation is the plain float64 mean over every token, whatever the windows, the batches and the mask."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from fnlm import Compute, ModelConfig, forward, init_params, key, tree
from fnlm.data import DataError, Split
from fnlm.evaluate import Evaluation, chosen, evaluate, window_starts

CFG = ModelConfig(vocab_size=23, n_layers=2, n_heads=2, d_model=16, seq_len=8, positions="rope")
# Large parameters: a loss far from log V, so that a token left out or counted twice shows.
PARAMS = {k: v.double() * 8 for k, v in init_params(CFG, key(3)).items()}


def split(n: int, masked: bool = False, text: int = 100) -> Split:
    drawn = np.random.default_rng(n)
    mask = (drawn.random(n) < 0.4).astype(np.uint8) if masked else None
    return Split(drawn.integers(0, 23, n).astype(np.uint16), mask, 1, text, 23)


def by_hand(data: Split, seq_len: int = 8, stride: int | None = None) -> tuple[float, int]:
    """Token by token: the sum over the counted targets, each predicted from its window's tokens alone."""
    tokens = torch.from_numpy(data.tokens.astype(np.int64))
    total, count = 0.0, 0
    for at in range(1, len(tokens)):
        if stride is None or at <= seq_len:
            first = (at - 1) // seq_len * seq_len
        else:
            first = -(-(at - seq_len) // stride) * stride
        if data.mask is None or data.mask[at]:
            logits = forward(PARAMS, tokens[None, first:at], CFG, compute=Compute(kernels="plain"))[0, -1]
            total -= float(logits.log_softmax(-1)[tokens[at]])
            count += 1
    return total / count, count


@pytest.mark.parametrize("batch_size", [1, 3, 100])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("n", [2, 9, 10, 65, 71])
def test_it_is_the_plain_mean_over_all_tokens(n: int, masked: bool, batch_size: int) -> None:
    data = split(n, masked)
    if masked and not data.mask[1:].any():  # type: ignore[index]
        data.mask[-1] = 1  # type: ignore[index]
    found, (loss, count) = evaluate(PARAMS, CFG, data, batch_size=batch_size), by_hand(data)
    assert found.tokens == count
    assert found.loss == pytest.approx(loss, rel=1e-12)
    assert found.perplexity == pytest.approx(math.exp(loss))
    assert found.complete


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("seq_len", "stride"), [(8, 3), (8, 1), (6, 6), (5, 4), (8, 8)])
def test_sliding_windows_count_each_token_once(seq_len: int, stride: int, masked: bool) -> None:
    data = split(50, masked)
    loss, count = by_hand(data, seq_len, stride)
    found = evaluate(PARAMS, CFG, data, seq_len=seq_len, stride=stride, batch_size=4)
    assert (found.tokens, found.loss) == (count, pytest.approx(loss, rel=1e-12))


def test_context_carried_changes_the_loss() -> None:
    data = split(65)
    assert evaluate(PARAMS, CFG, data).loss != pytest.approx(evaluate(PARAMS, CFG, data, stride=1).loss, rel=1e-6)


def test_bits_per_byte() -> None:
    data = split(41, text=123)
    found = evaluate(PARAMS, CFG, data)
    assert found.bits_per_byte == pytest.approx(found.loss / math.log(2) * 41 / 123, rel=1e-12)
    assert evaluate(PARAMS, CFG, split(41, text=0)).bits_per_byte is None
    assert evaluate(PARAMS, CFG, split(41, masked=True)).bits_per_byte is None


def test_float32_and_bf16_are_near_and_parameters_stay() -> None:
    params = {k: v.float() / 4 for k, v in PARAMS.items()}
    before = tree.map(torch.clone, params)
    data = split(200)
    exact = evaluate({k: v.double() for k, v in params.items()}, CFG, data).loss
    assert evaluate(params, CFG, data).loss == pytest.approx(exact, rel=1e-6)
    half = evaluate(params, CFG, data, precision="bf16").loss
    assert half == pytest.approx(exact, rel=2e-2)
    assert half != evaluate(params, CFG, data).loss
    assert tree.equal(params, before)


def test_sums_lose_nothing_over_many_tokens() -> None:
    """float32 sums of 40,000 losses would be off in the sixth digit."""
    data = split(40001)
    total = sum(
        evaluate(PARAMS, CFG, data._replace(tokens=data.tokens[i : i + 8001])).loss * 8000
        for i in range(0, 40000, 8000)
    )
    assert evaluate(PARAMS, CFG, data).loss == pytest.approx(total / 40000, rel=1e-12)


def test_limit_takes_windows_from_all_over_the_split() -> None:
    data = split(801)
    some = evaluate(PARAMS, CFG, data, limit=10)
    assert some.tokens == 80
    assert some.complete
    assert some.loss == evaluate(PARAMS, CFG, data, limit=10, batch_size=3).loss
    assert evaluate(PARAMS, CFG, data, limit=1000).loss == evaluate(PARAMS, CFG, data).loss
    assert chosen(window_starts(801, 8, 8), 4).tolist() == [96, 296, 496, 696]
    assert len(set(chosen(np.arange(7), 6).tolist())) == 6


def test_stop_is_asked_before_each_batch() -> None:
    asked: list[int] = []

    def stop() -> bool:
        asked.append(1)
        return len(asked) > 2

    data = split(81)
    found = evaluate(PARAMS, CFG, data, batch_size=1, stop=stop)
    assert not found.complete
    assert found.loss == pytest.approx(evaluate(PARAMS, CFG, data._replace(tokens=data.tokens[:17])).loss)
    nothing = evaluate(PARAMS, CFG, data, stop=lambda: True)
    assert math.isnan(nothing.loss)
    assert nothing._replace(loss=0.0, perplexity=0.0, bits_per_byte=None, seconds=0.0) == Evaluation(
        0.0, 0.0, None, 0, 0.0, complete=False
    )


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"seq_len": 9}, "seq_len=9 is not from 1 to the model's seq_len=8"),
        ({"stride": 9}, "stride=9 is not from 1 to seq_len=8"),
        ({"limit": 0}, "limit=0"),
    ],
)
def test_sizes_are_refused(given: dict[str, int], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        evaluate(PARAMS, CFG, split(30), **given)


def test_data_that_cannot_be_evaluated() -> None:
    data = split(30)
    with pytest.raises(DataError, match="1 tokens has nothing to predict"):
        evaluate(PARAMS, CFG, data._replace(tokens=data.tokens[:1]))
    with pytest.raises(DataError, match="none of the 30 tokens is learnt"):
        evaluate(PARAMS, CFG, data._replace(mask=np.zeros(30, np.uint8)))
    with pytest.raises(DataError, match="token 23, the model has vocab_size=23"):
        evaluate(PARAMS, CFG, data._replace(tokens=np.full(30, 23, np.uint16)))
