"""What a model costs, against published counts, hand arithmetic and what a step really holds."""

from __future__ import annotations

import math

import pytest
import torch

from fnlm import attended, budget, tree
from fnlm.config import ModelConfig, TrainConfig
from fnlm.losses import chunk_rows, lm_loss
from fnlm.params import count, flops_per_token, init_params, shapes
from fnlm.presets import PRESETS, optimizer_of
from fnlm.random import key
from fnlm.step import DTYPES, Plan, init_state
from fnlm.types import Batch

ONE = TrainConfig(steps=1, batch_size=1)


def test_known_counts() -> None:
    gpt2 = budget.counts(PRESETS["gpt2"])
    assert gpt2.total == 124_439_808  # OpenAI's checkpoint, head tied
    assert gpt2.without_embeddings == 85_056_000
    assert budget.counts(PRESETS["gpt2-xl"]).total == 1_557_611_200
    assert budget.counts(PRESETS["ryan-12m"]).without_norms == 12_492_800
    assert budget.counts(PRESETS["demo"]).head == 657 * 128


@pytest.mark.parametrize("name", list(PRESETS))
def test_the_kinds_add_up(name: str) -> None:
    n = budget.counts(PRESETS[name])
    assert n.total == count(PRESETS[name]) == n.embeddings + n.head + n.norms + n.hidden + n.biases


def test_flops_of_a_run() -> None:
    cfg, train = PRESETS["shakespeare-char"], TrainConfig(steps=10, batch_size=3, micro_batches=2)
    assert budget.training_tokens(cfg, train) == 10 * 3 * 2 * 256
    assert budget.training_flops(cfg, train) == flops_per_token(cfg) * 15360
    assert budget.training_flops(cfg, train, 64) == flops_per_token(cfg, 64) * 3840
    weights = 6 * 12 * 384**2 + 65 * 384
    assert budget.inference_flops_per_token(cfg) == 2 * weights + 4 * 6 * 384 * 256


def test_kv_cache() -> None:
    assert budget.kv_cache_bytes(PRESETS["gpt2"]) == 2 * 12 * 768 * 2
    assert budget.kv_cache_bytes(PRESETS["gpt2"], 1024, "fp32") == 2 * 12 * 768 * 1024 * 4
    assert budget.kv_cache_bytes(PRESETS["llama-135m"]) == 2 * 30 * 3 * 64 * 2  # 3 of 9 heads


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw", "lion", "adafactor", "muon"])
@pytest.mark.parametrize("ema", [None, 0.9])
def test_the_optimizer_state_is_what_the_optimizer_makes(optimizer: str, ema: float | None) -> None:
    cfg = ModelConfig(vocab_size=11, n_layers=2, n_heads=2, d_model=8, seq_len=4)
    train = TrainConfig(steps=3, batch_size=1, optimizer=optimizer, ema=ema)  # type: ignore[arg-type]
    state = init_state(init_params(cfg, key(0)), optimizer_of(train, cfg), Plan()).opt_state
    assert budget.optimizer_bytes(cfg, train) == sum(x.numel() * x.element_size() for x in tree.flatten(state).values())


def test_adamw_holds_two_moments() -> None:
    n = count(PRESETS["gpt2-xl"])
    assert 8 * n <= budget.optimizer_bytes(PRESETS["gpt2-xl"], ONE) <= 8 * n + 100


@pytest.mark.parametrize(
    ("precision", "micro_batches", "copy", "gradients"),
    [("fp32", 1, 0, 4), ("bf16", 1, 2, 2), ("fp16", 1, 2, 6), ("fp32", 4, 0, 8), ("bf16", 4, 2, 6)],
)
def test_bytes_per_parameter(precision: str, micro_batches: int, copy: int, gradients: int) -> None:
    cfg, n = PRESETS["shakespeare-char-cpu"], count(PRESETS["shakespeare-char-cpu"])
    train = TrainConfig(steps=1, batch_size=2, micro_batches=micro_batches, precision=precision)  # type: ignore[arg-type]
    memory = budget.training_memory(cfg, train)
    assert memory.parameters == 4 * n == budget.parameter_bytes(cfg, "fp32")
    assert (memory.low_precision_copy, memory.gradients) == (copy * n, gradients * n)
    assert memory.total == sum(memory)
    assert memory.activations == budget.activation_bytes(cfg, 2, None, precision)  # type: ignore[arg-type]


