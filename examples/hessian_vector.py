"""How curved is the loss near a minimum? The largest eigenvalue of its Hessian, by power iteration.

H v is the jvp of the gradient: a few times the cost of a gradient, and no matrix. Gradient descent with a rate above
2 / lambda diverges along v. In float64, so that the check by finite differences means something.
"""

import argparse

import torch
from torch.func import grad, jvp

import fnlm
from fnlm import optim, random

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--steps", type=int, default=60, help="training steps, and then products with the Hessian")
steps = parser.parse_args().steps

cfg = fnlm.ModelConfig(vocab_size=16, n_layers=1, n_heads=2, d_model=16, seq_len=16, positions="rope")
rows = (random.randint(fnlm.key(1), (16, 1), 0, 16) + torch.arange(17)) % 16
rows = rows.where(random.bernoulli(fnlm.key(2), 0.8, rows.shape), 0)  # one token in five is lost
batch = fnlm.Batch(rows[:, :-1], rows[:, 1:], torch.ones(16, 16))


def loss(params):
    return fnlm.lm_loss(params, batch, cfg)


def dot(a, b):
    return sum((a[name] * b[name]).sum() for name in a)


def moved(params, v, by):
    return {name: p + by * v[name] for name, p in params.items()}


optimizer = optim.adamw(1e-2, clip=1.0)
step = fnlm.make_step(fnlm.make_lm_loss(cfg), optimizer)
state = fnlm.init_state(fnlm.init_params(cfg, fnlm.key(0), dtype=torch.float64), optimizer)
for _ in range(steps):
    state, _ = step(state, batch)

v = fnlm.init_params(cfg, fnlm.key(3), dtype=torch.float64)  # any direction will do
for _ in range(steps):
    v = {name: x / optim.global_norm(v) for name, x in v.items()}
    _, product = jvp(grad(loss), (state.params,), (v,))  # H v
    eigenvalue, v, last = dot(v, product), product, v

ahead, behind = (dot(last, grad(loss)(moved(state.params, last, by))) for by in (1e-5, -1e-5))
print(f"after {steps} products: lambda = {eigenvalue:.5f}, by differences of gradients {(ahead - behind) / 2e-5:.5f}")
print(f"|H v - lambda v| / lambda = {optim.global_norm(moved(product, last, -eigenvalue)) / eigenvalue:.1e}")
print(f"gradient descent is stable along v below a rate of {2 / eigenvalue:.3f}")
