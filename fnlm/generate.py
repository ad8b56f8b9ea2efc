"""Text from a model: batches of prompts to tokens, tokens to text that is whole at every moment, and when to stop."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import replace
from typing import Literal, NamedTuple, TypeAlias

import torch

from fnlm import random
from fnlm.config import ModelConfig
from fnlm.data import Dialogue
from fnlm.decode import Prepared, prepare
from fnlm.sampling import Settings
from fnlm.speculate import Begin, drafted
from fnlm.tokenizers import IM_END, StreamDecoder, Tokenizer
from fnlm.tokenizers.plain import Char
from fnlm.tokens import SINKS, Limits, Token, slid, steps
from fnlm.types import Key, Params

__all__ = [
    "Finish",
    "Generation",
    "Text",
    "Token",
    "beginning",
    "complete",
    "encoded",
    "end_ids",
    "generate",
    "stream",
    "turns_of",
]

Finish: TypeAlias = Literal["stop", "length", "cancelled"]


class Generation(NamedTuple):
    """A finished text: without its end, and from the beginning of a stop string on nothing. `ids` are all that were
    drawn, those of a stop string too. `finish`: "stop", "length" (of max_tokens or the context), "cancelled".
    Under speculation so many tokens were drafted, and so many of these were what the model says."""

    text: str
    ids: list[int]
    finish: Finish
    prompt_tokens: int
    drafted: int = 0
    accepted: int = 0


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
    draft: Begin | None = None,
    slide: bool = False,
    keep: int = SINKS,
) -> Iterator[list[Token]]:
    """The rows that still run, one token each, step by step.

    A row's tokens depend on its prompt, the settings and its own key alone: row i of `key` (B, 2), or i folded into
    `key` (2,); `settings.seed` stands for a key. Asked before each step: `cancelled` stops all, `ended` a row. Stop
    strings are the caller's matter. `vocab_size`: ids from there on are never drawn. `draft`: speculate with
    `fnlm.speculate.lookup` or `with_model`, each row by itself. `slide`: a text that has outgrown the context goes on
    from its first `keep` tokens and its newest half, which are read anew: that costs a prompt of seq_len / 2 for each
    further seq_len / 2 - keep tokens. ValueError, before the first step, for a prompt that is empty, too long for the
    context (unless it slides), or not in the vocabulary.
    """
    vocab_size = vocab_size or cfg.vocab_size
    if not prompts:
        raise ValueError("there is no prompt; give at least one")
    for i, prompt in enumerate(prompts):
        _check(i, prompt, cfg, vocab_size, slide)
    if slide:
        _check_slide(cfg, settings, keep)
    key = random.key(settings.seed) if settings.seed is not None else key
    keys = key if key.ndim == 2 else random.fold_in(key, torch.arange(len(prompts)))
    ready = params if isinstance(params, Prepared) else prepare(params, cfg)
    limits = Limits(eot_ids.union(settings.stop_ids), vocab_size, keep if slide else None)
    if draft is None:
        return steps(ready, cfg, prompts, settings, keys, limits, cancelled, ended)
    each = (
        drafted(ready, cfg, i, p, settings, k, limits, draft)
        for i, (p, k) in enumerate(zip(prompts, keys, strict=True))
    )
    return _abreast(list(each), cancelled, ended)


def _abreast(
    rows: list[Iterator[Token]], cancelled: Callable[[], bool], ended: Callable[[int], bool]
) -> Iterator[list[Token]]:
    """A token of each row in turn."""
    running = dict(enumerate(rows))
    while running and not cancelled():
        tokens = [next(row) for row in running.values()]
        yield tokens
        for token in tokens:
            if token.finish or ended(token.row):
                del running[token.row]


def _check_slide(cfg: ModelConfig, settings: Settings, keep: int) -> None:
    slid([0] * cfg.seq_len, cfg.seq_len, keep)
    if settings.max_tokens is None:
        raise ValueError("a text that slides has no end of its own; give it max_tokens")


def _check(i: int, prompt: Sequence[int], cfg: ModelConfig, vocab_size: int, slide: bool) -> None:
    if not prompt:
        raise ValueError(f"prompt {i} is empty; give it at least one token")
    if len(prompt) >= cfg.seq_len and not slide:
        raise ValueError(
            f"the prompt has {len(prompt)} tokens, the model's context only {cfg.seq_len} for prompt and reply; "
            f"shorten it to {cfg.seq_len - 1} at most"
        )
    if not 0 <= min(prompt) <= max(prompt) < vocab_size:
        wrong = next(t for t in prompt if not 0 <= t < vocab_size)
        raise ValueError(f"prompt {i} has id {wrong}, the vocabulary {vocab_size}; was it made with another tokenizer?")


class Text:
    """What becomes of one row's tokens: text, held back while it might be the beginning of a stop string."""

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int], stop: Sequence[str]) -> None:
        self._decoder, self._stop, self._held = StreamDecoder(tokenizer), stop, ""
        self._pieces: list[str] = []
        self._ids: list[int] = []
        self._prompt_tokens = len(prompt)
        self._drafted = self._accepted = 0
        self.finish: Finish | None = None

    def push(self, token: Token) -> str:
        """The text that a token makes certain."""
        self._drafted += token.drafted
        self._accepted += token.guessed
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
        text = "".join(self._pieces)
        return Generation(text, self._ids, self.finish, self._prompt_tokens, self._drafted, self._accepted)


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
    draft: Begin | None = None,
    slide: bool = False,
    keep: int = SINKS,
) -> Generator[str, None, Generation]:
    """The text after a prompt, piece by piece; returns the Generation, whose text is the pieces joined.

    No piece ends within a character or shows a stop string's beginning that might go on. The text ends at
    `end_ids(tokenizer)` and the settings' own. Asks `cancelled` before each token; the rest as for `generate`.
    """
    text = Text(tokenizer, prompt_ids, settings.stop)
    steps = generate(
        params, cfg, [prompt_ids], settings, key, eot_ids=end_ids(tokenizer), vocab_size=tokenizer.vocab_size,
        cancelled=cancelled, ended=lambda row: text.finish is not None, draft=draft, slide=slide, keep=keep,
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
    chat: bool | Dialogue = False,
    *,
    cancelled: Callable[[], bool] = never,
    draft: Begin | None = None,
    slide: bool = False,
    keep: int = SINKS,
) -> list[Generation]:
    """The texts after several prompts, made together; the first is what `stream` says of it with the same key.

    Prompts are texts (`chat`: each the first message of a user, as a Dialogue writes it, else as ChatML) or ids.
    """
    settings = turns_of(settings, chat) if isinstance(chat, Dialogue) else settings
    ids = [encoded(tokenizer, p, chat) if isinstance(p, str) else p for p in prompts]
    texts = [Text(tokenizer, p, settings.stop) for p in ids]
    for tokens in generate(
        params, cfg, ids, settings, key, eot_ids=end_ids(tokenizer), vocab_size=tokenizer.vocab_size,
        cancelled=cancelled, ended=lambda row: texts[row].finish is not None, draft=draft, slide=slide, keep=keep,
    ):  # fmt: skip
        for token in tokens:
            texts[token.row].push(token)
    for text in texts:
        if text.finish is None:
            text.close("cancelled")
    return [text.generation for text in texts]


