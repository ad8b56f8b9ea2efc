"""Several tokens a step: a cheap guess drafts them, the model reads them all at once, and what it would not say is cut.

The texts are distributed as without it (greedy: the same tokens, up to the rounding of float32). Letters as in
sampling.py; n counts drafted tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple, Protocol, TypeAlias

import torch
from torch import Tensor

from fnlm import random
from fnlm.config import ModelConfig
from fnlm.decode import CHUNK, Prepared, decode, init_cache, prefill
from fnlm.sampling import History, Numbers, Settings, choose, extended, filtered, history_of
from fnlm.tokens import Limits, Token, reread, slid, told
from fnlm.types import Key

MOST = 8  # tokens drafted at a time
LONGEST, SHORTEST = 3, 2  # of the last tokens, what must have been said before
_ACCEPT, _DRAFT = 1, 2  # folded into a row's key: numbers that decide on a draft, and that it is drawn with


class Draft(NamedTuple):
    """Tokens that may come next; `logp` (n, V), what each was drawn from, or None where there is no chance in them."""

    ids: list[int]
    logp: Tensor | None = None


class Drafter(Protocol):
    """Guesses how one text goes on. Told what is `new` in it since the last call (at first: all of it), and how many
    tokens were said before; drafts at most `most`."""

    def propose(self, new: Sequence[int], most: int, step: int) -> Draft: ...


Begin: TypeAlias = Callable[[Settings, Key], Drafter]  # for a text with these settings and this key


class Lookup:
    """Drafts what followed when the text's last tokens were said before, in the prompt or since (prompt lookup).

    Its begin is `lookup`. Costs no model; worth it where texts repeat themselves, or their prompts.
    """

    def __init__(self) -> None:
        self._text: list[int] = []
        self._after: dict[tuple[int, ...], int] = {}  # the place after the latest occurrence of each run of tokens

    def propose(self, new: Sequence[int], most: int, step: int) -> Draft:
        for token in new:
            for n in range(SHORTEST, min(LONGEST, len(self._text)) + 1):
                self._after[tuple(self._text[-n:])] = len(self._text)
            self._text.append(token)
        for n in range(min(LONGEST, len(self._text)), SHORTEST - 1, -1):
            at = self._after.get(tuple(self._text[-n:]))
            if at is not None:
                period = len(self._text) - at
                return Draft([self._text[at + i % period] for i in range(max(0, most))])
        return Draft([])


def lookup(settings: Settings, key: Key) -> Lookup:
    """Draft by prompt lookup."""
    return Lookup()


def with_model(params: Prepared, cfg: ModelConfig, vocab_size: int) -> Begin:
    """Draft with another model, a smaller one whose first `vocab_size` ids mean the same."""
    return lambda settings, key: _Other(params, cfg, vocab_size, settings, key)


class _Other:
    """A text in another model's cache. Of a long text CHUNK tokens are read in a call, and nothing is drafted before
    all of it is read; nor once it has outgrown that model's context."""

    def __init__(self, ready: Prepared, cfg: ModelConfig, vocab_size: int, settings: Settings, key: Key) -> None:
        self._ready, self._cfg, self._vocab = ready, cfg, vocab_size
        # What was said before shifts both models' choices: without penalties a draft is only rejected more often.
        self._settings = replace(
            settings, repetition_penalty=1.0, presence_penalty=0.0, frequency_penalty=0.0, min_tokens=0
        )
        self._most = settings.max_tokens or cfg.seq_len
        self._at = Numbers(random.fold_in(key, _DRAFT), self._most)
        table = ready.root["embed.tokens.weight"]
        self._cache = init_cache(cfg, 1, None, table.dtype, table.device)
        self._text: list[int] = []
        self._read, self._drafted = 0, list[int]()

    def propose(self, new: Sequence[int], most: int, step: int) -> Draft:
        self._read += agreeing(self._drafted[:-1], new)
        self._text += new
        self._drafted = []
        most = min(most, self._cfg.seq_len - len(self._text), self._most - step)
        if most <= 0:
            return Draft([])
        part = self._text[self._read : self._read + CHUNK]
        logits = self._decode(part, self._read)
        self._read += len(part)
        return self._draft(logits, most, step) if self._read == len(self._text) else Draft([])

    def _draft(self, logits: Tensor, most: int, step: int) -> Draft:
        rows = []
        for i in range(most):
            logp = filtered(logits, self._settings, None, (), self._vocab)
            token = int(choose(logp, torch.tensor([self._at[step + i]], dtype=torch.float64, device=logp.device)))
            if token >= logp.shape[-1]:
                break  # not finite; the model that decides may do better
            self._drafted.append(token)
            rows.append(logp[0])
            if i + 1 < most:
                logits = self._decode([token], len(self._text) + i)
        return Draft(list(self._drafted), torch.stack(rows) if rows else None)

    def _decode(self, tokens: Sequence[int], at: int) -> Tensor:
        cache = self._cache._replace(pos=torch.full_like(self._cache.pos, at))
        return decode(self._ready, torch.tensor([tokens], device=cache.pos.device), self._cfg, cache)[0]


