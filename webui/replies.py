"""From the events of a ticket to what goes over HTTP: one JSON object, or server-sent events as they come."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from fnlm.tokenizers import Tokenizer
from webui.jobs import Event, Failure, Job, Ticket
from webui.openai import ApiError
from webui.shapes import Shape, Told, usage
from webui.writing import Piece, Scored

POLL = 0.05  # seconds between looks at whether the client is still there
HEARTBEAT = 10.0  # seconds of silence after which a comment is sent, lest a proxy hangs up


class Gone(Exception):
    """The client hung up."""


@dataclass
class Answer:
    """The answer to one request, which may have several choices: `jobs` as they were submitted for `ticket`.

    `told` shapes log-probabilities, `tokenizer` spells them. `closed(self)` is called when it is over."""

    jobs: list[Job]
    ticket: Ticket
    shape: Shape
    kind: str
    gone: Callable[[], bool]
    told: Told
    tokenizer: Tokenizer
    closed: Callable[[Answer], None] = lambda _: None
    id: str = ""
    created: int = field(default_factory=lambda: int(time.time()))
    read: int = 0
    written: int = 0
    dropped: int = 0
    step: int = 0
    ends: dict[int, str] = field(default_factory=dict)
    _letters: dict[int, int] = field(default_factory=dict)
    _unended: dict[int, int] = field(default_factory=dict)  # tokens of choices that have not ended

    def __post_init__(self) -> None:
        self.id = self.id or f"{'chatcmpl' if self.kind.startswith('chat') else 'cmpl'}-{secrets.token_hex(12)}"

    def events(self, beats: bool = False) -> Iterator[Event | None]:
        """All events in order, and None (if `beats`) where nothing came for long. Raises Gone; leaving it cancels."""
        missing, heard = len(self.jobs), time.monotonic()
        try:
            while missing:
                event = self.ticket.get(POLL)
                if self.gone():
                    raise Gone
                if event is not None:
                    heard = time.monotonic()
                    self._note(event)
                    missing -= event.kind in ("end", "error")
                    yield event
                elif beats and time.monotonic() - heard > HEARTBEAT:
                    heard = time.monotonic()
                    yield None
        finally:
            self.ticket.cancel()
            self.written += sum(self._unended.values())
            self.closed(self)

    def _note(self, event: Event) -> None:
        if event.kind == "start":
            self.step, self.dropped = event.value.step, event.value.dropped
            before = self.jobs[event.job - 1] if event.job else None
            job = self.jobs[event.job]
            if before is None or before.prompt is not job.prompt:  # n choices read their prompt once
                self.read += event.value.prompt_tokens
        elif event.kind == "text":
            self._unended[event.job] = event.value.written
        elif event.kind == "end":
            self._unended.pop(event.job, None)
            self.written += len(event.value.ids)
            self.ends[event.job] = event.value.finish
        elif event.kind == "error":
            self.ends[event.job] = "error"

    def frame(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        """What is around choices."""
        body = {"id": self.id, "object": self.kind, "created": self.created, "model": self.jobs[0].model}
        return {**body, "choices": choices, "system_fingerprint": f"step-{self.step}"}

    def ours(self) -> dict[str, Any]:
        """What OpenAI's schema has no place for: `dropped` messages did not fit; the seed that gives the same again."""
        return {"fnlm": {"dropped": self.dropped, "seed": self.jobs[0].seed, "step": self.step}}

    def scores(self, i: int, tokens: Sequence[Scored]) -> dict[str, Any] | None:
        """The log-probabilities of choice i's next tokens, if they were asked for."""
        if self.jobs[i].top is None:
            return None
        begin = self._letters.get(i, 0)
        self._letters[i] = begin + len(self.tokenizer.decode([t.id for t in tokens]))
        return self.told(tokens, self.tokenizer, begin)

    def whole(self, echo: bool = False) -> dict[str, Any]:
        """The answer as one object. Raises ApiError where a choice failed."""
        texts, tokens = [""] * len(self.jobs), [list[Scored]() for _ in self.jobs]
        for event in self.events():
            assert event is not None
            if event.kind == "error":
                raise refusal(event.value)
            if event.kind == "text":
                texts[event.job] += event.value.text
                tokens[event.job] += event.value.tokens
        if echo:
            texts = [self._prompt(job) + t for job, t in zip(self.jobs, texts, strict=True)]
        choices = [self.shape(i, t, self.ends[i], self.scores(i, tokens[i])) for i, t in enumerate(texts)]
        return {**self.frame(choices), "usage": usage(self.read, self.written), **self.ours()}

    def _prompt(self, job: Job) -> str:
        """What stands before the reply where it is repeated; with log-probabilities the engine says it."""
        if job.scored:
            return ""
        return job.prompt if isinstance(job.prompt, str) else self.tokenizer.decode(job.prompt)

    def streamed(self, with_usage: bool = False, echo: bool = False) -> Iterator[str]:
        """The answer as server-sent events. Raises ApiError instead of yielding anything where it fails at once."""
        events = self.events(beats=True)
        first = next(e for e in events if e is not None)  # the headers wait for it: it may still be an error
        if first.kind == "error":
            events.close()  # type: ignore[attr-defined]
            raise refusal(first.value)
        return self._lines(first, events, with_usage, echo)

    def _lines(self, first: Event, events: Iterator[Event | None], with_usage: bool, echo: bool) -> Iterator[str]:
        try:
            yield from self._said(first, echo)
            for event in events:
                yield from [": waiting\n\n"] if event is None else self._said(event, echo)
        except Gone:
            return
        finally:
            events.close()  # type: ignore[attr-defined]
        if with_usage:
            yield line({**self.frame([]), "usage": usage(self.read, self.written), **self.ours()})
        yield "data: [DONE]\n\n"

    def _said(self, event: Event, echo: bool) -> Iterator[str]:
        i, job, none = event.job, self.jobs[event.job], None
        if event.kind == "error":
            yield line(refusal(event.value).body())
        elif event.kind == "end":
            yield line(self.frame([self.shape(i, None, event.value.finish, none)]))
        elif event.kind == "text":
            piece: Piece = event.value
            yield line(self.frame([self.shape(i, piece.text, None, self.scores(i, piece.tokens))]))
        else:
            prompt = self._prompt(job) if echo else ""
            begin = self.shape(i, None if job.messages is not None else prompt, None, none)
            yield line({**self.frame([begin]), **self.ours()})


def line(body: dict[str, Any]) -> str:
    """One server-sent event; JSON has no raw newline, so it is one line."""
    return f"data: {json.dumps(body, ensure_ascii=False, separators=(',', ':'))}\n\n"


def refusal(failure: Failure) -> ApiError:
    """A failure of the engine as an answer: the client's to mend (400, 404), or ours (500, 503)."""
    if failure.param is not None:
        status = 404 if failure.code == "model_not_found" else 400
        return ApiError(status, failure.message, failure.param, failure.code)
    return ApiError(503 if "stopping" in failure.message else 500, failure.message)
