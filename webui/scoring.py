"""What a prompt's own tokens are worth: read in pieces beside the replies that are written, before its own begins."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from fnlm.decode import KVCache, decode, init_cache
from webui.batch import SHORT
from webui.jobs import Reply
from webui.models import Loaded
from webui.writing import Scored, scored


@dataclass(eq=False)
class Scoring:
    """A reply whose prompt is read. `tokens`: those that are told, so far; `step` until it says True."""

    reply: Reply
    model: Loaded
    tokens: list[Scored] = field(default_factory=list)
    read: int = 0
    cache: KVCache = field(init=False)

    def __post_init__(self) -> None:
        table = self.model.weights.root["embed.tokens.weight"]
        self.cache = init_cache(self.model.cfg, 1, len(self.reply.ids), table.dtype, table.device)
        if self.reply.lead == 0:
            self.tokens.append(Scored(self.reply.ids[0], None, ()))

    def step(self) -> bool:
        """Read the next piece, cut where it always is; True: that was the last."""
        ids, size, top = self.reply.ids, self.model.tokenizer.vocab_size, self.reply.job.top or 0
        new = torch.tensor([ids[self.read : self.read + SHORT]], device=self.cache.pos.device)
        (logits,), self.cache = decode(self.model.weights, new, self.model.cfg, self.cache, every=True)
        for at, logp in enumerate(logits.log_softmax(-1)[: len(ids) - 1 - self.read], self.read + 1):
            if at >= self.reply.lead:
                self.tokens.append(scored(logp, ids[at], top, size))
        self.read += new.shape[1]
        return self.read == len(ids)
