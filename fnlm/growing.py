"""A model that learns tokens which were put behind its own, as ChatML's are for a model of plain text."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from fnlm import random, tokenizers
from fnlm.tokenizers import Tokenizer
from fnlm.trained import Trained

TABLES = ("embed.tokens.weight", "head.weight")
NEAR = 0.1  # of how the rows spread, so that two new tokens are not one


def added(model: Trained, tokenizer: Tokenizer) -> list[str]:
    """The special tokens that a tokenizer has behind all of the model's; none where it is not the same otherwise."""
    new = sorted(tokenizer.special.keys() - model.tokenizer.special.keys(), key=tokenizer.special.__getitem__)
    same = bool(new) and tokenizers.extended(model.tokenizer, new).sha256 == tokenizer.sha256
    moved = bool(model.cfg.ngrams) and tokenizer.vocab_size > model.cfg.vocab_size  # where n-grams lie depends on it
    return new if same and not moved else []


def grown(model: Trained, tokenizer: Tokenizer) -> Trained:
    """The model with this tokenizer and a row for each token that is `added`, else the model itself.

    Their rows are near the mean of the others (Hewitt 2021), so that nothing else becomes less likely at first.
    """
    ids = [tokenizer.special[token] for token in added(model, tokenizer)]
    if not ids:
        return model
    size = max(model.cfg.vocab_size, tokenizer.vocab_size)
    known = model.tokenizer.vocab_size
    tables = {name: _rows(p, known, ids, size) for name, p in model.params.items() if name in TABLES}
    cfg = replace(model.cfg, vocab_size=size)
    return model._replace(cfg=cfg, params={**model.params, **tables}, tokenizer=tokenizer)


@torch.no_grad()
def _rows(table: Tensor, known: int, ids: list[int], size: int) -> Tensor:
    mean, spread = table[:known].float().mean(0), table[:known].float().std(0)
    drawn = mean + NEAR * spread * random.normal(random.key(0), (len(ids), table.shape[1])).to(table.device)
    out = torch.cat([table, mean.to(table).expand(size - len(table), -1)])
    out[ids] = drawn.to(table)
    return out
