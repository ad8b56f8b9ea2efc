"""Configs refuse what cannot be, with the number and the remedy; overriding one is checked like writing one."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import pytest

import fnlm
from fnlm.presets import optimizer_of, trained_model
from tests.reference import BASE, CASES

MODEL: list[tuple[dict[str, Any], str]] = [
    ({"d_model": 18}, "d_model=18 is not divisible by n_heads=4; choose n_heads from 1, 2, 3, 6, 9, 18, or give"),
    ({"n_kv_heads": 3}, "n_heads=4 is not divisible by n_kv_heads=3; choose n_kv_heads from 1, 2, 4"),
    ({"n_kv_heads": 8}, "n_heads=4 is not divisible by n_kv_heads=8"),
    ({"n_kv_heads": 0}, "n_kv_heads=0 must be a whole number of at least 1"),
    ({"vocab_size": 0}, "vocab_size=0 must be a whole number of at least 1"),
    ({"n_layers": -1}, "n_layers=-1 must be"),
    ({"n_layers": 2.0}, "n_layers=2.0 must be a whole number"),
    ({"n_heads": True}, "n_heads=True must be a whole number"),
    ({"n_heads": "4"}, "n_heads='4' must be a whole number"),
    ({"seq_len": 0}, "seq_len=0 must be"),
    ({"window": 0}, "window=0 must be"),
    ({"d_ff": 0}, "d_ff=0 must be"),
    ({"d_head": 0}, "d_head=0 must be"),
    ({"mup_base": 0}, "mup_base=0 must be"),
    ({"positions": "rope", "d_head": 5}, "rope rotates pairs, but rope_fraction=1.0 of d_head=5 is 5 dimensions"),
    ({"positions": "rope", "rope_fraction": 0.75}, "rope_fraction=0.75 of d_head=4 is 3 dimensions"),
    ({"positions": "rope", "rope_fraction": 0.0}, "is 0 dimensions"),
    ({"positions": "rope", "rope_fraction": 1.5}, "choose a fraction that gives an even number from 2 to 4"),
    ({"rope_theta": 0.0}, "rope_theta=0.0 must be positive; the usual value is 10000"),
    ({"dropout_embed": 1.0}, "dropout_embed=1.0 is not a probability below 1; choose 0 <= dropout_embed < 1"),
    ({"dropout_attn": -0.1}, "dropout_attn=-0.1 is not"),
    ({"dropout_residual": float("nan")}, "dropout_residual=nan is not"),
    ({"dropout_ngram": 2}, "dropout_ngram=2 is not"),
    ({"norm": "layernrom"}, "norm='layernrom' is unknown; did you mean 'layernorm'?"),
    ({"norm": "batch"}, "norm='batch' is unknown; choose from layernorm, rmsnorm"),
    ({"mlp": "swiglue"}, "mlp='swiglue' is unknown; did you mean 'swiglu'?"),
    ({"positions": "Rope"}, "positions='Rope' is unknown; did you mean 'rope'?"),
    ({"init": "gpt-2"}, "init='gpt-2' is unknown; did you mean 'gpt2'?"),
    ({"zero_init_head": True}, "zero_init_head=True needs an untied head: a tied one is the embedding; set tied=False"),
    ({"logit_softcap": 0.0}, "logit_softcap=0.0 must be positive; leave it out for no cap"),
    ({"logit_softcap": -30.0}, "logit_softcap=-30.0 must be positive"),
    ({"ngrams": ((1, 10),)}, "ngrams has (1, 10); choose an order of at least 2 and at least 1 row"),
    ({"ngrams": ((2, 0),)}, "ngrams has (2, 0)"),
    ({"ngrams": ((2, 10), (2, 20))}, "names an order twice; give each order once"),
    ({"norm_eps": -1e-5}, "norm_eps=-1e-05"),
]  # fmt: skip


@pytest.mark.parametrize(("wrong", "message"), MODEL, ids=[str(wrong) for wrong, _ in MODEL])
def test_wrong_models_are_refused(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        fnlm.ModelConfig(**{**BASE, **wrong})


TRAIN: list[tuple[dict[str, Any], str]] = [
    ({"warmup": 11}, "warmup=11 does not fit into steps=10; choose 0 to 10"),
    ({"warmup": -1}, "warmup=-1 does not fit"),
    ({"steps": 0}, "steps=0 must be a whole number of at least 1"),
    ({"batch_size": 0}, "batch_size=0 must be"),
    ({"micro_batches": 0}, "micro_batches=0 must be"),
    ({"min_lr": 1.0}, "min_lr=1.0 must lie between 0 and lr=0.001"),
    ({"min_lr": -1.0}, "min_lr=-1.0 must lie between"),
    ({"dropout": 1.0}, "dropout=1.0 is not a probability below 1"),
    ({"optimizer": "adamW"}, "optimizer='adamW' is unknown; did you mean 'adamw'?"),
    ({"schedule": "cosin"}, "schedule='cosin' is unknown; did you mean 'cosine'?"),
    ({"precision": "bf17"}, "precision='bf17' is unknown; did you mean 'bf16'?"),
    ({"precision": "int8"}, "precision='int8' is unknown"),
    ({"lr": -1e-3}, "lr=-0.001"),
]


@pytest.mark.parametrize(("wrong", "message"), TRAIN, ids=[str(wrong) for wrong, _ in TRAIN])
def test_wrong_trainings_are_refused(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        fnlm.TrainConfig(**{"steps": 10, "batch_size": 2, **wrong})


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"ema": 1.5}, "ema=1.5 is outside [0, 1)"),
        ({"b1": -1.0}, "b1=-1.0 is outside [0, 1)"),
        ({"b2": 1.0}, "b2=1.0 is outside [0, 1)"),
        ({"clip": 0.0}, "max_norm=0.0 would stop all learning"),
        ({"weight_decay": -0.1}, "rate=-0.1 would make the weights grow"),
        ({"schedule": "wsd", "decay_steps": 11}, "decay=11 does not fit between warmup=0 and total=10"),
        ({"optimizer": "muon", "muon_lr": -1.0}, "peak=-1.0 is not a learning rate"),
        ({"seed": -1}, "seed=-1 is not in [0, 2**64)"),
    ],
)
def test_the_rest_is_refused_before_the_first_step(wrong: dict[str, Any], message: str) -> None:
    def start() -> None:
        train = fnlm.TrainConfig(**{"steps": 10, "batch_size": 2, **wrong})
        optimizer_of(train, fnlm.ModelConfig(**BASE))
        fnlm.key(train.seed)

    with pytest.raises(ValueError, match=re.escape(message)):
        start()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"kernels": "flash"}, "kernels='flash' is unknown; choose from auto, plain, sdpa"),
        ({"kernels": "plian"}, "kernels='plian' is unknown; did you mean 'plain'?"),
        ({"remat": "blocks"}, "remat='blocks' is unknown; did you mean 'block'?"),
        ({"compile": "steps"}, "compile='steps' is unknown; did you mean 'step'?"),
        ({"loss_chunks": 0}, "loss_chunks=0 must be a whole number of at least 1"),
    ],
)
def test_wrong_computes_are_refused(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        fnlm.Compute(**wrong)


@pytest.mark.parametrize(
    ("ramp", "message"),
    [
        (((0, 4),), "ramp has (0, 4) after step 0; choose a later step"),
        (((10, 4), (10, 8)), "ramp has (10, 8) after step 10; choose a later step"),
        (((10, 0),), "ramp has (10, 0) after step 0; choose a later step and a size >= 1"),
        (((10,),), "ramp has (10,); write (until step, sequences) pairs"),
        (((10, 2.5),), "ramp has (10, 2.5); write"),
    ],
)
def test_wrong_ramps_are_refused(ramp: Any, message: str) -> None:
    assert fnlm.TrainConfig(steps=10, batch_size=8, ramp=((10, 4), (30, 2))).ramp[1] == (30, 2)
    with pytest.raises(ValueError, match=re.escape(message)):
        fnlm.TrainConfig(steps=10, batch_size=8, ramp=ramp)
    with pytest.raises(ValueError, match="ramp has 16 sequences, more than the full step of 8"):
        fnlm.TrainConfig(steps=10, batch_size=8, ramp=((10, 16),))


def test_overrides() -> None:
    cfg = fnlm.override(fnlm.PRESETS["gpt2"], n_layers=2, vocab_size=100)
    assert (cfg.n_layers, cfg.vocab_size, cfg.d_model) == (2, 100, 768)
    assert fnlm.PRESETS["gpt2"].n_layers == 12
    with pytest.raises(ValueError, match=r"ModelConfig has no field 'n_layer'; did you mean 'n_layers'\?"):
        fnlm.override(cfg, n_layer=3)
    with pytest.raises(ValueError, match="TrainConfig has no field 'zzz'; choose from steps, batch_size"):
        fnlm.override(fnlm.TRAINING["gpt2"], zzz=3)
    with pytest.raises(ValueError, match="Compute has no field 'kernel'; did you mean 'kernels'"):
        fnlm.override(fnlm.Compute(), kernel="plain")
    with pytest.raises(ValueError, match="d_model=768 is not divisible by n_heads=7"):
        fnlm.override(cfg, n_heads=7)


@pytest.mark.parametrize("name", CASES)
def test_configs_are_values(name: str) -> None:
    a, b = (fnlm.ModelConfig(**{**BASE, **CASES[name]}) for _ in range(2))
    assert a == b
    assert hash(a) == hash(b)
    assert a != dataclasses.replace(a, n_layers=7)
    with pytest.raises(dataclasses.FrozenInstanceError):
        a.n_layers = 3  # type: ignore[misc]


def test_derived_sizes() -> None:
    cfg = fnlm.ModelConfig(**BASE)
    assert (cfg.kv_heads, cfg.head_dim, cfg.ff_dim, cfg.rope_dim, cfg.has_dropout) == (4, 4, 64, 4, False)
    cfg = fnlm.ModelConfig(**BASE, n_kv_heads=1, d_head=10, d_ff=3, rope_fraction=0.4, dropout_ngram=0.1)
    assert (cfg.kv_heads, cfg.head_dim, cfg.ff_dim, cfg.rope_dim, cfg.has_dropout) == (1, 10, 3, 4, True)


def test_a_fraction_written_as_a_quotient_rotates_what_it_says() -> None:
    """30 / 44 * 44 is 29.999999999999996."""
    wrong = []
    for k in range(2, 257, 2):
        for r in range(2, k + 1, 2):
            cfg = {**BASE, "positions": "rope", "d_head": k, "rope_fraction": r / k}
            try:
                rotated = fnlm.ModelConfig(**cfg).rope_dim
            except ValueError:
                rotated = None
            wrong += [(r, k)] if rotated != r else []
    assert wrong == []


@pytest.mark.parametrize("name", fnlm.PRESETS)
def test_every_preset_has_a_training_and_an_optimizer(name: str) -> None:
    train, cfg = fnlm.TRAINING[name], fnlm.PRESETS[name]
    small = fnlm.override(cfg, n_layers=1, d_model=cfg.n_heads * 4, d_ff=8, vocab_size=5, seq_len=4, n_kv_heads=None,
                          ngrams=())  # fmt: skip
    params = fnlm.init_params(small, fnlm.key(0))
    optimizer = optimizer_of(train, small)
    updates, _ = optimizer.update(params, optimizer.init(params), params)
    assert updates.keys() == params.keys()
    assert trained_model(cfg, train) == cfg or train.dropout is not None


def test_finetuning_presets_name_models_and_set_their_dropout() -> None:
    assert set(fnlm.FINETUNING) <= set(fnlm.PRESETS)
    cfg = trained_model(fnlm.PRESETS["gpt2"], fnlm.FINETUNING["gpt2"])
    assert (cfg.dropout_embed, cfg.dropout_attn, cfg.dropout_residual) == (0.1, 0.1, 0.1)


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw", "lion", "adafactor", "muon"])
@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine", "wsd", "inverse-sqrt"])
def test_every_optimizer_and_schedule_makes_a_step(optimizer: Any, schedule: Any) -> None:
    cfg = fnlm.ModelConfig(**BASE, init="mup")
    train = fnlm.TrainConfig(steps=10, batch_size=2, optimizer=optimizer, schedule=schedule, warmup=2, ema=0.9)
    params, chosen = fnlm.init_params(cfg, fnlm.key(0)), optimizer_of(train, cfg)
    state = chosen.init(params)
    for _ in range(3):
        updates, state = chosen.update(params, state, params)
    assert any(float(u.abs().max()) > 0 for u in updates.values())
    assert all(u.isfinite().all() for u in updates.values())
