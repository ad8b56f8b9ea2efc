"""The engine: one thread that owns the models and writes all replies, a token of each in turn.

Others only `submit` jobs and read the events of the ticket they get. A reply is a generator of text with a cache of its
own, so replies do not see each other; a cancelled one is left before its next token.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from fnlm import random
from fnlm.checkpoint import CheckpointError
from fnlm.generate import Generation, stream
from fnlm.sampling import Settings
from webui.models import Loaded, Models
from webui.prompts import Messages, TooLong, chat_ids, text_ids

Kind = Literal["start", "text", "end", "error"]
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Job:
    """What to write: after a conversation (`messages`), or after a text or ids (`prompt`), of which `truncate`
    leaves out the beginning where it is too long. `settings` are those of fnlm.sampling.Settings."""

    model: str
    messages: Messages | None = None
    prompt: str | Sequence[int] = ""
    truncate: bool = False
    settings: dict[str, Any] = field(default_factory=dict)
    seed: int = 0


class Start(NamedTuple):
    """What is known when a reply begins; `dropped` is how many of the oldest messages, or of a text's first
    tokens, did not fit."""

    prompt_tokens: int
    dropped: int
    step: int


class Event(NamedTuple):
    """A Start, a text, a Generation or a Failure, by `kind`; `job` counts those of a ticket."""

    job: int
    kind: Kind
    value: Any


class Failure(NamedTuple):
    """Why a reply did not begin or broke off. `param` names what the user can change; None: it is our fault."""

    message: str
    param: str | None = None
    code: str | None = None


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


Text = Generator[str, None, Generation]


@dataclass
class _Reply:
    job: Job
    ticket: Ticket
    index: int
    text: Text | None = None
    prompt_tokens: int = 0
    begun: float = 0.0

    def say(self, kind: Kind, value: Any) -> None:
        self.ticket.put(Event(self.index, kind, value))


class Engine:
    """Writes at most `streams` replies at once, and lets at most `waiting` more (default: as many) wait for a place."""

    def __init__(
        self, models: Models, streams: int = 32, waiting: int | None = None, write: Callable[..., Any] = stream
    ):
        self.models, self.streams = models, streams
        self.most_waiting = streams if waiting is None else waiting
        self._write = write
        self._change = threading.Condition()
        self._waiting: deque[_Reply] = deque()
        self._active: list[_Reply] = []
        self._wanted: list[str] = []
        self._stopping = False
        self._pace = 2.0  # seconds a reply takes, of late
        self.ready = threading.Event()  # set while no model is being loaded ahead
        self.ready.set()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> Engine:
        self._thread.start()
        return self

    def warm(self, name: str) -> None:
        """Load a model before anyone asks for it."""
        self.ready.clear()
        with self._change:
            self._wanted.append(name)
            self._change.notify()

    def submit(self, jobs: Sequence[Job]) -> Ticket:
        """Take the jobs on. Raises Busy when the queue has no room for all of them, Stopped after `stop`."""
        ticket = Ticket()
        with self._change:
            if self._stopping:
                raise Stopped("the server is stopping")
            free = self.streams + self.most_waiting - len(self._active) - len(self._waiting)
            if len(jobs) > free:
                raise Busy(max(1, round(self._pace * max(1, len(self._waiting)) / self.streams)))
            self._waiting.extend(_Reply(job, ticket, i) for i, job in enumerate(jobs))
            self._change.notify()
        return ticket

    def stop(self, timeout: float = 5.0) -> None:
        """End every reply, with a reason, and the thread."""
        with self._change:
            self._stopping = True
            self._change.notify()
        if self._thread.is_alive() and threading.current_thread() is not self._thread:
            self._thread.join(timeout)

    def load(self) -> dict[str, int]:
        """How many replies are being written, and how many wait."""
        with self._change:
            return {"active": len(self._active), "waiting": len(self._waiting)}

    def _run(self) -> None:
        while self._admit():
            for reply in list(self._active):
                if self._stopping:
                    break
                self._advance(reply)
        for reply in [*self._active, *self._waiting]:
            if reply.text is not None:
                reply.text.close()
            reply.say("error", Failure("the server is stopping"))
        self._active.clear()
        self._waiting.clear()

    def _admit(self) -> bool:
        """Wait until there is work, and give the first that waits a place if there is one; False: stop."""
        with self._change:
            while not (self._active or self._waiting or self._wanted or self._stopping):
                self._change.wait()
            if self._stopping:
                return False
            wanted, self._wanted = self._wanted, []
            if self._waiting and len(self._active) < self.streams:
                self._active.append(self._waiting.popleft())
        for name in wanted:
            self._load_ahead(name)
        return True

    def _load_ahead(self, name: str) -> None:
        try:
            self.models.get(name)
        except (ValueError, KeyError, OSError) as error:
            log.warning("%s cannot be loaded: %s", name, error)
        finally:
            self.ready.set()

    def _advance(self, reply: _Reply) -> None:
        """The next piece of one reply, and what to say when that was the last or fails."""
        try:
            if reply.ticket.is_cancelled():
                return self._cancel(reply)
            if reply.text is None:
                self._begin(reply)
            assert reply.text is not None
            reply.say("text", next(reply.text))
        except StopIteration as done:
            self._end(reply, done.value)
        except TooLong as error:
            where = "prompt" if reply.job.messages is None else "messages"
            self._end(reply, Failure(str(error), where, "context_length_exceeded"))
        except KeyError:
            self._end(reply, Failure(f"there is no model {reply.job.model!r} any more", "model", "model_not_found"))
        except (CheckpointError, OSError):
            log.exception("%s cannot be loaded", reply.job.model)
            self._end(reply, Failure(f"{reply.job.model} cannot be loaded; the server's log says why"))
        except ValueError as error:
            self._end(reply, Failure(str(error), "prompt" if reply.job.messages is None else "messages"))
        except Exception:
            log.exception("a reply of %s broke off", reply.job.model)
            self._end(reply, Failure("the reply broke off; the server's log says why"))

    def _begin(self, reply: _Reply) -> None:
        """Load the model, read the prompt, and say so; no token is written yet."""
        reply.begun = time.monotonic()
        job, model = reply.job, self.models.get(reply.job.model)
        settings, dropped = dict(job.settings), 0
        if job.messages is None:
            ids, dropped = text_ids(model, job.prompt, job.truncate)
        else:
            ids, dropped = chat_ids(model, job.messages, settings.get("max_tokens"))
        reply.prompt_tokens = len(ids)
        wanted = _within(settings, model, len(ids))
        key = random.key(job.seed % (1 << 64))
        cancelled = reply.ticket.is_cancelled
        reply.text = self._write(model.weights, model.cfg, model.tokenizer, ids, wanted, key, cancelled=cancelled)
        reply.say("start", Start(len(ids), dropped, model.step))

    def _cancel(self, reply: _Reply) -> None:
        if reply.text is not None:
            reply.text.close()
        self._end(reply, Generation("", [], "cancelled", reply.prompt_tokens))

    def _end(self, reply: _Reply, outcome: Generation | Failure) -> None:
        """Free the place first, so that who hears of the end finds it free."""
        with self._change:
            self._active.remove(reply)
        if reply.begun:
            self._pace += 0.2 * (time.monotonic() - reply.begun - self._pace)
        reply.say("error" if isinstance(outcome, Failure) else "end", outcome)


def _within(settings: dict[str, Any], model: Loaded, read: int) -> Settings:
    """The settings, with as many tokens as the context still has room for at most."""
    most = min(settings.get("max_tokens") or model.cfg.seq_len, model.cfg.seq_len - read)
    least = min(settings.get("min_tokens", 0), most)
    if settings.get("top_k"):
        settings["top_k"] = min(settings["top_k"], model.tokenizer.vocab_size)
    wrong = [i for i in settings.get("logit_bias", {}) if i >= model.tokenizer.vocab_size]
    if wrong:
        raise ValueError(f"logit_bias names token {wrong[0]}; the vocabulary has {model.tokenizer.vocab_size}")
    return Settings(**{**settings, "max_tokens": most, "min_tokens": least})
