"""Data that have a name and need no files: `demo` is the text of `fnlm.world`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any

from fnlm import world
from fnlm.data.prepare import Preparation
from fnlm.data.sources import Written

NAMES = ("demo",)
STORIES, CHATS, VAL, LEARNT_FROM = 60_000, 30_000, 2_000, 4_000
TOKENIZER = "bpe:657"  # as many as give every word of the world, with and without a space before it, one token


def named(name: str, out: Path, documents: int | None = None, **settings: Any) -> list[Preparation]:
    """What to prepare for a name: into `out` stories to pretrain on, into `out`-chat conversations to finetune on.

    There are `documents` stories and half as many conversations, and both have the tokenizer that the first was trained
    with. `settings` are fields of Preparation. Raises ValueError for fewer than 1 document, and an unknown name.
    """
    if name not in NAMES:
        raise ValueError(f"there are no data called {name!r}; known: {', '.join(NAMES)}")
    if documents is not None and documents < 1:
        raise ValueError(f"documents={documents} must be at least 1")
    stories, chats = (STORIES, CHATS) if documents is None else (documents, -(-documents // 2))
    first = Preparation((), out, **{"tokenizer": TOKENIZER, **settings}, written=_written("text", "stories", stories))
    written = _written("chat", "chats", chats)
    return [first, Preparation((), chat_folder(out), **{**settings, "tokenizer": str(out)}, written=written)]


def chat_folder(out: Path) -> Path:
    """Where the conversations go."""
    return out.with_name(f"{out.name}-chat")


def _written(kind: str, what: str, n: int) -> Written:
    """Training text from seed 0, validation text, a tenth at most, from seed 1."""
    write: Callable[[int, int], Iterator[Any]] = getattr(world, what)
    val = min(VAL, -(-n // 10))
    few = list(islice(write(0, n), 200))
    size = sum(len(text) for one in few for text in ([one] if kind == "text" else [m["content"] for m in one]))
    sources = [{"path": f"fnlm.world {what} seed={seed} n={count}"} for seed, count in ((0, n), (1, val))]
    return Written(
        kind, partial(write, 0, n), partial(write, 1, val), _learnt_from, size * (n + val) // len(few), sources
    )


def _learnt_from() -> Iterator[str]:
    """Stories and chats, enough that every word occurs, whichever of them is prepared."""
    said = (f"{m['role']}\n{m['content']}" for chat in world.chats(0, LEARNT_FROM) for m in chat)
    return chain(world.stories(0, LEARNT_FROM), said)
