"""Trees of tensors: paths, round trips and refusals."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fnlm import tree


class Pair(NamedTuple):
    left: Any
    right: Any


def a_tensor(n: int) -> Tensor:
    return torch.arange(n, dtype=torch.float32)


names = st.text("abc._", min_size=1, max_size=3)
trees = st.recursive(
    st.integers(0, 5).map(a_tensor) | st.none(),
    lambda inner: (
        st.dictionaries(names, inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.builds(Pair, inner, inner)
    ),
    max_leaves=8,
)


@given(trees)
def test_flatten_and_back(t: Any) -> None:
    flat = tree.flatten(t)
    back = tree.unflatten(flat, t)
    assert tree.equal(back, t)
    assert repr(tree.map(lambda x: 0, back)) == repr(tree.map(lambda x: 0, t))  # the same structure
    assert list(tree.flatten(back)) == list(flat)


@given(trees)
def test_map_visits_every_leaf_once_and_keeps_the_structure(t: Any) -> None:
    seen: list[Tensor] = []

    def visit(x: Tensor) -> Tensor:
        seen.append(x)
        return x + 1

    after = tree.map(visit, t)
    assert [id(x) for x in seen] == [id(x) for _, x in tree.leaves(t)]
    assert tree.equal(tree.map(lambda x: x - 1, after), t)
    assert tree.equal(tree.map(lambda x, y: x - y, t, t), tree.map(torch.zeros_like, t))


@given(trees)
def test_sizes(t: Any) -> None:
    flat = [x for _, x in tree.leaves(t)]
    assert tree.size(t) == sum(x.numel() for x in flat)
    assert tree.nbytes(t) == 4 * tree.size(t)


def test_paths() -> None:
    t = {"adam": Pair({"embed.weight": a_tensor(1)}, None), "all": (a_tensor(2), (), a_tensor(3))}
    assert list(tree.flatten(t)) == ["adam/left/embed.weight", "all/0", "all/2"]
    assert list(tree.flatten(a_tensor(1))) == [""]


def test_map_takes_the_rest_by_name_not_by_order() -> None:
    a, b = {"x": a_tensor(1) + 1, "y": a_tensor(1) + 2}, {"y": a_tensor(1) + 20, "x": a_tensor(1) + 10}
    assert {k: v.item() for k, v in tree.map(lambda p, q: p + q, a, b).items()} == {"x": 11, "y": 22}


def test_select_takes_whole_words() -> None:
    params = {f"blocks.{i}.w": a_tensor(i) for i in range(12)} | {"blocks": a_tensor(1)}
    assert list(tree.select(params, "blocks.1")) == ["w"]
    assert tree.select(params, "blocks.1")["w"] is params["blocks.1.w"]
    assert len(tree.select(params, "blocks")) == 12
    assert tree.select(params, "block") == {}


@pytest.mark.parametrize("leaf", [3, 1.0, "text", [], {1, 2}, torch.float32])
def test_other_leaves_are_refused(leaf: Any) -> None:
    with pytest.raises(ValueError, match=f"not {type(leaf).__name__}"):
        tree.flatten({"a": leaf})


def test_a_missing_tensor_is_named() -> None:
    with pytest.raises(ValueError, match="no tensor for 'a/b'"):
        tree.unflatten({}, {"a": {"b": a_tensor(1)}})


@pytest.mark.parametrize(
    "other",
    [
        {"a": a_tensor(3) + 1},
        {"a": a_tensor(3).double()},
        {"a": a_tensor(4)},
        {"b": a_tensor(3)},
        {},
        {"a": a_tensor(3)[None]},
    ],
)
def test_equal_sees_every_difference(other: Any) -> None:
    assert tree.equal({"a": a_tensor(3)}, {"a": a_tensor(3)})
    assert not tree.equal({"a": a_tensor(3)}, other)
