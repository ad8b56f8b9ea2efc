"""Whether the tests have teeth: each of these errors, put in on purpose, is seen by the same comparison."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch

import fnlm
from fnlm import collectives, norms, optim, places, sharded_optim
from fnlm.sharded import layout_of
from fnlm.sharding import Link, Mesh, Ranks, parse_mesh, planned, shard, simulate, strategy
from fnlm.sharding.gathering import Flight, Gathering
from fnlm.sharding.layout import Layout
from fnlm.sharding.reducing import Reducing, Trip
from tests.reference import random_params
from tests.sharding.cases import adamw, alone, batch, config, distance, together

Patch = pytest.MonkeyPatch
CFG = config(bias=False)


def after_init(patch: Patch, change: Callable[[Layout], None]) -> None:
    old = Layout.__init__

    def init(self: Layout, *args: Any, **kwargs: Any) -> None:
        old(self, *args, **kwargs)
        change(self)

    patch.setattr(Layout, "__init__", init)


def forgotten_pvary(patch: Patch) -> None:
    patch.setattr(collectives, "pvary", lambda x, axis: x)


def double_psum(patch: Patch) -> None:
    once = collectives.psum
    patch.setattr(collectives, "psum", lambda x, axis: once(collectives.pvary(x, axis), axis))


def norms_not_lifted(patch: Patch) -> None:
    patch.setattr(norms, "pvary", lambda x, axis: x)


def heads_counted_by_rank(patch: Patch) -> None:
    true = places.heads_of

    def local(cfg: Any, axes: Any) -> slice:
        heads = true(cfg, axes)
        return slice(0, heads.stop - heads.start)

    patch.setattr(places, "heads_of", local)


def replicas_not_reduced(patch: Patch) -> None:
    after_init(patch, lambda layout: setattr(layout, "copies", None))


def missing_bucket(patch: Patch) -> None:
    after_init(patch, lambda layout: layout.buckets.pop() and None)


def reduction_not_waited_for(patch: Patch) -> None:
    patch.setattr(Trip, "end", lambda self: None)
    patch.setattr(Trip, "land", lambda self: None)


def gather_not_waited_for(patch: Patch) -> None:
    true = Gathering._land

    class Never:
        def wait(self) -> None: ...

    def land(self: Gathering, group: str) -> Any:
        self.flying[group] = Flight(self.flying[group].out, Never())
        return true(self, group)

    patch.setattr(Gathering, "_land", land)


def each_rank_for_itself(patch: Patch) -> None:
    patch.setattr(Ranks, "total", lambda self, x: x)


def shards_counted_as_copies(patch: Patch) -> None:
    patch.setattr(sharded_optim, "global_norm", lambda tree, layout: optim.global_norm(tree))


def last_micro_batch_only(patch: Patch) -> None:
    true, keep = Reducing._fill, Reducing._keep

    def fill(self: Reducing, bucket: Any, slot: Any, grad: Any) -> None:
        if bucket in self.buffers:
            self.buffers[bucket].filled.discard(slot.name)
        true(self, bucket, slot, grad)

    def forget(self: Reducing, trip: Trip) -> None:
        self.sums.pop(trip.bucket, None)
        keep(self, trip)

    patch.setattr(Reducing, "_fill", fill)
    patch.setattr(Reducing, "_keep", forget)


def means_instead_of_sums(patch: Patch) -> None:
    keep = Reducing._keep

    def scaled(self: Reducing, trip: Trip) -> None:
        trip.end()
        trip.part /= self.layout.mesh.world
        keep(self, trip)

    patch.setattr(Reducing, "_keep", scaled)


def shares_of_rows(patch: Patch) -> None:
    """Each rank counts by its rows, not by the tokens it has."""
    step = sys.modules["fnlm.step"]

    def shares(pieces: Any, ranks: Any) -> Any:
        n = [float(len(p.tokens)) for p in pieces]
        return torch.tensor([x / (sum(n) * ranks.layout.mesh.world) for x in n], dtype=torch.float64)

    patch.setattr(step, "_shares", shares)


def bucket_not_sent(patch: Patch) -> None:
    """One bucket stays at home: each rank keeps what it has of its part."""
    send = Reducing._send

    def most(self: Reducing, bucket: Any, flat: Any) -> None:
        if bucket is not self.layout.buckets[0]:
            return send(self, bucket, flat)
        index = self.layout.state.index if self.layout.state else 0
        part = flat.view(bucket.parts, -1)[index].clone()
        self.trips.append(Trip(bucket, part, 0, None, []))

    patch.setattr(Reducing, "_send", most)


def parameter_in_two_groups(patch: Patch) -> None:
    sharded = sys.modules["fnlm.sharded"]
    true = sharded.groups

    def twice(cfg: Any) -> Any:
        found = true(cfg)
        return {**found, "blocks.0": [*found["blocks.0"], "norm.weight"]}

    patch.setattr(sharded, "groups", twice)


def parameter_sent_with_two(patch: Patch) -> None:
    """The same, and nobody looks."""
    parameter_in_two_groups(patch)
    patch.setattr(sys.modules["fnlm.sharding.layout"], "_check_groups", lambda shapes, groups: None)


def rows_of_the_first(patch: Patch) -> None:
    true = Ranks.mine
    patch.setattr(Ranks, "mine", lambda self, piece, keys: (true(self, piece, keys)[0], keys[: len(keys) // 2]))


SEQUENCE = strategy("tensor_parallel", sequence_parallel=True)
MUTATIONS = [
    (forgotten_pvary, "tensor=2", "tensor_parallel", 1),
    (double_psum, "tensor=2", "tensor_parallel", 1),
    (heads_counted_by_rank, "tensor=2", "tensor_parallel", 1),
    (norms_not_lifted, "tensor=2", SEQUENCE, 1),
    (replicas_not_reduced, "replica=2,shard=2", "hsdp", 1),
    (replicas_not_reduced, "data=2,context=2", "zero2", 1),
    (missing_bucket, "data=2", strategy("ddp_bucketed", bucket_bytes=2000), 1),
    (missing_bucket, "data=2", strategy("zero2", bucket_bytes=2000), 1),
    (reduction_not_waited_for, "data=2", "zero2", 1),
    (reduction_not_waited_for, "data=2", "ddp_bucketed", 1),
    (gather_not_waited_for, "data=2", "zero3", 1),
    (each_rank_for_itself, "data=2", "ddp_bucketed", 1),
    (shards_counted_as_copies, "data=2", "zero1", 1),
    (last_micro_batch_only, "data=2", "zero1", 3),
    (last_micro_batch_only, "data=2", "ddp_flat", 3),
    (last_micro_batch_only, "data=2", "zero3", 3),
    (means_instead_of_sums, "data=2", "zero3", 1),
    (means_instead_of_sums, "data=2", "ddp_bucketed", 1),
    (shares_of_rows, "data=2", "zero2", 1),
    (bucket_not_sent, "data=2", "zero3", 1),
    (bucket_not_sent, "data=2", "ddp_bucketed", 1),
    (parameter_in_two_groups, "data=2", "zero2", 1),
    (parameter_sent_with_two, "data=2", "zero2", 1),
    (rows_of_the_first, "data=2", "zero3", 1),
]


def worst(text: str, how: Any, micro: int, **more: Any) -> float:
    want = alone(CFG, adamw())
    ranks = simulate(parse_mesh(text), lambda mesh: together(mesh, how, CFG, adamw(), micro, **more), timeout=5)
    return max(distance(want, got) for got in ranks)


@pytest.mark.parametrize(("mutation", "text", "how", "micro"), MUTATIONS)
def test_each_error_is_seen(mutation: Callable[[Patch], None], text: str, how: Any, micro: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        mutation(patch)
        try:
            seen = worst(text, how, micro) > 1e-6
        except (ValueError, RuntimeError, KeyError) as error:  # refused, or out of step
            seen = bool(str(error))
    assert seen
    assert worst(text, how, micro) < 1e-10  # and without it nothing is


def test_another_seed_on_one_rank_is_seen() -> None:
    assert worst("data=2", "zero2", 1, seed=lambda mesh: 3 + mesh.rank) > 1e-6


def test_a_group_that_is_used_twice_is_refused() -> None:
    layout = layout_of(CFG, "zero2", planned({"data": 2}))
    params = shard(random_params(fnlm.shapes(CFG)), layout)

    def twice(live: Any, batch: Any, key: Any, use: Any) -> Any:
        root = {k: v for k, v in live.items() if not k.startswith("blocks.")}
        return sum(use("root", root)["norm.weight"].sum() for _ in range(2))

    plan = fnlm.Plan(ranks=Ranks(layout))
    with pytest.raises(ValueError, match="arrive twice; a group is used once"):
        fnlm.value_and_grad(twice, plan)(params, batch(CFG, 0))


def test_a_group_of_other_parameters_is_refused() -> None:
    layout = layout_of(CFG, "zero2", planned({"data": 2}))
    with pytest.raises(ValueError, match=r"'root' with norm.weight is no group of the layout, which has root, blo"):
        Link(layout, fnlm.init_params(CFG, fnlm.key(0))["norm.weight"].dtype).use(
            "root", {"norm.weight": random_params({"w": (8,)})["w"]}
        )


def test_copies_that_differ_are_seen() -> None:
    from fnlm.sharding import check_copies

    def rank(mesh: Mesh) -> None:
        layout = layout_of(CFG, "ddp_bucketed", mesh)
        params = shard(random_params(fnlm.shapes(CFG)), layout)
        check_copies(params, layout)
        params["norm.weight"][mesh.rank] += 1e-9
        check_copies(params, layout)

    with pytest.raises(ValueError, match=r"norm.weight differs by 1.00e-09 along data"):
        simulate(2, rank)


def test_parameters_of_several_dtypes_are_refused() -> None:
    layout = layout_of(CFG, "zero2", planned({"data": 2}))
    params = shard(random_params(fnlm.shapes(CFG)), layout)
    params["norm.weight"] = params["norm.weight"].float()
    with pytest.raises(ValueError, match=r"parameters of torch.float32, torch.float64 would travel in one buffer"):
        fnlm.value_and_grad(fnlm.make_lm_loss(CFG), fnlm.Plan(ranks=Ranks(layout)))(params, batch(CFG, 0))