def encoded(tokenizer: Tokenizer, text: str, chat: bool | Dialogue = False) -> list[int]:
    """The ids of a prompt; `chat`: of a user's message, up to the reply, as a Dialogue writes it, else as ChatML. An
    empty text begins a document.

    ValueError for characters that the tokenizer does not know, with all of them.
    """
    if isinstance(tokenizer, Char):
        unknown = sorted(set(text) - set(tokenizer.characters))
        if unknown:
            some = ", ".join(f"{c!r} (U+{ord(c):04X})" for c in unknown[:10]) + (", ..." if len(unknown) > 10 else "")
            known = len(tokenizer.characters)
            raise ValueError(f"the model's tokenizer knows {known} characters, but not {some}; leave them out")
    if chat:
        dialogue = chat if isinstance(chat, Dialogue) else Dialogue(tokenizer)
        return dialogue.prompt([{"role": "user", "content": text}])
    return [*tokenizer.prefix, *tokenizer.encode(text)] or beginning(tokenizer)


def beginning(tokenizer: Tokenizer) -> list[int]:
    """What stands before a document: the tokenizer's prefix, or the end of another; else a newline, or id 0."""
    if tokenizer.prefix:
        return list(tokenizer.prefix)
    if tokenizer.eot_id is not None:
        return [tokenizer.eot_id]
    return [tokenizer.table.index(b"\n") if b"\n" in tokenizer.table else 0]


def turns_of(settings: Settings, dialogue: Dialogue) -> Settings:
    """The settings, with what ends a turn of these conversations."""
    ids = (*settings.stop_ids, *sorted(dialogue.ends.difference(settings.stop_ids)))
    return replace(settings, stop_ids=ids, stop=(*settings.stop, *dialogue.stop))


def end_ids(tokenizer: Tokenizer) -> frozenset[int]:
    """The ids that end a text or a turn: those of <|endoftext|> (or its like) and <|im_end|> that there are."""
    return frozenset(i for i in (tokenizer.eot_id, tokenizer.special.get(IM_END)) if i is not None)
