"""Which row of a batch does not belong? The gradient of every row at once, by vmap over grad, finds the odd one out.

A small model first learns rows that count up. Then one row of a new batch is shuffled: its gradient norm stands out,
though its tokens are the same. The mean of the per-row gradients is the gradient of the batch.
"""

import argparse

import torch
from torch.func import grad, vmap

import fnlm
from fnlm import optim, random

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--steps", type=int, default=30, help="training steps before the search")
steps = parser.parse_args().steps

cfg = fnlm.ModelConfig(vocab_size=32, n_layers=2, n_heads=2, d_model=32, seq_len=24, positions="rope")
ODD = 11


def make_batch(key):
    rows = (random.randint(key, (16, 1), 0, 32) + torch.arange(25)) % 32
    return fnlm.Batch(rows[:, :-1], rows[:, 1:], torch.ones(16, 24))


def row_loss(params, row):
    return fnlm.lm_loss(params, fnlm.Batch(*(x[None] for x in row)), cfg)


optimizer = optim.adamw(1e-2, clip=1.0)
step = fnlm.make_step(fnlm.make_lm_loss(cfg), optimizer)
state = fnlm.init_state(fnlm.init_params(cfg, fnlm.key(0)), optimizer)
for i in range(steps):
    state, _ = step(state, make_batch(fnlm.fold_in(fnlm.key(1), i)))

batch = make_batch(fnlm.key(2))
order = torch.cat([random.permutation(fnlm.key(3), 24), torch.tensor([24])])
row = torch.cat([batch.tokens[ODD], batch.targets[ODD, -1:]])[order]
batch.tokens[ODD], batch.targets[ODD] = row[:-1], row[1:]

grads = vmap(grad(row_loss), in_dims=(None, 0))(state.params, batch)  # {name: (16, *shape)}
norms = torch.stack([g.flatten(1).norm(dim=1) for g in grads.values()]).norm(dim=0)
whole = fnlm.value_and_grad(fnlm.make_lm_loss(cfg))(state.params, batch)[1]
apart = max(float((grads[name].mean(0) - whole[name]).abs().max()) for name in whole)

print("gradient norm of each row:", " ".join(f"{x:.2f}" for x in norms))
print(f"the shuffled row is {ODD}; the largest gradient is that of row {int(norms.argmax())}, "
      f"{float(norms[ODD] / norms.median()):.0f} times the median")  # fmt: skip
print(f"the mean of the rows' gradients and the batch's gradient differ by {apart:.1e}")