def agreeing(a: Sequence[int], b: Sequence[int]) -> int:
    """How many of the first tokens are the same."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def decided(logp: Tensor, draft: Draft, i: int, at: float, accept: float) -> int:
    """The token at the place of the draft's i-th, distributed as `logp` (V,) says; V: there is none.

    `at` and `accept` are the place's own numbers in [0, 1). A drafted x is kept with probability min(1, p(x) / q(x)),
    else one is drawn from max(0, p - q) renormalised (Leviathan et al. 2023, algorithm 1). Where there is no chance in
    the draft, q is 1 at x, and the number that draws a token without a draft decides: the same text for the same key.
    """
    numbers = torch.tensor([at], dtype=torch.float64, device=logp.device)
    if draft.logp is None or i >= len(draft.ids):
        return int(choose(logp[None], numbers))
    p, q, x = logp.double().exp(), draft.logp[i].to(logp.device).double().exp(), draft.ids[i]
    if accept * float(q[x]) < float(p[x]):
        return x
    left, both = p.clone(), min(len(p), len(q))
    left[:both] = (p[:both] - q[:both]).clamp(min=0)
    return int(choose((left if left.any() else p).log()[None], numbers))


def next_length(accepted: int, drafted: int) -> int:
    """How many to draft after a step that accepted so many: a text that goes its own way soon costs little."""
    return MOST if accepted == drafted else max(2, min(MOST, 2 * accepted))


def accepting(key: Key, most: int) -> Numbers:
    """The numbers that decide on the drafts of a text of at most so many tokens."""
    return Numbers(random.fold_in(key, _ACCEPT), most)


def drafted(
    ready: Prepared,
    cfg: ModelConfig,
    row: int,
    prompt: Sequence[int],
    settings: Settings,
    key: Key,
    limits: Limits,
    begin: Begin,
) -> Iterator[Token]:
    """The tokens of one row, as `fnlm.tokens.steps` has them, by fewer passes through the model."""
    table = ready.root["embed.tokens.weight"]
    text, most = limits.begun(prompt, cfg), limits.most(prompt, settings, cfg)
    size = min(cfg.seq_len, len(text) + most)
    judge = _Judge(settings, key, limits, row, most)
    if settings.has_penalties:
        judge.history = history_of([prompt], cfg.vocab_size, table.device)
    logits, cache = prefill(ready, [text], cfg, init_cache(cfg, 1, size, table.dtype, table.device))
    drafter, new, draft, length = begin(settings, key), list(text), Draft([]), MOST
    while True:
        said = []
        for token in judge.said(logits, draft):
            yield token
            if token.finish:
                return
            said.append(token)
        new += [token.id for token in said]
        text += [token.id for token in said]
        length = next_length(len(said) - 1, len(draft.ids)) if draft.ids else length
        if len(text) > cfg.seq_len:
            text = slid(text, cfg.seq_len, limits.keep or 0)
            reread(ready, cfg, cache, 0, text[:-1])
            drafter, new = begin(settings, key), list(text)
        draft = drafter.propose(new, min(length, size - len(text), most - judge.step - 1), judge.step)
        new = []
        fed = torch.tensor([[text[-1], *draft.ids]], device=table.device)
        cache = cache._replace(pos=torch.full_like(cache.pos, len(text) - 1))
        (logits,), cache = decode(ready, fed, cfg, cache, every=True)


class _Judge:
    """What a row says of drafts: its numbers, its history, and how many tokens it has said."""

    def __init__(self, settings: Settings, key: Key, limits: Limits, row: int, most: int) -> None:
        self._settings, self._limits, self._row, self._most = settings, limits, row, most
        self._at, self._accept = Numbers(key, most), accepting(key, most)
        self.history: History | None = None
        self.step = 0

    def said(self, logits: Tensor, draft: Draft) -> Iterator[Token]:
        """Of logits (n + 1, V) after what was said and after each drafted token: the tokens up to the first that was
        not drafted."""
        for i, logit in enumerate(logits[:, None]):
            banned = tuple(self._limits.ends) if self.step < self._settings.min_tokens else ()
            logp = filtered(logit, self._settings, self.history, banned, self._limits.vocab_size)[0]
            x = decided(logp, draft, i, self._at[self.step], self._accept[self.step])
            chosen = torch.tensor([x], device=logit.device)
            full = {self._row} if self.step + 1 == self._most else set[int]()
            (token,) = told([(0, self._row)], chosen, logit, self._limits.ends, full)
            hit = i < len(draft.ids) and x == draft.ids[i]
            self.step += 1
            yield token._replace(drafted=0 if i else len(draft.ids), guessed=hit)
            self.history = self.history and extended(self.history, chosen)
            if not hit:
                return
