"""A model that is trained in part ends where one process ends, under any strategy; what is trained travels home."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch

import fnlm
from fnlm import trainable
from fnlm.config import TrainConfig
from fnlm.forecast import checkpoint_bytes, forecast
from fnlm.sharded import layout_of, make_sharded_step, sharded_state, with_resting
from fnlm.sharding import Book, Layout, Mesh, Ranks, check_copies, parse_mesh, planned, shard, simulate, unshard
from fnlm.sharding.traffic import parameter_calls, sent
from tests.reference import random_params
from tests.sharding.cases import Result, adamw, batch, config, distance

LIMIT, SLOW = 1e-10, pytest.mark.slow
PARTS: dict[str, dict[str, Any]] = {
    "lora": {"lora": 2},
    "some maps": {"lora": 3, "lora_targets": "q,down"},
    "freeze": {"freeze": "embed,blocks.0,blocks.1.mlp"},
    "top": {"freeze": "embed,blocks"},
    "middle": {"freeze": "embed,norm,blocks.0,blocks.2"},
}
GQA = {"n_heads": 6, "n_kv_heads": 3, "d_model": 24, "positions": "rope", "norm": "rmsnorm", "mlp": "swiglu"}
MODELS: dict[str, dict[str, Any]] = {"gpt2": {}, "llama": {**GQA, "tied": False}}


def begun(model: str, part: str) -> tuple[fnlm.ModelConfig, trainable.Subset, fnlm.Params]:
    """Parameters with adapters that are not 0, which would hide the gradients of A."""
    cfg = config(**{"bias": False, **MODELS[model]})
    subset = trainable.subset_of(cfg, TrainConfig(steps=3, batch_size=24, **PARTS[part]))
    return cfg, subset, random_params(subset.sizes)


@cache
def reference(model: str, part: str) -> Result:
    cfg, subset, params = begun(model, part)
    own, resting = subset.parted(params)
    state, optimizer = fnlm.init_state(own, adamw(), key=fnlm.key(3)), adamw()
    step, log = fnlm.make_step(subset.loss(fnlm.make_lm_loss(cfg), resting, None), optimizer), []
    for i in range(3):
        state, metrics = step(state, batch(cfg, i))
        log.append((float(metrics["train/loss"]), float(metrics["train/grad_norm"])))
    return state.params, log


def trained(
    mesh: Mesh, how: str, model: str, part: str, micro: int, steps: int = 3
) -> tuple[Layout, fnlm.Params, Result]:
    """This rank's part of what rests, and of what was trained."""
    cfg, subset, params = begun(model, part)
    layout, plan = layout_of(cfg, how, mesh, subset), fnlm.Plan(micro_batches=micro)
    own, rest = subset.parted(params)
    resting, state = shard(rest, layout), sharded_state(own, adamw(), layout, plan, fnlm.key(3))
    step = make_sharded_step(
        lambda axes: fnlm.make_lm_loss(cfg, fnlm.Compute(), axes), adamw(), layout, plan, resting=resting
    )
    log = []
    for i in range(steps):
        state, metrics = step(state, batch(cfg, i))
        log.append((float(metrics["train/loss"]), float(metrics["train/grad_norm"])))
    assert state.params.keys() == own.keys()
    return layout, resting, (state.params, log)


def together(mesh: Mesh, how: str, model: str, part: str, micro: int) -> Result:
    layout, resting, (own, log) = trained(mesh, how, model, part, micro)
    check_copies(own, layout)
    rest = begun(model, part)[2]
    assert all(torch.equal(x, rest[k]) for k, x in unshard(resting, layout).items())
    return unshard(own, layout), log


def gap(text: str, how: str, part: str, model: str = "gpt2", micro: int = 1) -> float:
    want = reference(model, part)
    ranks = simulate(parse_mesh(text), lambda mesh: together(mesh, how, model, part, micro), timeout=30)
    return max(distance(want, got) for got in ranks)


FAST = ["lora", *(pytest.param(p, marks=SLOW) for p in PARTS if p != "lora")]


@pytest.mark.parametrize("part", FAST)
@pytest.mark.parametrize("how", [pytest.param("ddp_flat", marks=SLOW), "ddp_bucketed", "zero1", "zero2", "zero3"])
def test_parts(how: str, part: str) -> None:
    assert gap("data=2", how, part) < LIMIT


