"""A reply's drafts: what another model, or a look back, thinks that comes next, and the model's word on all of it.

A reply with a draft is read by itself, without the batch: what it says depends on its own text, not on who else is
there. So it pays where few replies are written at once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fnlm.decode import decode
from fnlm.sampling import Numbers, Settings
from fnlm.speculate import MOST, Begin, Draft, Drafter, accepting, next_length
from fnlm.tokenizers import Tokenizer
from fnlm.types import Key
from webui.batch import Batch, Slot

Drafting = Callable[[Tokenizer], Begin | None]  # how replies of a model with this tokenizer are drafted; None: not


@dataclass(eq=False)
class Guess:
    """How one reply is drafted. `new`: tokens of its text that the drafter has not been told."""

    begin: Begin
    settings: Settings
    key: Key
    new: list[int]
    length: int = MOST
    drafter: Drafter = field(init=False)
    accept: Numbers = field(init=False)

    def __post_init__(self) -> None:
        self.accept = accepting(self.key, self.settings.max_tokens or 1)
        self.drafter = self.begin(self.settings, self.key)

    def draft(self, step: int, room: int) -> Draft:
        """What may follow, in at most `room` tokens."""
        most = (self.settings.max_tokens or 1) - step - 1
        new, self.new = self.new, []
        return self.drafter.propose(new, max(0, min(self.length, room, most)), step)

    def restart(self, text: Sequence[int]) -> None:
        """The text has slid, and is now this."""
        self.drafter, self.new = self.begin(self.settings, self.key), list(text)

    def learn(self, accepted: int, draft: Draft) -> None:
        """So many of a draft were said."""
        self.length = next_length(accepted, len(draft.ids))


def read_all(batch: Batch, slot: Slot, tokens: Sequence[int]) -> Tensor:
    """Read these tokens into a slot, alone: logits (n, V) after each."""
    given = torch.tensor([tokens], device=batch.device)
    logits, _ = decode(batch.weights, given, batch.cfg, slot.view(), every=True)
    slot.tokens += tokens
    slot.filled += len(tokens)
    return logits[0]


def forget(slot: Slot, n: int) -> None:
    """Take back the last n tokens that a slot has read."""
    slot.filled -= n
    del slot.tokens[slot.filled :]
