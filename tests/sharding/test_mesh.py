"""Meshes, specs and layouts: who holds what, what is refused, and that wires do what they say."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch

from fnlm import shapes
from fnlm.sharded import groups, layout_of
from fnlm.sharding import (
    STRATEGIES,
    Layout,
    Mesh,
    P,
    local_shape,
    mesh_for,
    parse_mesh,
    planned,
    rows_of,
    shard,
    simulate,
    single,
    slices,
    span,
    spec_of,
    strategy,
    unshard,
)
from fnlm.sharding.mesh import members
from fnlm.sharding.ranks import positions_of
from fnlm.sharding.wires import Abandoned
from tests.reference import random_params
from tests.sharding.cases import config


def test_a_mesh_is_read_and_checked() -> None:
    assert parse_mesh("data=8, tensor=2", 16) == {"data": 8, "tensor": 2}
    assert parse_mesh("") == {}
    for text, world, message in (
        ("data=2,tensor=3", 8, r"mesh data=2,tensor=3 is 2 x 3 = 6 ranks, but 8 run; start 6, or choose sizes"),
        ("date=2", None, r"mesh axis 'date' is unknown; did you mean 'data'\?"),
        ("data=2,data=2", None, "names data twice"),
        ("data=0", None, "gives data the size '0'; write e.g. data=2"),
        ("data", None, "gives data the size ''"),
    ):
        with pytest.raises(ValueError, match=message) as raised:
            parse_mesh(text, world)
        assert "\n" not in str(raised.value)


def test_the_axes_of_a_strategy() -> None:
    assert mesh_for(strategy("zero3"), 4) == {"data": 4}
    assert mesh_for(strategy("hsdp"), 4, {"replica": 2, "shard": 2}) == {"replica": 2, "shard": 2}
    assert mesh_for(strategy("single"), 1) == {}
    for how, shape, message in (
        ("hsdp", {"data": 4}, r"strategy hsdp needs an axis shard, mesh data=4 has none; add shard=N"),
        ("zero2", {"replica": 2, "data": 2}, r"zero2 has no use for replica=2; its axes are data, context, tensor"),
        ("single", {"data": 4}, r"strategy single has no use for data=4; it runs on one rank"),
        ("ddp_flat", {"data": 2}, r"2 ranks, but 4 run"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            mesh_for(strategy(how), 4, shape)
    with pytest.raises(ValueError, match=r"strategy 'zero4' is unknown; did you mean 'zero"):
        strategy("zero4")
    with pytest.raises(ValueError, match=r"'bucket' is no field of a schedule; did you mean 'bucket_bytes'"):
        strategy("zero3", bucket=3)
    assert strategy("fsdp") is STRATEGIES["zero3"]
    assert strategy("zero") is STRATEGIES["zero1"]


def test_coordinates_and_products() -> None:
    mesh = planned({"replica": 2, "shard": 3, "tensor": 2}, 7)
    assert mesh.coordinates == {"replica": 1, "shard": 0, "tensor": 1}
    assert members(mesh.shape, ("shard",), 7) == [7, 9, 11]
    both = mesh.axis("shard", "replica")  # in the order of the mesh, whatever the order of the names
    assert both is not None and (both.name, both.size, both.index) == ("replica+shard", 6, 3)
    assert mesh.axis("data") is None and mesh.size("data") == 1
    assert single().axis("data") is None
    with pytest.raises(ValueError, match="rank 12 is not in mesh"):
        planned(mesh.shape, 12)


def test_parts_cover_a_dimension_once() -> None:
    for n in (1, 2, 5, 50257):
        for parts in (1, 2, 3, 8):
            spans = [span(n, parts, i) for i in range(parts)]
            assert spans[0][0] == 0 and spans[-1][1] == n
            assert all(a[1] == b[0] for a, b in pairwise(spans))
    assert [span(50257, 3, i) for i in range(3)] == [(0, 16753), (16753, 33506), (33506, 50257)]


def test_specs_of_units_and_products() -> None:
    mesh = planned({"data": 2, "tensor": 2})
    three_heads = P("tensor", unit=4)
    assert [slices((12, 5), three_heads, mesh, r)[0] for r in range(4)] == [slice(0, 8), slice(8, 12)] * 2
    further = three_heads.further(0, "data")
    assert [local_shape((12, 5), further, mesh, r) for r in range(4)] == [(4, 5), (2, 5), (4, 5), (2, 5)]
    assert repr(P(None, ("tensor", "data"))) == "P(None, ('tensor', 'data'))"
    assert spec_of([("a.*", P("data")), ("ab", P("tensor"))], "ab") == P("data")
    assert spec_of([("a", P("data"))], "ab") == P()  # a whole name, not a part of one


@pytest.mark.parametrize("text", ["data=3", "tensor=2", "data=2,tensor=2", "replica=2,shard=2", "data=7"])
@pytest.mark.parametrize("vocab", [11, 2])
def test_shards_together_are_the_whole(text: str, vocab: int) -> None:
    cfg = config(n_heads=6, n_kv_heads=3, d_model=12, vocab_size=vocab)
    params = random_params(shapes(cfg))
    how = {"data": "zero3", "tensor": "tensor_parallel", "replica": "hsdp"}[text.split("=")[0]]

    def rank(mesh: Mesh) -> None:
        layout = layout_of(cfg, how, mesh)
        own = shard(params, layout)
        assert all(own[k].shape == layout.local_shape(k) for k in own)
        whole = unshard(own, layout)
        assert all(torch.equal(whole[k], params[k]) for k in params)
        first, same = shard(params, layout, 0), shard(params, layout_of(cfg, how, mesh.at(0)))
        assert all(torch.equal(first[k], same[k]) for k in params)

    simulate(parse_mesh(text), rank)
    layouts = [layout_of(cfg, how, planned(parse_mesh(text), r)) for r in range(planned(parse_mesh(text)).world)]
    for name, spec in layouts[0].specs.items():
        assert sum(layout.owns(name) for layout in layouts) == layouts[0].mesh.size(*spec.axes)


def test_the_embedding_of_gpt2_on_three_ranks() -> None:
    layouts = [Layout(strategy("zero3"), planned({"data": 3}, r), {"w": (50257, 1)}, {"root": ["w"]}) for r in range(3)]
    assert [layout.local_shape("w") for layout in layouts] == [(16753, 1), (16753, 1), (16751, 1)]


def test_a_layout_can_be_read() -> None:
    text = str(layout_of(config(), "zero3", planned({"data": 2, "tensor": 2})))
    head, first, *rest = text.splitlines()
    assert head.split() == ["parameter", "shape", "spec", "here", "group", "bucket"]
    assert first.split() == ["embed.tokens.weight", "11x8", "P(('tensor',", "'data'))", "3x8", "root", "15"]
    assert len(rest) == len(shapes(config())) - 1


def test_every_parameter_is_in_one_group() -> None:
    names = {"a": (2,), "b": (2,)}
    for parts, message in (
        ({"root": ["a"]}, "1 parameters are in no group, first 'b'"),
        ({"root": ["a", "b"], "x": ["b"]}, "'b' is in the groups 'root' and 'x'; a parameter travels in one"),
        ({"root": ["a", "b", "c"]}, "'c', which is no parameter"),
    ):
        with pytest.raises(ValueError, match=message):
            Layout(strategy("zero3"), planned({"data": 2}), names, parts)


@pytest.mark.parametrize(
    ("more", "mesh", "message"),
    [
        ({"n_kv_heads": 1}, {"tensor": 2}, "n_kv_heads=1 is too few for tensor=2; choose at most tensor=1"),
        ({"n_heads": 2, "d_ff": 1}, {"tensor": 2}, "d_ff=1 is too few for tensor=2; choose at most tensor=1"),
        ({"seq_len": 9}, {"context": 2}, "seq_len=9 is not divisible by context=2; choose a multiple of 2"),
    ],
)
def test_models_that_do_not_fit_a_mesh(more: dict[str, Any], mesh: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        layout_of(config(**more), "tensor_parallel" if "tensor" in mesh else "context", planned(mesh))


def test_batches_that_do_not_fit_a_mesh() -> None:
    assert [rows_of(5, planned({"data": 3}, r)) for r in range(3)] == [slice(0, 2), slice(2, 4), slice(4, 5)]
    with pytest.raises(ValueError, match=r"2 rows are too few for 4 ranks along data; give .* at least 4 rows"):
        rows_of(2, planned({"data": 4}))
    with pytest.raises(ValueError, match="9 positions is not divisible by context=2"):
        positions_of(9, planned({"context": 2}))


def test_the_groups_are_those_of_the_forward() -> None:
    found = groups(config())
    assert list(found) == ["root", "blocks.0", "blocks.1", "blocks.2"]
    assert sorted(name for names in found.values() for name in names) == sorted(shapes(config()))


def test_poison_until_wait() -> None:
    def rank(mesh: Mesh) -> tuple[bool, float]:
        axis = mesh.axis("data")
        assert axis is not None
        x = torch.ones(3)
        work = axis.wire.all_reduce(x, "sum")
        early = bool(x.isnan().all())
        work.wait()
        work.wait()  # a second time does nothing
        return early, float(x.sum())

    assert simulate(2, rank) == [(True, 6.0)] * 2


def test_ranks_that_fail_or_do_not_come_end_the_others() -> None:
    def fails(mesh: Mesh) -> None:
        axis = mesh.axis("data")
        assert axis is not None
        if mesh.rank == 1:
            raise RuntimeError("this rank fails")
        axis.wire.all_reduce(torch.ones(1), "sum").wait()

    def stays_away(mesh: Mesh) -> None:
        axis = mesh.axis("data")
        assert axis is not None
        if mesh.rank != 2:
            axis.wire.all_reduce(torch.ones(1), "sum").wait()

    def disagrees(mesh: Mesh) -> None:
        axis = mesh.axis("data")
        assert axis is not None
        axis.wire.all_reduce(torch.ones(1 + mesh.rank), "sum").wait()

    with pytest.raises(RuntimeError, match="this rank fails"):
        simulate(3, fails)
    with pytest.raises(Abandoned, match=r"ranks \[2\] of the axis did not come to collective 1 within 0.3 s"):
        simulate(3, stays_away, timeout=0.3)
    with pytest.raises(Abandoned, match="ranks disagree about collective 1"):
        simulate(2, disagrees)


def test_a_strategy_with_its_schedule_as_text() -> None:
    row = strategy("fsdp:prefetch=2:overlap=false:bucket_bytes=none:reduce_dtype=bf16")
    assert row == strategy("zero3", prefetch=2, overlap=False, bucket_bytes=None, reduce_dtype="bf16")
    assert strategy("zero3:bucket_bytes=auto") == strategy("zero3")
    with pytest.raises(ValueError, match=r"overlap='maybe' is no value of a schedule; choose true or false"):
        strategy("zero3:overlap=maybe")
    with pytest.raises(ValueError, match=r"'overlapp' is no field of a schedule; did you mean 'overlap'"):
        strategy("zero3:overlapp=true")
