"""Any nn.Module trains with our step: a GRU language model with a tied head, beside torch's own AdamW on the module.

`from_module` gives a pure function and a dict with one entry for the tied weight; the module itself is left as it was.
"""

import argparse

import torch
from torch import nn

import fnlm
from fnlm import optim, random

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--steps", type=int, default=100)
steps = parser.parse_args().steps


class Recurrent(nn.Module):
    """Tokens (B, T) -> logits (B, T, 32)."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(32, 64)
        self.memory = nn.GRU(64, 64, batch_first=True)
        self.head = nn.Linear(64, 32, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.head(self.memory(self.embed(tokens))[0])


def make_batch(key):
    rows = (random.randint(key, (16, 1), 0, 32) + torch.arange(17)) % 32
    return fnlm.Batch(rows[:, :-1], rows[:, 1:], torch.ones(16, 16))


def loss(params, batch, key, use):
    return fnlm.cross_entropy(apply(params, batch.tokens), batch.targets, batch.weights)


torch.manual_seed(0)
module = Recurrent()
apply, params = fnlm.from_module(module)
optimizer = optim.adamw(3e-3, b2=0.99, decay=0.1)
step, state = fnlm.make_step(loss, optimizer), fnlm.init_state(params, optimizer)
theirs = torch.optim.AdamW(module.parameters(), lr=3e-3, betas=(0.9, 0.99), weight_decay=0.1)

for i in range(steps):
    batch = make_batch(fnlm.fold_in(fnlm.key(0), i))
    state, metrics = step(state, batch)
    theirs.zero_grad()
    their_loss = fnlm.cross_entropy(module(batch.tokens), batch.targets)
    their_loss.backward()
    theirs.step()

print(f"{len(params)} entries for {len(module.state_dict())} names: {', '.join(params)}")
apart = max((state.params[name] - p.detach()).abs().max() for name, p in module.named_parameters())
print(f"loss after {steps} steps: ours {metrics['train/loss']:.4f}, torch's own {their_loss:.4f}")
print(f"the weights differ by at most {apart:.0e}")
