"""Trains two small models with dropout; a process of its own for tests/checkpoint/test_resume.py.

python train.py FOLDER STOP [kill]: goes on from the newest checkpoints below FOLDER, if any, to step STOP and saves;
with `kill` it saves every 5 steps in the background, and dies like a machine without power after step STOP.
"""

from __future__ import annotations

import os
import signal
import sys
from dataclasses import asdict
from pathlib import Path

import torch

import fnlm
from fnlm import checkpoint, optim
from fnlm.types import Batch, TrainState, Transform

CFG = fnlm.ModelConfig(
    vocab_size=32, n_layers=2, n_heads=2, d_model=32, seq_len=16,
    dropout_embed=0.1, dropout_attn=0.2, dropout_residual=0.2,
)  # fmt: skip
LR = optim.warmup_cosine(1e-2, 5, 40)
OPTIMIZERS: dict[str, Transform] = {
    "adamw": optim.adamw(LR, clip=1.0),
    "muon": optim.muon(LR, fnlm.is_hidden_matrix, LR, clip=1.0),
}
PLAN = fnlm.Plan(precision="bf16", micro_batches=2)


def start(name: str) -> TrainState:
    return fnlm.init_state(fnlm.init_params(CFG, fnlm.key(0)), OPTIMIZERS[name], PLAN, fnlm.key(7))


def batch_at(step: int) -> Batch:
    """Noisy counting, a function of the step alone."""
    key = fnlm.fold_in(fnlm.key(3), step)
    first = fnlm.random.randint(key, (4, 1), 0, CFG.vocab_size)
    noise = fnlm.random.randint(fnlm.fold_in(key, 1), (4, CFG.seq_len + 1), 0, 2)
    tokens = (first + torch.arange(CFG.seq_len + 1) + noise) % CFG.vocab_size
    return Batch(tokens[:, :-1], tokens[:, 1:], torch.ones(4, CFG.seq_len))


def train(folder: Path, name: str, stop: int, every: int | None = None) -> TrainState:
    """From the newest checkpoint, or the start, to `stop`, saving in the background where `every` says."""
    newest = checkpoint.newest_good(folder)
    state = start(name) if newest is None else checkpoint.restore(newest, start(name))[0]
    step, saver = fnlm.make_step(fnlm.make_lm_loss(CFG), OPTIMIZERS[name], PLAN), checkpoint.Saver(folder)
    for i in range(int(state.step), stop):
        state, _ = step(state, batch_at(i))
        if every and (i + 1) % every == 0:
            saver.save(state, config={"model": asdict(CFG)})
    return state


def main() -> None:
    root, stop = Path(sys.argv[1]), int(sys.argv[2])
    kill = sys.argv[3:] == ["kill"]
    for name in OPTIMIZERS:
        state = train(root / name, name, stop, 5 if kill else None)
        if not kill:
            checkpoint.save(root / name, state, config={"model": asdict(CFG)})
    if kill:
        os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    main()
