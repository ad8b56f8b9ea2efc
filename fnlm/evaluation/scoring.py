"""How likely a model finds given continuations: batched, each counted from its own first token on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from fnlm.config import ModelConfig
from fnlm.forward import head_weight, hidden, unembed
from fnlm.generate import beginning
from fnlm.tokenizers import Tokenizer
from fnlm.types import Params

Pair: TypeAlias = tuple[Sequence[int], Sequence[int]]
BATCH_TOKENS = 1 << 12
LOGITS = 1 << 24  # numbers of logits alive at once


class Scored(NamedTuple):
    """The summed log-probability of a continuation (nats), and whether each of its tokens is the likeliest."""

    logprob: float
    greedy: bool


def pair(tokenizer: Tokenizer, context: str, continuation: str) -> Pair:
    """The ids of both, cut where the context's own ids end: spaces at its end belong to the continuation.

    As lm-eval cuts them. An empty context is what begins a text.
    """
    words = context.rstrip()
    if not words:
        return beginning(tokenizer), tokenizer.encode(context + continuation)
    before = [*tokenizer.prefix, *tokenizer.encode(words)]
    both = [*tokenizer.prefix, *tokenizer.encode(context + continuation)]
    return before, both[len(before) :]


def rolling(ids: Sequence[int], before: int, seq_len: int) -> list[Pair]:
    """A long text as pairs that cover each of its ids once, the first predicted from the id `before` it.

    Each pair fills the context of `seq_len`: the last one begins earlier, as lm-eval's does.
    """
    pairs: list[Pair] = [([before], list(ids[:seq_len]))] if ids else []
    for at in range(seq_len, len(ids), seq_len):
        end = min(at + seq_len, len(ids))
        pairs.append((list(ids[end - seq_len - 1 : at]), list(ids[at:end])))
    return pairs


@torch.no_grad()
def score(
    params: Params,
    cfg: ModelConfig,
    pairs: Sequence[Pair],
    *,
    batch_tokens: int = BATCH_TOKENS,
    progress: Callable[[int], object] = lambda done: None,
) -> list[Scored]:
    """The continuation of each pair, in order; a context too long for the model loses its beginning.

    Rows of about one length go together, `batch_tokens` tokens at a time. `progress` is told how many more are done.
    ValueError for a pair without a continuation or a context, or a continuation that is longer than the model's.
    """
    rows = [_row(i, one, cfg) for i, one in enumerate(pairs)]
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i][0]))
    found: list[Scored] = [Scored(0.0, True)] * len(rows)
    at = 0
    while at < len(order):
        some = order[at : at + max(1, batch_tokens // len(rows[order[at]][0]))]
        for i, one in zip(some, _scored(params, cfg, [rows[i] for i in some]), strict=True):
            found[i] = one
        at += len(some)
        progress(len(some))
    return found


def _row(i: int, one: Pair, cfg: ModelConfig) -> tuple[list[int], list[int]]:
    """What goes into the model, and what comes out at its end."""
    context, continuation = one
    if not continuation or not context:
        raise ValueError(f"pair {i} has no {'continuation' if context else 'context'}; give it at least one token")
    if len(continuation) > cfg.seq_len:
        raise ValueError(f"a continuation of {len(continuation)} tokens is longer than the context, {cfg.seq_len}")
    both = [*context, *continuation][-(cfg.seq_len + 1) :]
    if not 0 <= min(both) <= max(both) < cfg.vocab_size:
        raise ValueError(f"pair {i} has an id outside vocab_size={cfg.vocab_size}; was it made with another tokenizer?")
    return both[:-1], list(continuation)


def _scored(params: Params, cfg: ModelConfig, rows: Sequence[tuple[list[int], list[int]]]) -> list[Scored]:
    device = next(iter(params.values())).device
    longest = max(len(ids) for ids, _ in rows)
    tokens = torch.tensor([ids + [0] * (longest - len(ids)) for ids, _ in rows], device=device)
    x, root = hidden(params, tokens, cfg)
    wanted = [(b, len(ids) - len(ends) + t) for b, (ids, ends) in enumerate(rows) for t in range(len(ends))]
    index = torch.tensor(wanted, device=device)
    targets = torch.tensor([i for _, ends in rows for i in ends], device=device)
    logprobs, likeliest = _chosen(x[index[:, 0], index[:, 1]], head_weight(root, cfg), targets, cfg)
    zeros = torch.zeros(len(rows), dtype=torch.float64, device=device)
    sums = zeros.index_add(0, index[:, 0], logprobs.double()).tolist()
    missed = zeros.index_add(0, index[:, 0], (~likeliest).double()).tolist()
    return [Scored(total, not wrong) for total, wrong in zip(sums, missed, strict=True)]


def _chosen(x: Tensor, weight: Tensor, targets: Tensor, cfg: ModelConfig) -> tuple[Tensor, Tensor]:
    """The log-probability of each target, and whether it is the likeliest id; logits of a part at a time."""
    parts = []
    for own, wanted in zip(*(t.split(max(1, LOGITS // len(weight))) for t in (x, targets)), strict=True):
        logits = unembed(own, weight, cfg)
        logits = logits if logits.dtype == torch.float64 else logits.float()
        parts.append((logits.log_softmax(-1).gather(-1, wanted[:, None]).squeeze(-1), logits.argmax(-1) == wanted))
    logprobs, likeliest = zip(*parts, strict=True)
    return torch.cat(logprobs), torch.cat(likeliest)
