"""Tiny models on disk as runs, and a stand-in for generation that can be watched."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

import fnlm
from fnlm import checkpoint, tokenizers
from fnlm.tokenizers import Tokenizer
from fnlm.types import TrainState
from webui.batch import Slot


def save(
    run: Path,
    kind: str,
    step: int = 7,
    seed: int = 0,
    seq_len: int = 64,
    tokenizer: Tokenizer | None = None,
    more: Mapping[str, Any] | None = None,
    **model: Any,
) -> Path:
    """A run with one checkpoint of random weights, which write varied text; `more` of its config.json."""
    tokenizer = tokenizer or tokenizers.named("byte")
    shape = {"n_layers": 1, "n_heads": 2, "d_model": 16, "seq_len": seq_len, "vocab_size": tokenizer.vocab_size}
    cfg = fnlm.ModelConfig(**{**shape, **model})
    params = fnlm.init_params(cfg, fnlm.key(seed))
    state = TrainState(torch.tensor(step), params, (), fnlm.key(seed))
    run.mkdir(parents=True, exist_ok=True)
    return checkpoint.save(
        run / "checkpoints",
        state,
        config={"model": asdict(cfg), "kind": kind, **(more or {})},
        tokenizer=tokenizer.save(run / "tokenizer.json"),
        extra={"loss": 5.5, "val_loss": 5.25},
        what="params",
    )


class Script:
    """Stands for webui.batch.Batch: writes `x` for ever, or until `most` steps were made, then fails."""

    def __init__(self, most: int | None = None, pause: float = 0.0) -> None:
        self.most, self.pause, self.steps, self.joined, self.closed = most, pause, 0, 0, 0

    def __call__(self, weights: Any, cfg: fnlm.ModelConfig, rows: int) -> Script:
        self.logits = torch.full((cfg.vocab_size,), -100.0)
        self.logits[ord("x")] = 100.0
        self.new: list[Slot] = []
        return self

    def join(self, prompt: list[int]) -> Slot:
        self.joined += 1
        self.new.append(Slot(None, self.joined))  # type: ignore[arg-type]
        return self.new[-1]

    def leave(self, slot: Slot) -> None:
        self.closed += 1
        self.new = [other for other in self.new if other is not slot]

    def fill(self, budget: int) -> list[tuple[Slot, torch.Tensor]]:
        new, self.new = self.new, []
        return [(slot, self.logits) for slot in new]

    def advance(self, new: Mapping[Slot, int]) -> tuple[list[Slot], torch.Tensor]:
        self.steps += 1
        if self.most is not None and self.steps > self.most:
            raise RuntimeError("the secret cause")
        time.sleep(self.pause)
        return list(new), self.logits.expand(len(new), -1)
