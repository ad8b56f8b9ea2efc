"""From logits to the next token: pure functions of logits, settings, the row's history, and its own key and step.

The order: penalties, bias, forbidden ids; temperature; top-k, typical, top-p, min-p, each on what the one before left,
renormalised. V is the vocabulary of the logits, which may be padded beyond the tokenizer's.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from fnlm import random
from fnlm.types import Key

INF = math.inf
SOME = (256, 4096)  # the likeliest tokens that are looked at before all
TOP_P_SLACK = 1e-6  # so that a set whose probabilities add up to top_p by hand also does so in float32


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How to choose tokens, and when to stop. `temperature=0` takes the likeliest (greedy); None leaves a filter out.

    `min_tokens`: before that many, no text ends by an end or stop id. `max_tokens=None`: up to the context's end.
    `stop`: texts before which a text ends; `stop_ids`: further ids that end it. `logit_bias` (id: number) is added,
    `forbidden` ids are never drawn. `seed` replaces the caller's key. ValueError with the number and the remedy.
    """

    temperature: float = 0.8
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    typical_p: float | None = None
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    min_tokens: int = 0
    max_tokens: int | None = 256
    stop: tuple[str, ...] = ()
    stop_ids: tuple[int, ...] = ()
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    forbidden: tuple[int, ...] = ()
    seed: int | None = None

    def __post_init__(self) -> None:
        _within(self, "temperature", 0, 100, "0 is greedy, 0.8 usual, above 1 wild")
        _within(self, "top_p", 0, 1, "0.9 keeps the likeliest nine tenths", above=True)
        _within(self, "min_p", 0, 1, "0.05 drops what is 20 times less likely than the likeliest")
        _within(self, "typical_p", 0, 1, "0.95 is usual", above=True)
        _within(self, "repetition_penalty", 0, 100, "1 is none, 1.1 mild", above=True)
        _within(self, "presence_penalty", -100, 100, "0 is none")
        _within(self, "frequency_penalty", -100, 100, "0 is none")
        _whole(self, "top_k", 1, "leave it out to keep all")
        _whole(self, "min_tokens", 0, "0 lets a text end at once")
        _whole(self, "max_tokens", 1, "None is up to the context's end")
        _whole(self, "seed", 0, "and below 2**64", most=2**64 - 1)
        self._check_lists()

    def _check_lists(self) -> None:
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise ValueError(
                f"min_tokens={self.min_tokens} is more than max_tokens={self.max_tokens}; "
                "lower the one or raise the other"
            )
        if isinstance(self.stop, str) or not all(isinstance(s, str) and s for s in self.stop):
            raise ValueError(f"stop={self.stop!r} must be a tuple of texts, none of them empty")
        for name in ("stop_ids", "forbidden", "logit_bias"):
            wrong = [i for i in getattr(self, name) if isinstance(i, bool) or not isinstance(i, int) or i < 0]
            if wrong:
                raise ValueError(f"{name} has {wrong[0]!r}; ids are whole numbers of at least 0")
        for token, bias in self.logit_bias.items():
            if not -1000 <= bias <= 1000:
                raise ValueError(f"logit_bias of {token} is {bias}; choose a number from -1000 to 1000")

    @property
    def has_penalties(self) -> bool:
        """Whether a choice depends on the tokens before."""
        return (self.repetition_penalty, self.presence_penalty, self.frequency_penalty) != (1.0, 0.0, 0.0)


class History(NamedTuple):
    """What was said so far, for penalties: `seen` (B, V) bool, in the prompt or since; `counts` (B, V), since."""

    seen: Tensor
    counts: Tensor


def history_of(prompts: Sequence[Sequence[int]], vocab: int, device: torch.device | str = "cpu") -> History:
    """The history at the end of each row's prompt."""
    seen = torch.zeros((len(prompts), vocab), dtype=torch.bool, device=device)
    for row, prompt in zip(seen, prompts, strict=True):
        row[torch.tensor(list(prompt), dtype=torch.int64, device=device)] = True
    return History(seen, torch.zeros((len(prompts), vocab), device=device))


