"""Eight models from eight keys, trained at once: vmap over the init, the gradient and the optimizer's update.

The members see the same batches and differ by their initial weights only. Their averaged probabilities predict better
than the average member, as they must (Jensen's inequality); the spread says how much is luck.
"""

import argparse

import torch
from torch.func import grad_and_value, vmap

import fnlm
from fnlm import optim, random

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--steps", type=int, default=60)
steps = parser.parse_args().steps

MEMBERS = 8
cfg = fnlm.ModelConfig(vocab_size=16, n_layers=1, n_heads=2, d_model=32, seq_len=16, positions="rope")
optimizer = optim.adamw(1e-2, mask=fnlm.is_matrix, clip=1.0)


def make_batch(key):
    start_key, where_key, noise_key = fnlm.split(key, 3)
    rows = (random.randint(start_key, (8, 1), 0, 16) + torch.arange(17)) % 16
    rows = rows.where(random.bernoulli(where_key, 0.8, rows.shape), random.randint(noise_key, rows.shape, 0, 16))
    return fnlm.Batch(rows[:, :-1], rows[:, 1:], torch.ones(8, 16))


def loss(params, batch):
    return fnlm.lm_loss(params, batch, cfg)


def step(params, opt_state, batch):
    grads, value = grad_and_value(loss)(params, batch)
    updates, opt_state = optimizer.update(grads, opt_state, params)
    return optim.apply_updates(params, updates), opt_state, value


params = vmap(lambda key: fnlm.init_params(cfg, key))(fnlm.split(fnlm.key(0), MEMBERS))  # {name: (8, *shape)}
opt_state = vmap(optimizer.init)(params)
step_all = vmap(step, in_dims=(0, 0, None))
for i in range(steps):
    params, opt_state, losses = step_all(params, opt_state, make_batch(fnlm.fold_in(fnlm.key(1), i)))

held_out = make_batch(fnlm.key(2))
losses = vmap(loss, in_dims=(0, None))(params, held_out)
logits = vmap(lambda p: fnlm.forward(p, held_out.tokens, cfg))(params)  # (8, B, T, V)
together = fnlm.cross_entropy(logits.softmax(-1).mean(0).log(), held_out.targets)
print("held-out loss of each member:", " ".join(f"{x:.3f}" for x in losses))
print(f"mean {losses.mean():.4f}, spread (standard deviation) {losses.std():.4f}, averaged together {together:.4f}")
