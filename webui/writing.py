"""One reply as it grows: the choice of its next token among others', its text, and what its tokens were worth."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from fnlm import random
from fnlm.generate import Finish, Generation, Text, Token, end_ids
from fnlm.sampling import History, Numbers, Settings, choose, extended, filtered, history_of, shaped
from fnlm.speculate import Draft, decided
from fnlm.tokenizers import StreamDecoder, Tokenizer


class Scored(NamedTuple):
    """A token with its log-probability before temperature and filters, and the likeliest ids there with theirs."""

    id: int
    logprob: float | None  # None: nothing stands before it
    top: tuple[tuple[int, float], ...]


class Piece(NamedTuple):
    """Text that has become certain, and the tokens it is of, where they were asked for; how many there are by now."""

    text: str
    tokens: tuple[Scored, ...] = ()
    written: int = 0


@dataclass(eq=False)
class Writer:
    """What one reply needs to go on. `top`: None for no log-probabilities, else how many likeliest ids to tell."""

    tokenizer: Tokenizer
    prompt: Sequence[int]
    settings: Settings
    seed: int
    vocab: int  # of the logits
    top: int | None = None
    device: torch.device | str = "cpu"
    step: int = 0
    next: int | None = None  # the token that the model has not seen yet
    history: History | None = None
    _pending: list[Scored] = field(default_factory=list)
    _told: int = 0  # characters before the next token that waits
    _said: int = 0  # characters that have become certain

    def __post_init__(self) -> None:
        self._decoder = StreamDecoder(self.tokenizer)
        self.text = Text(self.tokenizer, self.prompt, self.settings.stop)
        self.ends = end_ids(self.tokenizer).union(self.settings.stop_ids)
        self.key = random.fold_in(random.key(self.seed % (1 << 64)), torch.arange(1))[0]  # as `generate` has for a row
        self._at = Numbers(self.key, self.settings.max_tokens or 1)
        if self.settings.has_penalties:
            self.history = history_of([self.prompt], self.vocab, self.device)
        s = self.settings
        bias = tuple(sorted(s.logit_bias.items()))
        penalties = (s.repetition_penalty, s.presence_penalty, s.frequency_penalty)
        self._filters = (s.temperature, s.top_k, s.top_p, s.min_p, s.typical_p, *penalties, bias, s.forbidden)

    @property
    def at(self) -> float:
        """The number in [0, 1) that draws the next token."""
        return self._at[self.step]

    @property
    def finish(self) -> Finish | None:
        """Why it has ended, if it has."""
        return self.text.finish

    @property
    def generation(self) -> Generation:
        """All of it, once it has ended."""
        return self.text.generation

    @property
    def banned(self) -> tuple[int, ...]:
        """The ends, as long as it must not end."""
        return tuple(sorted(self.ends)) if self.step < self.settings.min_tokens else ()

    @property
    def recipe(self) -> tuple[object, ...]:
        """Those with the same one choose alike."""
        return (self._filters, self.banned, self.tokenizer.vocab_size)

    def push(self, chosen: int, scored: Scored | None) -> Piece | None:
        """Take the token that was chosen; the text it makes certain. ValueError where none could be."""
        if chosen >= self.vocab:
            raise ValueError("no token can be drawn: the model's logits are not finite, or all ids are forbidden")
        self.step += 1
        stopped, full = chosen in self.ends, self.step == self.settings.max_tokens
        self.next = chosen
        if self.history is not None:
            self.history = extended(self.history, torch.tensor([chosen], device=self.device))
        finish: Literal["stop", "length"] | None = "stop" if stopped else "length" if full else None
        text = self.text.push(Token(0, -1 if stopped else chosen, 0.0, finish))
        if scored is not None and not stopped:
            self._pending.append(scored)
        tokens = self._certain(text)
        return Piece(text, tokens, self.step) if text or tokens else None

    def close(self) -> Piece | None:
        """Leave it before its end."""
        text = self.text.close("cancelled")
        tokens = self._certain(text)
        return Piece(text, tokens, self.step) if text or tokens else None

    def _certain(self, text: str) -> tuple[Scored, ...]:
        """Of the tokens that wait, those of which a letter has been said; at an end that is no stop string, all."""
        self._said += len(text)
        finish, drawn = self.text.finish, self.next in self.ends
        cut = finish == "stop" and not drawn
        out = []
        while self._pending and (self._told < self._said or (finish is not None and not cut)):
            out.append(self._pending.pop(0))
            self._told += len(self._decoder.push(out[-1].id))
        return tuple(out)


@torch.no_grad()
def chosen(writers: Sequence[Writer], logits: Tensor) -> tuple[list[int], list[Scored | None]]:
    """The next token of each, of logits (n, V); those that choose alike choose together. V: there is none."""
    groups: dict[tuple[object, ...], list[int]] = {}
    for i, writer in enumerate(writers):
        groups.setdefault(writer.recipe, []).append(i)
    ids = [0] * len(writers)
    for rows in groups.values():
        own = logits if len(rows) == len(writers) else logits[torch.tensor(rows, device=logits.device)]
        for row, token in zip(rows, _of_group([writers[i] for i in rows], own), strict=True):
            ids[row] = token
    return ids, _scored(writers, logits, ids)


@torch.no_grad()
def judged(writer: Writer, logits: Tensor, draft: Draft, i: int, accept: float) -> tuple[int, Scored | None]:
    """The next token of one reply, of logits (V,), where a draft's i-th may stand; see `fnlm.speculate.decided`."""
    if draft.logp is None or i >= len(draft.ids) or writer.settings.temperature == 0:
        ids, scores = chosen([writer], logits[None])
        return ids[0], scores[0]
    logp = filtered(logits[None], writer.settings, writer.history, writer.banned, writer.tokenizer.vocab_size)[0]
    token = decided(logp, draft, i, writer.at, accept)
    return token, _scored([writer], logits[None], [token])[0]


def _of_group(writers: Sequence[Writer], logits: Tensor) -> list[int]:
    settings, banned, size = writers[0].settings, writers[0].banned, writers[0].tokenizer.vocab_size
    pasts = [w.history for w in writers if w.history is not None]
    history = History(torch.cat([h.seen for h in pasts]), torch.cat([h.counts for h in pasts])) if pasts else None
    if settings.temperature == 0:
        best = shaped(logits, settings, history, banned, size).max(-1)
        some = best.values.isfinite()
        return best.indices.where(some, torch.full_like(best.indices, logits.shape[-1])).tolist()
    logp = filtered(logits, settings, history, banned, size)
    at = torch.tensor([w.at for w in writers], dtype=torch.float64, device=logits.device)
    return choose(logp, at).tolist()


def _scored(writers: Sequence[Writer], logits: Tensor, ids: Sequence[int]) -> list[Scored | None]:
    """What the tokens were worth, for those who asked. Log-probabilities of what cannot be drawn are left out."""
    out: list[Scored | None] = []
    for writer, row, token in zip(writers, logits, ids, strict=True):
        if writer.top is None or token >= len(row):
            out.append(None)
            continue
        out.append(scored(row.log_softmax(-1), token, writer.top, writer.tokenizer.vocab_size))
    return out


def scored(logp: Tensor, token: int, top: int, size: int) -> Scored:
    """What a token was worth, and the likeliest `top` of a vocabulary of `size`, of log-probabilities (V,)."""
    best = logp[:size].topk(min(top, size))
    return Scored(token, float(logp[token]), tuple(zip(best.indices.tolist(), best.values.tolist(), strict=True)))
