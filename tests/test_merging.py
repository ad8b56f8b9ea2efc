"""Merging is the arithmetic that it says it is, and distances are those of whole vectors."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from fnlm import ModelConfig, init_params, key, tree
from fnlm.merging import add_differences, average, differing, distance, distances

CFG = ModelConfig(vocab_size=31, n_layers=2, n_heads=2, d_model=8, seq_len=8)
TREES = [init_params(CFG, key(i)) for i in range(3)]


def test_an_average_is_the_mean() -> None:
    found = average(TREES)
    for name, value in found.items():
        torch.testing.assert_close(value, torch.stack([t[name] for t in TREES]).mean(0), rtol=1e-6, atol=1e-7)
    weighted = average(TREES, [3.0, 1.0, 0.0])
    for name, value in weighted.items():
        torch.testing.assert_close(value, 0.75 * TREES[0][name] + 0.25 * TREES[1][name], rtol=1e-6, atol=1e-7)


def test_the_average_of_one_model_is_that_model_bit_for_bit() -> None:
    assert tree.equal(average([TREES[0]] * 3), TREES[0])
    assert tree.equal(average([TREES[0]], [0.3]), TREES[0])
    half = {k: v.bfloat16() for k, v in TREES[0].items()}
    assert tree.equal(average([half, half]), half)


def test_differences_are_added_to_the_base() -> None:
    base, one, two = TREES
    found = add_differences(base, [one, two], [0.5, -2.0])
    for name, value in found.items():
        want = base[name] + 0.5 * (one[name] - base[name]) - 2.0 * (two[name] - base[name])
        torch.testing.assert_close(value, want, rtol=1e-5, atol=1e-6)
    assert tree.equal(add_differences(base, [one]), one)  # the whole difference: exact in float64
    assert tree.equal(add_differences(base, [one], [0.0]), base)


def test_inputs_stay() -> None:
    before = tree.map(torch.clone, TREES[0])
    for made in (average(TREES), add_differences(TREES[0], TREES[1:])):
        for value in made.values():
            value.add_(1)
    assert tree.equal(TREES[0], before)


@pytest.mark.parametrize(
    ("weights", "says"),
    [
        ([1.0], "1 weights do not suit 3 models"),
        ([1, -1, 0], "sum must be above 0"),
        ([1, 1, math.nan], "finite"),
        ([1e308, 1e308, 1.0], "add up to inf"),
    ],
)
def test_weights_that_do_not_fit(weights: list[float], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        average(TREES, weights)


def test_what_comes_of_it_is_finite() -> None:
    with pytest.raises(ValueError, match=r"embed\.tokens\.weight would have numbers that are not finite"):
        add_differences(TREES[0], TREES[1:], [1e300, 1.0])


def test_trees_of_another_shape() -> None:
    with pytest.raises(ValueError, match=r"norm.weight is \(8,\) in the first tree and None in tree 2"):
        average([TREES[0], {k: v for k, v in TREES[1].items() if k != "norm.weight"}])
    with pytest.raises(ValueError, match="there is nothing to merge"):
        average([])


def test_distances_by_hand() -> None:
    a, b = torch.tensor([3.0, 4.0]), torch.tensor([[3.0], [1.0]]).view(2)
    found = distance(a, b)
    assert found.relative == pytest.approx(3 / 5) and found.max_abs == 3.0
    assert found.cosine == pytest.approx(13 / (5 * math.sqrt(10)))
    assert distance(a, a) == (0.0, 0.0, pytest.approx(1.0))
    zero = distance(torch.zeros(2), a)
    assert (zero.relative, zero.max_abs) == (math.inf, 4.0) and math.isnan(zero.cosine)


def test_the_distance_of_all_is_that_of_one_long_vector() -> None:
    found = distances(TREES[0], TREES[1])
    whole = distance(*(torch.cat([v.flatten() for v in t.values()]) for t in TREES[:2]))
    assert found[""] == (pytest.approx(whole.relative), whole.max_abs, pytest.approx(whole.cosine))
    assert set(found) - {""} == set(TREES[0])


def test_what_differs_is_named_and_what_does_not_count_is_not() -> None:
    assert differing(CFG, replace(CFG, n_kv_heads=2, d_ff=32, d_head=4, dropout_attn=0.1, init_std=0.1)) == []
    assert differing(CFG, replace(CFG, n_layers=3, mlp="relu")) == ["n_layers=2 and 3", "mlp='gelu' and 'relu'"]
    assert differing(CFG, replace(CFG, init="mup")) != []
