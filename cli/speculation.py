"""What `--speculate` names: prompt lookup, or a model that drafts for others that have its tokenizer."""

from __future__ import annotations

from collections.abc import Callable

import click
import torch

from fnlm import params, trained
from fnlm.decode import prepare
from fnlm.speculate import Begin, lookup, with_model
from fnlm.tokenizers import Tokenizer

LOOKUP = "lookup"
option = click.option("--speculate", metavar="lookup|MODEL", help="Draft by looking back, or with a smaller model.")


def drafting(
    asked: str | None, device: str, dtype_of: Callable[[int], torch.dtype]
) -> Callable[[Tokenizer], Begin | None] | None:
    """How texts are drafted, by the tokenizer of the model that writes them: None where the draft's is another.

    `dtype_of`: the type to compute in, by how many parameters there are. CheckpointError where there is no such model.
    """
    if asked is None or asked == LOOKUP:
        return None if asked is None else lambda tokenizer: lookup
    model = trained.load(asked, device=device)
    ready = prepare(model.params, model.cfg, dtype_of(params.count(model.cfg)))
    begin = with_model(ready, model.cfg, model.tokenizer.vocab_size)
    return lambda tokenizer: begin if same(tokenizer, model.tokenizer) else None


def same(a: Tokenizer, b: Tokenizer) -> bool:
    """Whether two tokenizers mean the same by each id."""
    return a.sha256 == b.sha256 or (a.table == b.table and a.special == b.special)


def begin_of(
    asked: str | None, device: str, dtype_of: Callable[[int], torch.dtype], tokenizer: Tokenizer
) -> Begin | None:
    """How one model's texts are drafted. ValueError for a draft that has another tokenizer."""
    found = drafting(asked, device, dtype_of)
    begin = found and found(tokenizer)
    if asked is not None and begin is None:
        raise ValueError(f"--speculate {asked} has another tokenizer; name a model that has the same, or {LOOKUP}")
    return begin
