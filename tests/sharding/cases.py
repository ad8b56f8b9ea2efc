"""One small training run, by one process or under a strategy, and how far apart they end."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

import fnlm
from fnlm import optim, tree
from fnlm.sharded import layout_of, make_sharded_step, sharded_state
from fnlm.sharding import Mesh, Strategy, check_copies, unshard
from tests.reference import random_params, random_tokens

BASE: dict[str, Any] = {"vocab_size": 11, "n_layers": 3, "n_heads": 4, "d_model": 8, "d_ff": 12, "seq_len": 8}
DROPOUT = {"dropout_embed": 0.1, "dropout_attn": 0.2, "dropout_residual": 0.2}
ROWS = 24


def config(**more: Any) -> fnlm.ModelConfig:
    return fnlm.ModelConfig(**{**BASE, "bias": True, **DROPOUT, **more})


def adamw(clip: float | None = 0.05) -> fnlm.Transform:
    return optim.adamw(1e-2, decay=0.1, mask=fnlm.is_matrix, clip=clip)


def batch(cfg: fnlm.ModelConfig, step: int, rows: int = ROWS) -> fnlm.Batch:
    """Some rows are masked in part, and one wholly."""
    weights = (torch.rand(rows, cfg.seq_len, generator=torch.Generator().manual_seed(step)) < 0.7).double()
    weights[0] = 0
    tokens = [random_tokens(cfg.vocab_size, rows, cfg.seq_len, 2 * step + i) for i in (0, 1)]
    return fnlm.Batch(*tokens, weights)


Result = tuple[fnlm.Params, list[tuple[float, float]]]


def alone(cfg: fnlm.ModelConfig, optimizer: fnlm.Transform, steps: int = 3, rows: int = ROWS) -> Result:
    state = fnlm.init_state(random_params(fnlm.shapes(cfg)), optimizer, key=fnlm.key(3))
    step, log = fnlm.make_step(fnlm.make_lm_loss(cfg), optimizer), []
    for i in range(steps):
        state, metrics = step(state, batch(cfg, i, rows))
        log.append((float(metrics["train/loss"]), float(metrics.get("train/grad_norm", 0.0))))
    return state.params, log


def together(
    mesh: Mesh,
    how: str | Strategy,
    cfg: fnlm.ModelConfig,
    optimizer: fnlm.Transform,
    micro: int = 1,
    steps: int = 3,
    rows: int = ROWS,
    compute: fnlm.Compute | None = None,
    seed: Callable[[Mesh], int] = lambda mesh: 3,
) -> Result:
    layout = layout_of(cfg, how, mesh)
    plan = fnlm.Plan(micro_batches=micro)
    state = sharded_state(random_params(fnlm.shapes(cfg)), optimizer, layout, plan, fnlm.key(seed(mesh)))
    step = make_sharded_step(
        lambda axes: fnlm.make_lm_loss(cfg, compute or fnlm.Compute(), axes), optimizer, layout, plan
    )
    log = []
    for i in range(steps):
        state, metrics = step(state, batch(cfg, i, rows))
        log.append((float(metrics["train/loss"]), float(metrics.get("train/grad_norm", 0.0))))
    check_copies(state.params, layout)
    return unshard(state.params, layout), log


def distance(a: Result, b: Result) -> float:
    """The largest difference of parameters, losses and norms; nan and shapes that differ are infinitely far."""
    gaps = [abs(x - y) for one, two in zip(a[1], b[1], strict=True) for x, y in zip(one, two, strict=True)]
    gaps += [float((a[0][k] - b[0][k]).abs().max()) for k in a[0]]
    assert tree.flatten(a[0]).keys() == tree.flatten(b[0]).keys()
    return max(g if g == g else float("inf") for g in gaps)
