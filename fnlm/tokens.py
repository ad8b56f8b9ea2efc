"""The tokens of a batch of texts, step by step: each row draws with its own key, and ends or slides by itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from fnlm.config import ModelConfig
from fnlm.decode import KVCache, Prepared, decode, init_cache, picked, prefill
from fnlm.sampling import History, Settings, choose, draws, extended, filtered, history_of

SINKS = 4  # first tokens that a text keeps when it slides: where attention goes that has nowhere to go


class Token(NamedTuple):
    """One step of one row. `logprob` is the model's own, before temperature and filters; the last step of a row has
    `finish`, and id -1 where it is an end that is not part of the text. Under speculation `drafted` says, at the first
    token of a step, how many were drafted for it; `guessed` that the draft had this one."""

    row: int
    id: int
    logprob: float
    finish: Literal["stop", "length"] | None
    drafted: int = 0
    guessed: bool = False


class Limits(NamedTuple):
    """Where texts end and what they are made of. `keep`: a text that has outgrown the context goes on from its first
    `keep` tokens and its newest half; None: it ends there."""

    ends: frozenset[int]
    vocab_size: int
    keep: int | None = None

    def begun(self, prompt: Sequence[int], cfg: ModelConfig) -> list[int]:
        """What is read of a prompt before its first new token."""
        over = self.keep is not None and len(prompt) >= cfg.seq_len
        return slid(prompt, cfg.seq_len, self.keep or 0) if over else list(prompt)

    def most(self, prompt: Sequence[int], settings: Settings, cfg: ModelConfig) -> int:
        """How many tokens may follow a prompt."""
        if self.keep is not None:
            assert settings.max_tokens is not None
            return settings.max_tokens
        return min(settings.max_tokens or cfg.seq_len, cfg.seq_len - len(prompt))


def slid(ids: Sequence[int], seq_len: int, keep: int = SINKS) -> list[int]:
    """What a text of at least `seq_len` tokens goes on from: its first `keep` and its newest half of the context.

    They are read anew at positions from 0 on, so any scheme of positions is right. The first tokens stay since softmax
    needs them (attention sinks, Xiao et al. 2024). ValueError where `keep` leaves no room for a token.
    """
    most = seq_len - 1 - seq_len // 2
    if not 0 <= keep <= most or seq_len < 2:
        raise ValueError(
            f"keep={keep} and half of a context of {seq_len} leave no room for a token; keep {max(0, most)} or fewer"
        )
    return [*ids[:keep], *ids[len(ids) - seq_len // 2 :]]


def steps(
    ready: Prepared,
    cfg: ModelConfig,
    prompts: Sequence[Sequence[int]],
    settings: Settings,
    keys: Tensor,
    limits: Limits,
    cancelled: Callable[[], bool],
    ended: Callable[[int], bool],
) -> Iterator[list[Token]]:
    """The rows that still run, one token each; see `fnlm.generate.generate`, which has checked all of it."""
    if cancelled():
        return
    table = ready.root["embed.tokens.weight"]
    texts = [limits.begun(prompt, cfg) for prompt in prompts]
    most = [limits.most(prompt, settings, cfg) for prompt in prompts]
    size = min(cfg.seq_len, max(len(text) + n for text, n in zip(texts, most, strict=True)))
    at = torch.stack([draws(key, max(most)) for key in keys]).to(table.device)
    history = history_of(prompts, cfg.vocab_size, table.device) if settings.has_penalties else None
    logits, cache = prefill(ready, texts, cfg, init_cache(cfg, len(texts), size, table.dtype, table.device))
    rows = list(range(len(texts)))  # those that the cache holds
    running = set(rows)
    for step in range(max(most)):
        banned = tuple(limits.ends) if step < settings.min_tokens else ()
        logp = filtered(logits, settings, history, banned, limits.vocab_size)
        ids = choose(logp, at[:, step])
        full = {row for row in running if step + 1 == most[row]}
        tokens = told([(i, row) for i, row in enumerate(rows) if row in running], ids, logits, limits.ends, full)
        yield tokens
        running -= {token.row for token in tokens if token.finish or ended(token.row)}
        if not running or cancelled():
            return
        if 2 * len(running) <= len(rows):
            kept = [i for i, row in enumerate(rows) if row in running]
            rows = [rows[i] for i in kept]
            index = torch.tensor(kept, device=table.device)
            cache, ids, at = picked(cache, index), ids[index], at[index]
            history = history and History(history.seen[index], history.counts[index])
        mask = torch.tensor([int(row in running) for row in rows], device=table.device)
        if history is not None:
            history = extended(history, ids.where(mask > 0, -1))
        if limits.keep is not None:
            _slide_(ready, cfg, cache, rows, running, texts, ids, limits.keep)
        lengths = mask if len(running) < len(rows) else None
        logits, cache = decode(ready, (ids * mask)[:, None], cfg, cache, lengths=lengths)


def _slide_(
    ready: Prepared,
    cfg: ModelConfig,
    cache: KVCache,
    rows: Sequence[int],
    running: set[int],
    texts: list[list[int]],
    ids: Tensor,
    keep: int,
) -> None:
    """Add the new tokens to the texts; those that have outgrown the context begin again at the cache's first place."""
    for i, (row, new) in enumerate(zip(rows, ids.tolist(), strict=True)):
        if row in running:
            texts[row].append(new)
            if len(texts[row]) > cfg.seq_len:
                texts[row] = slid(texts[row], cfg.seq_len, keep)
                cache.pos[i] = reread(ready, cfg, cache, i, texts[row][:-1])


def reread(ready: Prepared, cfg: ModelConfig, cache: KVCache, row: int, text: Sequence[int]) -> int:
    """Read a text into one row of a cache, from its first position on: how many positions are valid then."""
    own = slice(row, row + 1)
    empty = KVCache(cache.k[:, own], cache.v[:, own], torch.zeros_like(cache.pos[own]), cache.tokens[own])
    if text:
        prefill(ready, [text], cfg, empty)
    return len(text)


def told(
    running: Sequence[tuple[int, int]], ids: Tensor, logits: Tensor, ends: frozenset[int], full: set[int]
) -> list[Token]:
    """What was drawn, of (index, row) for each running row; those in `full` end. ValueError where nothing could be."""
    chosen: list[int] = ids.tolist()
    if any(chosen[i] >= logits.shape[-1] for i, _ in running):
        raise ValueError("no token can be drawn: the model's logits are not finite, or all ids are forbidden")
    own = logits.gather(-1, ids.clamp(max=logits.shape[-1] - 1)[:, None]).squeeze(-1)
    logprobs: list[float] = (own - logits.logsumexp(-1)).tolist()
    out = []
    for i, row in running:
        stopped = chosen[i] in ends
        finish: Literal["stop", "length"] | None = "stop" if stopped else "length" if row in full else None
        out.append(Token(row, -1 if stopped else chosen[i], logprobs[i], finish))
    return out