def test_adapters_where_maps_are_split() -> None:
    assert gap("data=2,tensor=2", "zero3", "lora") < LIMIT


@pytest.mark.slow
@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize(
    ("text", "how"),
    [("data=2,tensor=2", "zero3"), ("tensor=3", "tensor_parallel"), ("data=3", "zero2"), ("data=1", "zero3"),
     ("replica=2,shard=2", "hsdp"), ("data=2,context=2", "ddp_bucketed")],
)  # fmt: skip
def test_products(text: str, how: str, part: str) -> None:
    assert gap(text, how, part, "llama", 1 if "context" in text else 3) < LIMIT


@pytest.mark.parametrize("micro", [pytest.param(1, marks=SLOW), 3])
@pytest.mark.parametrize("part", FAST)
@pytest.mark.parametrize("how", ["ddp_bucketed", "zero1", "zero2", "zero3"])
def test_bytes_are_those_of_the_formula(how: str, part: str, micro: int) -> None:
    """Gradients of what is trained alone; zero3 gathers nothing again that no gradient passes."""
    cfg, subset, params = begun("llama", part)
    book = Book()
    layout = layout_of(cfg, how, planned({"data": 4}).counted(book), subset)
    own, low = (shard({k: p.float() for k, p in some.items()}, layout) for some in subset.parted(params))
    plan = fnlm.Plan(ranks=Ranks(layout, resting=low), micro_batches=micro, precision="fp32")
    run = fnlm.value_and_grad(with_resting(fnlm.make_lm_loss(cfg), low, layout), plan)
    _, grads = run(own, batch(cfg, 0))
    assert grads.keys() == own.keys()
    counted = Counter(c for c in book if c.nbytes > 8)
    assert counted == Counter(parameter_calls(layout, micro))
    count = sum(p.numel() for k, p in params.items() if not subset.rests(k))
    homeward = sum(c.nbytes for c in counted.elements() if c.op != "all_gather")
    times = micro if how in ("zero2", "zero3") else 1
    assert 4 * count * times <= homeward < 1.35 * 4 * count * times  # and padding


def test_ranks_with_adapters_send_adapters_alone() -> None:
    """A step under ddp, counted on the wires: gradients of adapters, two totals and a loss, nothing of the model."""
    cfg, subset, _ = begun("gpt2", "lora")
    few, all_of_it = (sum(math.prod(s) for s in x.values()) for x in (lora_sizes(subset), subset.sizes))

    def rank(mesh: Mesh) -> float:
        book = Book()
        trained(mesh.counted(book), "ddp_bucketed", "gpt2", "lora", 1, 1)
        return sum(sent(book).values())

    ours = simulate(2, rank)[0]  # 2 N (n-1)/n with n=2, in float64
    assert 8 * few <= ours <= 8 * few + 64
    assert ours < 8 * all_of_it / 3
    train = TrainConfig(steps=3, batch_size=2, precision="fp32", **PARTS["lora"])
    plan = forecast(cfg, train, "ddp_bucketed", {"data": 2})
    assert 4 * few <= sum(plan.sent.values()) <= 4 * few + 64
    assert plan.gradients == 4 * few
    assert 8 * few <= plan.optimizer_state <= 8 * few + 64
    assert plan.parameters == 4 * all_of_it
    assert checkpoint_bytes(cfg, train) == pytest.approx(4 * all_of_it + 8 * few, abs=64)


def lora_sizes(subset: trainable.Subset) -> dict[str, tuple[int, ...]]:
    return {k: s for k, s in subset.sizes.items() if not subset.rests(k)}


def test_zero3_holds_no_model_with_adapters_added() -> None:
    """What adapters make of a group is dropped with it and made again; one more block costs what its shards do."""
    cfg = fnlm.ModelConfig(vocab_size=16, seq_len=4, n_layers=12, n_heads=2, d_model=64, d_ff=256)
    train = TrainConfig(steps=3, batch_size=1, lora=2, precision="fp32")
    layers = [forecast(replace(cfg, n_layers=n), train, "zero3", {"data": 64}).peak for n in (3, 5)]
    one = 4 * 12 * 64 * 64
    assert layers[1] - layers[0] < one / 3  # two more blocks
    assert 2 * one < layers[1] < 4.4 * one  # a gradient of a whole map is gone as soon as its adapters have theirs
