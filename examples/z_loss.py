"""An experiment on the pure functions: a z-loss holds the logits' normaliser Z near 1.

The z-loss adds a multiple of log(Z)^2, Z = sum(exp(logits)) (PaLM: Chowdhery et al. 2022, section 5; a hundred times
its weight here, for a run of seconds). Only `loss` is new. Tokens count up, each row by its own stride, one in twenty
is noise; knowing nothing costs log(32) = 3.47.
"""

from functools import partial

import torch

import fnlm
from fnlm import optim, random

cfg = fnlm.ModelConfig(vocab_size=32, n_layers=2, n_heads=2, d_model=64, seq_len=32, positions="rope", tied=False)


def make_batch(key):
    keys = fnlm.split(key, 4)
    start, stride = random.randint(keys[0], (16, 1), 0, 32), random.randint(keys[1], (16, 1), 1, 5)
    rows = (start + stride * torch.arange(33)) % 32
    rows = rows.where(random.bernoulli(keys[2], 0.95, rows.shape), random.randint(keys[3], rows.shape, 0, 32))
    return fnlm.Batch(tokens=rows[:, :-1], targets=rows[:, 1:], weights=torch.ones(16, 32))


def loss(params, batch, key, use, weight):
    logits = fnlm.forward(params, batch.tokens, cfg, key=key, use=use)
    log_z = logits.logsumexp(-1)
    return fnlm.cross_entropy(logits, batch.targets, batch.weights) + weight * log_z.square().mean()


optimizer = optim.adamw(optim.warmup_cosine(peak=6e-3, warmup=20, total=200), mask=fnlm.is_matrix, clip=1.0)
held_out = make_batch(fnlm.key(1))
for weight in (0.0, 0.01):
    step = fnlm.make_step(partial(loss, weight=weight), optimizer)
    state = fnlm.init_state(fnlm.init_params(cfg, fnlm.key(0)), optimizer)
    for i in range(200):
        state, metrics = step(state, make_batch(fnlm.fold_in(fnlm.key(2), i)))
    logits = fnlm.forward(state.params, held_out.tokens, cfg)
    nats, log_z = fnlm.cross_entropy(logits, held_out.targets), logits.logsumexp(-1).abs().mean()
    print(f"z-loss weight {weight:<4g}  held-out loss {nats:.3f}  mean |log Z| {log_z:.3f}")