def extended(history: History, ids: Tensor) -> History:
    """With one more token (B,) for each row; -1 for none. The history is donated."""
    rows = (ids >= 0).nonzero().squeeze(-1)
    history.seen[rows, ids[rows]] = True
    history.counts[rows, ids[rows]] += 1
    return history


def shaped(
    logits: Tensor,
    settings: Settings,
    history: History | None = None,
    banned: Sequence[int] = (),
    vocab_size: int | None = None,
) -> Tensor:
    """Logits (B, V) after penalties, bias, and -inf for `banned` and forbidden ids and those from `vocab_size` on.

    Repetition penalty: of what was seen, positive logits are divided and negative ones multiplied (Keskar et al. 2019,
    4.1); presence and frequency are subtracted once, or per occurrence since the prompt (OpenAI's API). ValueError for
    an id outside the vocabulary.
    """
    if settings.has_penalties:
        assert history is not None, "penalties need the history"
        factor = settings.repetition_penalty
        logits = torch.where(history.seen, torch.where(logits > 0, logits / factor, logits * factor), logits)
        logits = logits - settings.presence_penalty * (history.counts > 0) - settings.frequency_penalty * history.counts
    bias = {**settings.logit_bias, **dict.fromkeys((*settings.forbidden, *banned), -INF)}
    if not bias and (vocab_size is None or vocab_size >= logits.shape[-1]):
        return logits
    return logits + _added(bias, logits, logits.shape[-1] if vocab_size is None else vocab_size)


def _added(bias: Mapping[int, float], like: Tensor, vocab_size: int) -> Tensor:
    """What is added to the logits, (V,)."""
    if bias and max(bias) >= vocab_size:
        raise ValueError(f"id {max(bias)} is not in the vocabulary of {vocab_size}; choose 0 to {vocab_size - 1}")
    added = like.new_zeros(like.shape[-1])
    added[vocab_size:] = -INF
    if bias:
        added[torch.tensor(list(bias), device=like.device)] = torch.tensor(list(bias.values())).to(added)
    return added


def filtered(
    logits: Tensor,
    settings: Settings,
    history: History | None = None,
    banned: Sequence[int] = (),
    vocab_size: int | None = None,
) -> Tensor:
    """The log-probabilities (B, V) that a token is drawn from; -inf for what is out. Greedy: 0 for the likeliest.

    Top-k (Fan et al. 2018) and min-p (Nguyen et al. 2024) keep ties at their border; top-p (Holtzman et al. 2020) and
    typical (Meister et al. 2023) the fewest tokens, best first, that together have the probability asked for.
    """
    logits = shaped(logits, settings, history, banned, vocab_size)
    if settings.temperature == 0:
        best = logits.argmax(-1, keepdim=True)
        return torch.full_like(logits, -INF).scatter(-1, best, 0.0)
    logp = (logits / settings.temperature).log_softmax(-1)
    if settings.top_k is not None and settings.top_k < logp.shape[-1]:
        logp = _kept(logp, logp >= logp.topk(settings.top_k, -1).values[..., -1:])
    if settings.typical_p is not None and settings.typical_p < 1:
        entropy = -(logp.exp() * logp.clamp(min=-1e4)).sum(-1, keepdim=True)
        logp = _kept(logp, _fewest(logp, (logp + entropy).abs(), settings.typical_p))
    if settings.top_p is not None and settings.top_p < 1:
        logp = _kept(logp, _fewest(logp, -logp, settings.top_p))
    if settings.min_p:
        logp = _kept(logp, logp >= logp.amax(-1, keepdim=True) + math.log(settings.min_p))
    return logp


