"""What the engine is asked for and what it says: jobs, their tickets, and the events that a ticket gets."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from fnlm.generate import turns_of
from fnlm.sampling import Settings
from fnlm.tokens import SINKS
from webui.guesses import Guess
from webui.models import Reader
from webui.prompts import Messages, TooLong, chat_ids, instructions, text_ids
from webui.writing import Writer

Kind = Literal["start", "text", "end", "error"]


@dataclass(frozen=True)
class Job:
    """What to write: after a conversation (`messages`), or after a text or ids (`prompt`), of which `truncate`
    leaves out the beginning where it is too long. `settings` are those of fnlm.sampling.Settings; `top`: how many
    likeliest tokens to tell with each, None for no log-probabilities; `scored`: of the prompt's own tokens too, before
    those that are written, `only`: instead of them. `slide`: past the context's end the text goes on from its first
    `keep` tokens (None: the instructions and some) and its newest half."""

    model: str
    messages: Messages | None = None
    prompt: str | Sequence[int] = ""
    truncate: bool = False
    settings: dict[str, Any] = field(default_factory=dict)
    seed: int = 0
    top: int | None = None
    scored: bool = False
    only: bool = False
    slide: bool = False
    keep: int | None = None


class Start(NamedTuple):
    """What is known when a reply begins; `dropped` is how many of the oldest messages, or of a text's first
    tokens, did not fit."""

    prompt_tokens: int
    dropped: int
    step: int


class Event(NamedTuple):
    """A Start, a Piece, a Generation or a Failure, by `kind`; `job` counts those of a ticket."""

    job: int
    kind: Kind
    value: Any


class Failure(NamedTuple):
    """Why a reply did not begin or broke off. `param` names what the user can change; None: it is our fault."""

    message: str
    param: str | None = None
    code: str | None = None


class Refused(ValueError):
    """A job that cannot be done, for a reason that its author can mend."""

    def __init__(self, failure: Failure):
        super().__init__(failure.message)
        self.failure = failure


class Busy(RuntimeError):
    """The queue is full; try again in `seconds`."""

    def __init__(self, seconds: int):
        super().__init__(f"all places are taken; try again in {seconds} s")
        self.seconds = seconds


class Stopped(RuntimeError):
    """The engine takes no more jobs."""


class Ticket:
    """The replies to jobs that were submitted together: their events, and the way to end them."""

    def __init__(self) -> None:
        self._events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self._cancelled = threading.Event()

    def cancel(self) -> None:
        """Write no further token. The last event is still an `end`."""
        self._cancelled.set()

    def is_cancelled(self) -> bool:
        return self._cancelled.is_set()

    def put(self, event: Event) -> None:
        self._events.put(event)

    def get(self, timeout: float | None = None) -> Event | None:
        """The next event; None if there is none within `timeout` seconds."""
        try:
            return self._events.get(timeout=timeout)
        except queue.Empty:
            return None


@dataclass(eq=False)
class Reply:
    """A job on its way: read (`ids`), then written."""

    job: Job
    ticket: Ticket
    index: int
    ids: list[int]
    dropped: int
    settings: Settings
    keep: int | None = None  # None: it ends where the context does
    asked: float = field(default_factory=time.monotonic)
    begun: float = 0.0
    writer: Writer | None = None
    guess: Guess | None = None

    @property
    def lead(self) -> int:
        """How many of its ids stand before the text that was given."""
        if not isinstance(self.job.prompt, str) or self.dropped:
            return 0
        return len(self.writer.tokenizer.prefix) if self.writer and self.job.prompt else len(self.ids)

    def say(self, kind: Kind, value: Any) -> None:
        self.ticket.put(Event(self.index, kind, value))


def read(job: Job, reader: Reader, ticket: Ticket, index: int, most: int | None = None) -> Reply:
    """A job's prompt as ids and its settings as they will hold; `most`: tokens of a text that slides. Raises
    Refused."""
    field_name = "prompt" if job.messages is None else "messages"
    try:
        if job.messages is None:
            ids, dropped = text_ids(reader, job.prompt, job.truncate)
        else:
            ids, dropped = chat_ids(reader, job.messages, job.settings.get("max_tokens"))
        keep = kept(reader, job) if job.slide else None
        settings = within(job.settings, reader, len(ids), job.slide, most)
        if job.messages is not None:
            settings = turns_of(settings, reader.dialogue)
        return Reply(job, ticket, index, ids, dropped, settings, keep)
    except Refused:
        raise
    except TooLong as error:
        raise Refused(Failure(str(error), field_name, "context_length_exceeded")) from None
    except ValueError as error:
        raise Refused(Failure(str(error), field_name)) from None


def kept(reader: Reader, job: Job) -> int:
    """How many first tokens a text keeps when it slides. Raises Refused."""
    most = reader.context - 1 - reader.context // 2
    if job.keep is not None and job.keep > most:
        raise Refused(
            Failure(f"slide_keep must be at most {most}, less than half of the model's context", "slide_keep")
        )
    if job.keep is not None:
        return job.keep
    return min(most, SINKS + (instructions(reader, job.messages) if job.messages else 0))


def within(
    settings: dict[str, Any], reader: Reader, length: int, slide: bool = False, limit: int | None = None
) -> Settings:
    """The settings, with as many tokens as the context still has room for at most, or, of a text that slides, `limit`.
    Raises Refused."""
    size, settings = reader.tokenizer.vocab_size, dict(settings)
    most = settings.get("max_tokens") or min(reader.context, limit or reader.context)
    if not slide:
        most = min(most, reader.context - length)
    elif limit is not None and most > limit:
        message = f"max_tokens={most} is more than the {limit} that this server writes of a text that slides"
        raise Refused(Failure(f"{message}; ask for {limit} at most", "max_tokens"))
    least = min(settings.get("min_tokens", 0), most)
    if settings.get("top_k"):
        settings["top_k"] = min(settings["top_k"], size)
    for name, field_name in (("logit_bias", "logit_bias"), ("stop_ids", "stop_token_ids")):
        wrong = [i for i in settings.get(name, ()) if i >= size]
        if wrong:
            message = f"{field_name} names token {wrong[0]}; the vocabulary has {size}"
            raise Refused(Failure(message, field_name))
    return Settings(**{**settings, "max_tokens": most, "min_tokens": least})
