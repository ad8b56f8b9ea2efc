"""Adapters as a transform of trees, what is trained of a model, and how fast."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch

import fnlm
from fnlm import lora, optim
from fnlm.config import Compute, TrainConfig
from fnlm.interop import carried
from fnlm.loop import RunConfig
from fnlm.losses import make_lm_loss
from fnlm.names import chosen
from fnlm.presets import optimizer_of, windowed
from fnlm.step import Plan, init_state, make_step, value_and_grad
from fnlm.trainable import rates_of, subset_of

CFG = fnlm.ModelConfig(
    vocab_size=23, n_layers=3, n_heads=2, d_model=16, seq_len=300, positions="rope", mlp="swiglu", tied=False
)
PARAMS = fnlm.init_params(CFG, fnlm.key(0))
MAPS = 7 * CFG.n_layers


def train(**more: Any) -> TrainConfig:
    return TrainConfig(**{"steps": 10, "batch_size": 2, "lr": 1e-2, "precision": "fp32", **more})


def batch(length: int = 12, rows: int = 2) -> fnlm.Batch:
    tokens = torch.randint(0, CFG.vocab_size, (rows, length + 1), generator=torch.Generator().manual_seed(1))
    return fnlm.Batch(tokens[:, :-1], tokens[:, 1:], torch.ones(rows, length))


def moved(adapters: fnlm.Params) -> fnlm.Params:
    made = torch.Generator().manual_seed(4)
    return {k: x + 0.2 * torch.randn(x.shape, generator=made) for k, x in adapters.items()}


def test_fresh_adapters_change_nothing_and_merged_ones_what_they_add() -> None:
    fresh = lora.init(PARAMS, 4, fnlm.key(1))
    assert len(fresh) == 2 * MAPS
    assert all(torch.equal(p, PARAMS[k]) for k, p in lora.apply(PARAMS, fresh, 2.0).items())
    adapters, tokens = moved(fresh), batch().tokens
    merged = lora.merge({**PARAMS, **adapters}, 2.0)
    assert merged.keys() == PARAMS.keys()
    for name in ("blocks.1.attn.q", "blocks.2.mlp.down"):
        added = 2.0 * adapters[f"{name}.lora_b"] @ adapters[f"{name}.lora_a"]
        assert torch.allclose(merged[f"{name}.weight"], PARAMS[f"{name}.weight"] + added, atol=1e-6)
    ours = fnlm.forward(merged, tokens, CFG)
    assert (ours - fnlm.forward(lora.apply(PARAMS, adapters, 2.0), tokens, CFG)).abs().max() <= 1e-5
    assert (ours - fnlm.forward(PARAMS, tokens, CFG)).abs().max() > 1e-2


def test_an_adapter_depends_on_the_key_and_its_name_alone() -> None:
    all_of_them, some = (lora.init(PARAMS, 4, fnlm.key(1), targets) for targets in ("*", "q,mlp"))
    assert {k.split(".")[-2] for k in some} == {"q", "gate", "up", "down"}
    assert all(torch.equal(x, all_of_them[k]) for k, x in some.items())
    other = lora.init(PARAMS, 4, fnlm.key(2))
    assert not torch.equal(other["blocks.0.attn.q.lora_a"], all_of_them["blocks.0.attn.q.lora_a"])
    assert float(all_of_them["blocks.0.mlp.down.lora_a"].abs().max()) <= CFG.ff_dim**-0.5


@pytest.mark.parametrize("length", [12, 280])  # above 256 positions blocks have gradients by hand
def test_gradients_flow_to_adapters_alone_and_are_right(length: int) -> None:
    """Against plain operations on the sum, in float64."""
    params = {k: p.double() for k, p in PARAMS.items()}
    subset, seen = subset_of(CFG, train(lora=3, lora_alpha=6.0)), batch(length)
    adapters = moved({k: x.double() for k, x in lora.init(params, 3, fnlm.key(1)).items()})
    value, grads = value_and_grad(subset.loss(make_lm_loss(CFG), params, None))(adapters, seen)
    leaves = {k: x.clone().requires_grad_() for k, x in adapters.items()}
    right = make_lm_loss(CFG, Compute(kernels="plain"))(lora.apply(params, leaves, 2.0), seen)
    wanted = dict(zip(leaves, torch.autograd.grad(right, list(leaves.values())), strict=True))
    assert grads.keys() == adapters.keys()
    assert torch.allclose(value, right, atol=1e-10)
    assert max(float((grads[k] - wanted[k]).abs().max()) for k in grads) < 1e-9


@pytest.mark.parametrize("length", [12, 280])
@pytest.mark.parametrize("freeze", ["embed,blocks.[01].*", "head,*.q,norm", "blocks.*.mlp"])
def test_what_is_frozen_has_no_gradient_and_the_rest_the_same(freeze: str, length: int) -> None:
    subset, seen = subset_of(CFG, train(freeze=freeze)), batch(length)
    own, resting = subset.parted(PARAMS)
    assert own
    assert resting
    _, grads = value_and_grad(subset.loss(make_lm_loss(CFG), resting, None))(own, seen)
    _, whole = value_and_grad(make_lm_loss(CFG))(PARAMS, seen)
    assert grads.keys() == own.keys()
    assert max(float((grads[k] - whole[k]).abs().max()) for k in grads) < 1e-6


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_steps_change_what_is_trained_and_no_bit_of_the_rest(precision: str) -> None:
    settings = train(lora=3, precision=precision, micro_batches=2)
    subset, plan = subset_of(CFG, settings), Plan(settings.precision, 2)
    own, resting = subset.parted(subset.begun(PARAMS, fnlm.key(1)))
    before = {k: x.clone() for k, x in resting.items()}
    dtype = None if precision == "fp32" else {"bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    optimizer = optimizer_of(settings, CFG)
    state = init_state(own, optimizer, plan)
    step = make_step(subset.loss(make_lm_loss(CFG), resting, dtype), optimizer, plan)
    losses = []
    for _ in range(8):
        state, metrics = step(state, batch())
        losses.append(float(metrics["train/loss"]))
    assert losses[-1] < losses[0] - 0.05
    assert all(torch.equal(x, before[k]) for k, x in resting.items())
    paths = fnlm.tree.flatten(state.opt_state)
    assert all("lora_" in path for path, x in paths.items() if x.ndim == 2)


def test_decay_reaches_adapters() -> None:
    own = moved(lora.init(PARAMS, 3, fnlm.key(1)))
    optimizer = optimizer_of(train(lora=3, weight_decay=0.5, schedule="constant"), CFG)
    updates, _ = optimizer.update({k: torch.zeros_like(x) for k, x in own.items()}, optimizer.init(own), own)
    assert all(torch.allclose(updates[k], -0.5e-2 * own[k]) for k in own)


# Rates


def test_rates_by_layer_and_by_name() -> None:
    rates = rates_of(CFG, train(layer_decay=0.5, lr_scale="embed=0.1, *.attn.q=3"))
    assert rates["blocks.2.mlp.up.weight"] == 0.5
    assert rates["blocks.0.mlp.up.weight"] == 0.5**3
    assert rates["embed.tokens.weight"] == pytest.approx(0.1 * 0.5**4)
    assert rates["blocks.2.attn.q.weight"] == 1.5
    assert (rates["head.weight"], rates["norm.weight"]) == (1.0, 1.0)
    assert rates_of(CFG, train()) == {}
    adapters = rates_of(CFG, train(lora=2, layer_decay=0.5))
    assert adapters["blocks.0.attn.q.lora_a"] == 0.5**3


@pytest.mark.parametrize("name", ["adamw", "adam", "muon", "lion", "adafactor", "sgd"])
def test_rates_in_the_fused_form(name: Any) -> None:
    """The same numbers as the pure chain, and twice the rate moves twice as far."""
    settings = train(optimizer=name, layer_decay=0.5, lr_scale="norm=2", ema=0.9, warmup=2)
    optimizer = optimizer_of(settings, CFG)
    made = torch.Generator().manual_seed(0)
    pure, fused = dict(PARAMS), {k: p.clone() for k, p in PARAMS.items()}
    states = [optimizer.init(pure), optimizer.init(fused)]
    update_ = optim.in_place(optimizer)
    for _ in range(3):
        grads = {k: torch.randn(p.shape, generator=made) for k, p in PARAMS.items()}
        updates, states[0] = optimizer.update(grads, states[0], pure)
        pure = optim.apply_updates(pure, updates)
        states[1] = update_(dict(grads), states[1], fused)
    assert max(float((pure[k] - fused[k]).abs().max()) for k in pure) < 1e-5
    plain = optimizer_of(train(optimizer=name, warmup=2), CFG)
    alike, _ = plain.update(grads, plain.init(PARAMS), PARAMS)
    scaled, _ = optimizer.update(grads, optimizer.init(PARAMS), PARAMS)
    factors = rates_of(CFG, settings)
    assert all(torch.allclose(scaled[k], factors[k] * alike[k], atol=1e-8) for k in PARAMS)


# Names


def test_patterns_name_parameters() -> None:
    names = ["embed.tokens.weight", "blocks.0.attn.q.weight", "blocks.10.attn.q.weight", "head.weight"]
    assert chosen("embed", names, "freeze") == names[:1]
    assert chosen("blocks.[0-5].*, head", names, "freeze") == [names[1], names[3]]
    assert chosen("blocks.1?", names, "freeze") == [names[2]]
    assert chosen("", names, "freeze") == []
    assert chosen("q.weight", names, "lora_targets", tail=True) == names[1:3]
    with pytest.raises(ValueError, match=r"freeze has 'embde\.\*', .*; did you mean 'embed'\?"):
        chosen("embde.*", names, "freeze")
    with pytest.raises(ValueError, match=r"which no parameter is called; choose from embed, blocks, head$"):
        chosen("norm", names, "freeze")
    with pytest.raises(ValueError, match="which no parameter is called"):
        chosen("q.weight", names, "freeze")


def test_a_window_may_be_shorter_than_the_model() -> None:
    assert windowed(CFG, train()) is CFG
    assert windowed(CFG, train(length=64)).seq_len == 64
    learned = fnlm.ModelConfig(vocab_size=23, n_layers=1, n_heads=2, d_model=16, seq_len=32)
    with pytest.raises(ValueError, match="learned positions"):
        windowed(learned, train(length=16))


def test_the_page_runs() -> None:
    page = (Path(__file__).parents[1] / "docs" / "finetuning.md").read_text(encoding="utf-8")
    (source,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    found: dict[str, Any] = {}
    exec(source, found)
    seen = fnlm.Batch(torch.zeros(1, 8, dtype=torch.int64), torch.ones(1, 8, dtype=torch.int64), torch.ones(1, 8))
    _, grads = value_and_grad(found["loss"])(found["adapters"], seen)
    assert grads.keys() == found["adapters"].keys()
    assert found["merged"].keys() == found["params"].keys()
    stated = {name for name in re.findall(r"`(\w+)=", page) if name not in ("keep", "steps")}
    assert stated <= {f.name for f in fields(TrainConfig)} | {f.name for f in fields(RunConfig)}


def test_what_a_model_came_with_is_carried() -> None:
    """All of it, but the end tokens of a text model that becomes a chat model."""
    came = {"source": "s", "format": "hf", "template": "t", "kept": {"config": {"eos_token_id": 3}}}
    assert carried({"kind": "chat", "interop": came}, "chat") == {"interop": came}
    assert carried({"kind": "text", "interop": came}, "text") == {"interop": came}
    assert carried({"kind": "text", "interop": came}, "chat")["interop"] == {**came, "template": None, "kept": {}}
    assert carried({"kind": "text"}, "chat") == {}
