"""`moments="bf16"`: half the optimizer's memory, smaller checkpoints, and a loss within the noise of another seed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import fnlm
from fnlm import checkpoint, tree
from fnlm.presets import optimizer_of
from fnlm.types import Batch, TrainState

CFG = fnlm.ModelConfig(vocab_size=32, n_layers=2, n_heads=2, d_model=32, seq_len=16)
STEPS = 60


def noisy_counting(step: int) -> Batch:
    key = fnlm.fold_in(fnlm.key(3), step)
    first = fnlm.random.randint(key, (8, 1), 0, CFG.vocab_size)
    noise = fnlm.random.randint(fnlm.fold_in(key, 1), (8, CFG.seq_len + 1), 0, 2)
    tokens = (first + torch.arange(CFG.seq_len + 1) + noise) % CFG.vocab_size
    return Batch(tokens[:, :-1], tokens[:, 1:], torch.ones(8, CFG.seq_len))


def trained(moments: Any, optimizer: Any, seed: int = 0) -> tuple[float, TrainState]:
    """The mean loss of the last 20 steps, and the state."""
    train = fnlm.TrainConfig(steps=STEPS, batch_size=8, optimizer=optimizer, lr=1e-2, warmup=5, moments=moments)
    transform = optimizer_of(train, CFG)
    state = fnlm.init_state(fnlm.init_params(CFG, fnlm.key(seed)), transform)
    step, losses = fnlm.make_step(fnlm.make_lm_loss(CFG), transform), []
    for i in range(STEPS):
        state, metrics = step(state, noisy_counting(i))
        losses.append(float(metrics["train/loss"]))
    return sum(losses[-20:]) / 20, state


def size(path: Path) -> int:
    return sum(file.stat().st_size for file in path.iterdir())


@pytest.mark.parametrize("optimizer", ["adam", "adamw", "muon"])
def test_bf16_moments_learn_as_well_in_half_the_space(optimizer: str, tmp_path: Path) -> None:
    (exact, wide), (rounded, narrow) = trained("fp32", optimizer), trained("bf16", optimizer)
    seeds = [exact, *(trained("fp32", optimizer, seed)[0] for seed in (1, 2))]
    assert exact < 2.5  # it has learnt: chance is 3.47
    assert abs(rounded - exact) < max(0.01, max(seeds) - min(seeds))
    held = [sum(t.nbytes for t in tree.flatten(s.opt_state).values() if t.ndim) for s in (wide, narrow)]
    assert held[1] * 2 == held[0]
    sizes = [
        size(checkpoint.save(tmp_path / name, s, config={})) for name, s in {"wide": wide, "narrow": narrow}.items()
    ]
    assert sizes[1] < sizes[0] * (0.75 if optimizer != "muon" else 0.85)
    like = TrainState(narrow.step, narrow.params, tree.map(torch.zeros_like, narrow.opt_state), narrow.key)
    assert tree.equal(checkpoint.restore(tmp_path / "narrow" / f"{STEPS:08d}", like)[0], narrow)


def test_a_checkpoint_of_other_moments_is_explained(tmp_path: Path) -> None:
    train = fnlm.TrainConfig(steps=1, batch_size=1)
    wide, narrow = (
        fnlm.init_state(fnlm.init_params(CFG, fnlm.key(0)), optimizer_of(t, CFG))
        for t in (train, fnlm.override(train, moments="bf16"))
    )
    path = checkpoint.save(tmp_path, wide, config={})
    with pytest.raises(
        checkpoint.CheckpointError, match=r"dtype +opt_state/adam/mu/.* saved .* float32, wanted .* bfl"
    ):
        checkpoint.restore(path, narrow)


@pytest.mark.parametrize("optimizer", ["sgd", "lion", "adafactor"])
def test_optimizers_without_it_refuse(optimizer: Any) -> None:
    with pytest.raises(ValueError, match=f"moments='bf16' is for adam, adamw and muon, not {optimizer}"):
        fnlm.TrainConfig(steps=1, batch_size=1, optimizer=optimizer, moments="bf16")


def test_means_that_would_not_decay_are_refused() -> None:
    train = fnlm.TrainConfig(steps=1, batch_size=1, b2=0.999, moments="bf16")
    with pytest.raises(ValueError, match=r"b2=0.999 never decays in torch.bfloat16"):
        optimizer_of(train, CFG)
