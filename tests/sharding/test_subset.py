"""A model that is trained in part ends where one process ends, under any strategy; what is trained travels home."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch

import fnlm
from fnlm import trainable
from fnlm.config import TrainConfig
from fnlm.sharded import layout_of, make_sharded_step, sharded_state
from fnlm.sharding import Mesh, check_copies, parse_mesh, shard, simulate, unshard
from tests.reference import random_params
from tests.sharding.cases import Result, adamw, batch, config, distance

LIMIT = 1e-10
PARTS: dict[str, dict[str, Any]] = {
    "lora": {"lora": 2},
    "some maps": {"lora": 3, "lora_targets": "q,down"},
    "freeze": {"freeze": "embed,blocks.0,blocks.1.mlp"},
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


def together(mesh: Mesh, how: str, model: str, part: str, micro: int) -> Result:
    cfg, subset, params = begun(model, part)
    layout, plan = layout_of(cfg, how, mesh, subset), fnlm.Plan(micro_batches=micro)
    own, rest = subset.parted(params)
    resting, state = shard(rest, layout), sharded_state(own, adamw(), layout, plan, fnlm.key(3))
    step, log = make_sharded_step(
        lambda axes: fnlm.make_lm_loss(cfg, fnlm.Compute(), axes), adamw(), layout, plan, resting=resting
    ), []  # fmt: skip
    for i in range(3):
        state, metrics = step(state, batch(cfg, i))
        log.append((float(metrics["train/loss"]), float(metrics["train/grad_norm"])))
    check_copies(state.params, layout)
    assert state.params.keys() == own.keys()
    assert all(torch.equal(x, rest[k]) for k, x in unshard(resting, layout).items())
    return unshard(state.params, layout), log


def gap(text: str, how: str, part: str, model: str = "gpt2", micro: int = 1) -> float:
    want = reference(model, part)
    ranks = simulate(parse_mesh(text), lambda mesh: together(mesh, how, model, part, micro), timeout=30)
    return max(distance(want, got) for got in ranks)


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("how", ["ddp_flat", "ddp_bucketed", "zero1", "zero2", "zero3"])
def test_parts(how: str, part: str) -> None:
    assert gap("data=2", how, part) < LIMIT


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize(
    ("text", "how"),
    [("data=2,tensor=2", "zero3"), ("tensor=3", "tensor_parallel"), ("data=3", "zero2"), ("data=1", "zero3"),
     ("replica=2,shard=2", "hsdp"), ("data=2,context=2", "ddp_bucketed")],
)  # fmt: skip
def test_products(text: str, how: str, part: str) -> None:
    assert gap(text, how, part, "llama", 1 if "context" in text else 3) < LIMIT
