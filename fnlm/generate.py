"""Text from a model: batches of prompts to tokens, tokens to text that is whole at every moment, and when to stop."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor

from fnlm import random
from fnlm.config import ModelConfig
from fnlm.data import prompt as chat_prompt
from fnlm.decode import Prepared, decode, init_cache, picked, prefill, prepare
from fnlm.sampling import History, Settings, choose, draws, extended, filtered, history_of
from fnlm.tokenizers import IM_END, StreamDecoder, Tokenizer
from fnlm.tokenizers.plain import Char
from fnlm.types import Key, Params

Finish: TypeAlias = Literal["stop", "length", "cancelled"]


class Token(NamedTuple):
    """One step of one row. `logprob` is the model's own, before temperature and filters; the last step of a row has
    `finish`, and id -1 where it is an end that is not part of the text."""

    row: int
    id: int
    logprob: float
    finish: Literal["stop", "length"] | None


class Generation(NamedTuple):
    """A finished text: without its end, and from the beginning of a stop string on nothing. `ids` are all that were
    drawn, those of a stop string too. `finish`: "stop", "length" (of max_tokens or the context), "cancelled"."""

    text: str
    ids: list[int]
    finish: Finish
    prompt_tokens: int


def never(row: int = 0) -> bool:
    """Nobody cancels."""
    return False


def generate(
    params: Params | Prepared,
    cfg: ModelConfig,
    prompts: Sequence[Sequence[int]],
    settings: Settings,
    key: Key,
    *,
    eot_ids: frozenset[int],
    vocab_size: int | None = None,
    cancelled: Callable[[], bool] = never,
    ended: Callable[[int], bool] = never,
) -> Iterator[list[Token]]:
    """The rows that still run, one token each, step by step.

    A row's tokens depend on its prompt, the settings and its own key alone: row i of `key` (B, 2), or i folded into
    `key` (2,); `settings.seed` stands for a key. Asked before each step: `cancelled` stops all, `ended` a row. Stop
    strings are the caller's matter. `vocab_size`: ids from there on are never drawn. ValueError, before the first step,
    for a prompt that is empty, too long for the context, or not in the vocabulary.
    """
    vocab_size = vocab_size or cfg.vocab_size
    if not prompts:
        raise ValueError("there is no prompt; give at least one")
    for i, prompt in enumerate(prompts):
        _check(i, prompt, cfg, vocab_size)
    key = random.key(settings.seed) if settings.seed is not None else key
    keys = key if key.ndim == 2 else random.fold_in(key, torch.arange(len(prompts)))
    ready = params if isinstance(params, Prepared) else prepare(params, cfg)
    return _steps(ready, cfg, prompts, settings, keys, eot_ids.union(settings.stop_ids), vocab_size, cancelled, ended)


def _check(i: int, prompt: Sequence[int], cfg: ModelConfig, vocab_size: int) -> None:
    if not prompt:
        raise ValueError(f"prompt {i} is empty; give it at least one token")
    if len(prompt) >= cfg.seq_len:
        raise ValueError(
            f"the prompt has {len(prompt)} tokens, the model's context only {cfg.seq_len} for prompt and reply; "
            f"shorten it to {cfg.seq_len - 1} at most"
        )
    if not 0 <= min(prompt) <= max(prompt) < vocab_size:
        wrong = next(t for t in prompt if not 0 <= t < vocab_size)
        raise ValueError(f"prompt {i} has id {wrong}, the vocabulary {vocab_size}; was it made with another tokenizer?")


def _steps(
    ready: Prepared,
    cfg: ModelConfig,
    prompts: Sequence[Sequence[int]],
    settings: Settings,
    keys: Tensor,
    ends: frozenset[int],
    vocab_size: int,
    cancelled: Callable[[], bool],
    ended: Callable[[int], bool],
) -> Iterator[list[Token]]:
    if cancelled():
        return
    table = ready.root["embed.tokens.weight"]
    most = [min(settings.max_tokens or cfg.seq_len, cfg.seq_len - len(prompt)) for prompt in prompts]
    size = max(len(prompt) + n for prompt, n in zip(prompts, most, strict=True))
    at = torch.stack([draws(key, max(most)) for key in keys]).to(table.device)
    history = history_of(prompts, cfg.vocab_size, table.device) if settings.has_penalties else None
    logits, cache = prefill(ready, prompts, cfg, init_cache(cfg, len(prompts), size, table.dtype, table.device))
    rows = list(range(len(prompts)))  # those that the cache holds
    running = set(rows)
    for step in range(max(most)):
        banned = tuple(ends) if step < settings.min_tokens else ()
        logp = filtered(logits, settings, history, banned, vocab_size)
        ids = choose(logp, at[:, step])
        full = {row for row in running if step + 1 == most[row]}
        tokens = _tokens([(i, row) for i, row in enumerate(rows) if row in running], ids, logits, ends, full)
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
        lengths = mask if len(running) < len(rows) else None
        logits, cache = decode(ready, (ids * mask)[:, None], cfg, cache, lengths=lengths)


def _tokens(
    running: list[tuple[int, int]], ids: Tensor, logits: Tensor, ends: frozenset[int], full: set[int]
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


class Text:
    """What becomes of one row's tokens: text, held back while it might be the beginning of a stop string."""

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int], stop: Sequence[str]) -> None:
        self._decoder, self._stop, self._held = StreamDecoder(tokenizer), stop, ""
        self._pieces: list[str] = []
        self._ids: list[int] = []
        self._prompt_tokens = len(prompt)
        self.finish: Finish | None = None

    def push(self, token: Token) -> str:
        """The text that a token makes certain."""
        if token.id >= 0:
            self._ids.append(token.id)
            self._held += self._decoder.push(token.id)
        out = self._certain()
        if self.finish is None and token.finish:
            out += self.close(token.finish)
        return out

    def close(self, finish: Finish) -> str:
        """The end: what was held back, and U+FFFD for a character that is not whole."""
        self._held += self._decoder.flush()
        out = self._certain()
        if self.finish is None:
            self.finish = finish
            self._pieces.append(self._held)
            out += self._held
        return out

    def _certain(self) -> str:
        found = [at for s in self._stop if (at := self._held.find(s)) >= 0]
        if found:
            out, self._held, self.finish = self._held[: min(found)], "", "stop"
        else:
            keep = max((_begun(self._held, s) for s in self._stop), default=0)
            out, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        self._pieces.append(out)
        return out

    @property
    def generation(self) -> Generation:
        """All of it, once it has ended."""
        assert self.finish is not None
        return Generation("".join(self._pieces), self._ids, self.finish, self._prompt_tokens)


