"""Tiny models on disk as runs, and a stand-in for generation that can be watched."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

import fnlm
from fnlm import checkpoint, tokenizers
from fnlm.generate import Generation
from fnlm.types import TrainState


def save(run: Path, kind: str, step: int = 7, seed: int = 0, seq_len: int = 64) -> Path:
    """A run with one checkpoint of random weights, which write varied text."""
    tokenizer = tokenizers.named("byte")
    cfg = fnlm.ModelConfig(vocab_size=tokenizer.vocab_size, n_layers=1, n_heads=2, d_model=16, seq_len=seq_len)
    params = fnlm.init_params(cfg, fnlm.key(seed))
    state = TrainState(torch.tensor(step), params, (), fnlm.key(seed))
    run.mkdir(parents=True, exist_ok=True)
    return checkpoint.save(
        run / "checkpoints",
        state,
        config={"model": asdict(cfg), "kind": kind},
        tokenizer=tokenizer.save(run / "tokenizer.json"),
        extra={"loss": 5.5, "val_loss": 5.25},
        what="params",
    )


class Script:
    """Stands for fnlm.generate.stream: writes `x` until it is told to stop, a letter at a time; counts its steps."""

    def __init__(self, most: int = 1_000_000) -> None:
        self.most, self.steps, self.closed = most, 0, 0

    def __call__(self, *_: Any, cancelled: Any, **__: Any) -> Any:
        try:
            for _step in range(self.most):
                if cancelled():
                    break
                self.steps += 1
                yield "x"
        finally:
            self.closed += 1
        return Generation("x" * self.steps, [120] * self.steps, "length", 3)