def _kept(logp: Tensor, keep: Tensor) -> Tensor:
    """Log-probabilities of what is kept, renormalised."""
    return logp.masked_fill(~keep, -INF).log_softmax(-1)


def _fewest(logp: Tensor, rank: Tensor, mass: float) -> Tensor:
    """The tokens of least `rank`, as few as have `mass` together, at least one, ties by id: (B, V) bool.

    A CPU looks for them among the first hundreds before it sorts a whole vocabulary, which takes forty times as long.
    """
    mass = max(mass - TOP_P_SLACK, TOP_P_SLACK)
    if rank.device.type == "cpu":
        for some in (n for n in SOME if 4 * n <= rank.shape[-1]):
            found = _among(logp, rank, mass, some)
            if found is not None:
                return found
    order = rank.argsort(dim=-1, stable=True)
    probs = logp.gather(-1, order).exp()
    before = probs.cumsum(-1) - probs
    return torch.zeros_like(logp, dtype=torch.bool).scatter(-1, order, before < mass)


def _among(logp: Tensor, rank: Tensor, mass: float, some: int) -> Tensor | None:
    """`_fewest` where in each row these are fewer than `some`, and clear without an order among equals; else None."""
    least = rank.topk(some, -1, largest=False)
    probs = logp.gather(-1, least.indices).exp()
    taken = probs.cumsum(-1) - probs < mass
    equal = taken[..., :-1] & (least.values[..., 1:] == least.values[..., :-1])
    if bool(taken[..., -1].any() | equal.any()):
        return None
    return torch.zeros_like(logp, dtype=torch.bool).scatter(-1, least.indices, taken)


def draws(key: Key, n: int) -> Tensor:
    """A number in [0, 1) for each of n steps of one row, (n,) float64: that of a step depends on nothing else."""
    return random.uniform(key, (n,), torch.float64)


class Numbers:
    """`draws` of one row by step, made as they are asked for; it may have `most` steps."""

    def __init__(self, key: Key, most: int, ahead: int = 1024) -> None:
        self._key, self._most, self._ahead = key, most, ahead
        self._made: list[float] = []

    def __getitem__(self, step: int) -> float:
        if step >= len(self._made):
            self._made = draws(self._key, min(self._most, max(self._ahead, 2 * step))).tolist()
        return self._made[step]


def choose(logp: Tensor, at: Tensor) -> Tensor:
    """The ids (B,) that numbers `at` (B,) in [0, 1) fall on in the distributions (B, V), by their sums in id order.

    V where there is no distribution: logits that are not finite, or all ids forbidden.
    """
    total = logp.double().exp().cumsum(-1)
    return torch.searchsorted(total, at.to(total)[:, None] * total[:, -1:], right=True).squeeze(-1)


def sample(
    logits: Tensor,
    keys: Tensor,
    settings: Settings,
    step: int = 0,
    history: History | None = None,
    banned: Sequence[int] = (),
    vocab_size: int | None = None,
) -> Tensor:
    """One id for each row, (B,), of logits (B, V) and keys (B, 2): a row's depends on its own key, step and logits."""
    logp = filtered(logits, settings, history, banned, vocab_size)
    return choose(logp, torch.stack([draws(key, step + 1)[step] for key in keys]))


def _within(settings: Settings, name: str, least: float, most: float, remedy: str, above: bool = False) -> None:
    value = getattr(settings, name)
    if value is None and name in ("top_p", "min_p", "typical_p"):
        return
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not least <= value <= most or (above and value == least):
        span = f"above {least} and at most {most}" if above else f"from {least} to {most}"
        raise ValueError(f"{name}={value!r} is not a number {span}; {remedy}")


def _whole(settings: Settings, name: str, least: int, remedy: str, most: int = 2**31) -> None:
    value = getattr(settings, name)
    if value is None and name in ("top_k", "max_tokens", "seed"):
        return
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise ValueError(f"{name}={value!r} is not a whole number of at least {least}; {remedy}")