def test_the_trainings_dropout_counts() -> None:
    cfg = PRESETS["shakespeare-char-cpu"]
    with_dropout = budget.training_memory(cfg, TrainConfig(steps=1, batch_size=1, dropout=0.1))
    assert with_dropout.activations > budget.training_memory(cfg, ONE).activations


def kept_bytes(cfg: ModelConfig, batch: int, seq_len: int, precision: str) -> int:
    """What one forward keeps for its backward, each storage once, the parameters not counted."""
    params = {k: v.to(DTYPES[precision]).requires_grad_() for k, v in init_params(cfg, key(0)).items()}
    own = {p.untyped_storage().data_ptr() for p in params.values()}
    kept: list[torch.Tensor] = []  # holds them, so that no address is used twice
    tokens = torch.arange(batch * seq_len).view(batch, seq_len) % cfg.vocab_size
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        lm_loss(params, Batch(tokens, tokens, torch.ones(batch, seq_len)), cfg, key=key(1))
    storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in kept}
    return sum(size for address, size in storages.items() if address not in own)


@pytest.mark.parametrize("library", [True, False])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("seq_len", [64, 512])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"bias": True, "embed_norm": True},
        {"n_kv_heads": 1, "positions": "rope"},
        {"parallel_residual": True, "mlp": "relu"},
        {"mlp": "swiglu", "d_ff": 170, "norm": "rmsnorm", "positions": "rope"},
        {"dropout_embed": 0.1, "dropout_attn": 0.1, "dropout_residual": 0.1, "n_kv_heads": 2},
        {"norm_affine": False, "qk_norm": True, "mlp": "relu2", "tied": False},
    ],
)
def test_activations_are_near_what_the_forward_keeps(
    changes: dict, seq_len: int, precision: str, library: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not library:
        monkeypatch.setattr(attended, "can_attend", lambda *of: False)
    sizes = {"vocab_size": 101, "n_layers": 3, "n_heads": 4, "d_model": 64, "seq_len": 512}
    cfg, batch = ModelConfig(**sizes | changes), 2
    width = budget.BYTES[precision]
    chunk = chunk_rows(batch * seq_len, cfg.vocab_size * width, None) * cfg.vocab_size * width  # alive, but not kept
    estimate = budget.activation_bytes(cfg, batch, seq_len, precision) - chunk  # type: ignore[arg-type]
    ratio = estimate / kept_bytes(cfg, batch, seq_len, precision)
    assert 0.85 < ratio < 1.3, "the forward keeps other tensors than activation_bytes counts: correct the formula"


def test_activations_grow_with_the_batch() -> None:
    cfg = PRESETS["ryan-12m"]
    one, two, three = (budget.activation_bytes(cfg, b, 256) for b in (8, 12, 16))
    assert two - one == three - two > 0
    assert math.prod(shapes(cfg)["embed.tokens.weight"]) * 2 < one


def test_what_rests_has_neither_moments_nor_gradients() -> None:
    """Adapters of rank 4: their own moments; frozen layers: those of the rest."""
    cfg = PRESETS["shakespeare-char-cpu"]
    whole, adapters, rest = (
        budget.training_memory(cfg, TrainConfig(steps=1, batch_size=2, **more))
        for more in ({}, {"lora": 4}, {"freeze": "blocks"})
    )
    own = sum(4 * (out + into) for k, (out, into) in two_dimensional(cfg).items() if k.startswith("blocks"))
    assert adapters.parameters == whole.parameters + 4 * own
    assert adapters.gradients == 2 * own
    assert 8 * own <= adapters.optimizer_state < 8 * own + 100
    blocks = sum(math.prod(s) for k, s in shapes(cfg).items() if k.startswith("blocks"))
    assert whole.optimizer_state - rest.optimizer_state == 8 * blocks
    assert whole.gradients - rest.gradients == 2 * blocks


def two_dimensional(cfg: ModelConfig) -> dict[str, tuple[int, ...]]:
    return {k: s for k, s in shapes(cfg).items() if len(s) == 2}