def _begun(text: str, stop: str) -> int:
    """How many of the last characters are the beginning of a stop string: the most."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)


def stream(
    params: Params | Prepared,
    cfg: ModelConfig,
    tokenizer: Tokenizer,
    prompt_ids: Sequence[int],
    settings: Settings,
    key: Key,
    *,
    cancelled: Callable[[], bool] = never,
) -> Generator[str, None, Generation]:
    """The text after a prompt, piece by piece; returns the Generation, whose text is the pieces joined.

    No piece ends within a character or shows a stop string's beginning that might go on. The text ends at
    `end_ids(tokenizer)` and the settings' own. Asks `cancelled` before each token.
    """
    text = Text(tokenizer, prompt_ids, settings.stop)
    steps = generate(
        params, cfg, [prompt_ids], settings, key, eot_ids=end_ids(tokenizer), vocab_size=tokenizer.vocab_size,
        cancelled=cancelled, ended=lambda row: text.finish is not None,
    )  # fmt: skip
    return _pieces(text, steps)


def _pieces(text: Text, steps: Iterator[list[Token]]) -> Generator[str, None, Generation]:
    for (token,) in steps:
        if piece := text.push(token):
            yield piece
    if text.finish is None and (piece := text.close("cancelled")):
        yield piece
    return text.generation


def complete(
    params: Params | Prepared,
    cfg: ModelConfig,
    tokenizer: Tokenizer,
    prompts: Sequence[str] | Sequence[Sequence[int]],
    settings: Settings,
    key: Key,
    chat: bool = False,
    *,
    cancelled: Callable[[], bool] = never,
) -> list[Generation]:
    """The texts after several prompts, made together; the first is what `stream` says of it with the same key.

    Prompts are texts (`chat`: each the first message of a user) or ids.
    """
    ids = [encoded(tokenizer, p, chat) if isinstance(p, str) else p for p in prompts]
    texts = [Text(tokenizer, p, settings.stop) for p in ids]
    for tokens in generate(
        params, cfg, ids, settings, key, eot_ids=end_ids(tokenizer), vocab_size=tokenizer.vocab_size,
        cancelled=cancelled, ended=lambda row: texts[row].finish is not None,
    ):  # fmt: skip
        for token in tokens:
            texts[token.row].push(token)
    for text in texts:
        if text.finish is None:
            text.close("cancelled")
    return [text.generation for text in texts]


def encoded(tokenizer: Tokenizer, text: str, chat: bool = False) -> list[int]:
    """The ids of a prompt; `chat`: of a user's message, up to the reply. An empty text begins a document.

    ValueError for characters that the tokenizer does not know, with all of them.
    """
    if isinstance(tokenizer, Char):
        unknown = sorted(set(text) - set(tokenizer.characters))
        if unknown:
            some = ", ".join(f"{c!r} (U+{ord(c):04X})" for c in unknown[:10]) + (", ..." if len(unknown) > 10 else "")
            known = len(tokenizer.characters)
            raise ValueError(f"the model's tokenizer knows {known} characters, but not {some}; leave them out")
    if chat:
        return chat_prompt(tokenizer, [{"role": "user", "content": text}])
    return [*tokenizer.prefix, *tokenizer.encode(text)] or beginning(tokenizer)


def beginning(tokenizer: Tokenizer) -> list[int]:
    """What stands before a document: the tokenizer's prefix, or the end of another; else a newline, or id 0."""
    if tokenizer.prefix:
        return list(tokenizer.prefix)
    if tokenizer.eot_id is not None:
        return [tokenizer.eot_id]
    return [tokenizer.table.index(b"\n") if b"\n" in tokenizer.table else 0]


def end_ids(tokenizer: Tokenizer) -> frozenset[int]:
    """The ids that end a text or a turn: those of <|endoftext|> (or its like) and <|im_end|> that there are."""
    return frozenset(i for i in (tokenizer.eot_id, tokenizer.special.get(IM_END)) if i is not None)
