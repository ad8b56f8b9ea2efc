"""The routes that write: a request read, submitted, and answered whole or as a stream."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any, NamedTuple

from flask import Blueprint, Response, g, jsonify, request

from webui import openai, shapes
from webui.engine import Engine
from webui.jobs import Busy, Job, Refused, Stopped, Ticket
from webui.openai import ApiError
from webui.replies import Answer, Gone, refusal
from webui.shapes import Shape, Told

HUNG_UP = 499  # nobody reads it; the log does
log = logging.getLogger("fnlm.serve")


class Kind(NamedTuple):
    """How one route reads and answers."""

    read: Callable[..., list[Job]]
    chunk: Shape
    choice: Shape
    told: Told
    name: str
    chunk_name: str


CHAT = Kind(
    openai.chat_jobs, shapes.chat_chunk, shapes.chat_choice, shapes.chat_logprobs,
    "chat.completion", "chat.completion.chunk",
)  # fmt: skip
TEXT = Kind(
    openai.completion_jobs, shapes.text_choice, shapes.text_choice, shapes.text_logprobs,
    "text_completion", "text_completion",
)  # fmt: skip


def routes(engine: Engine) -> Blueprint:
    """/v1/chat/completions and /v1/completions, written by this engine."""
    blueprint = Blueprint("completions", __name__)

    @blueprint.post("/v1/chat/completions")
    def chat() -> Response:
        return _answer(engine, CHAT)

    @blueprint.post("/v1/completions")
    def completions() -> Response:
        return _answer(engine, TEXT)

    return blueprint


def body_of() -> dict[str, Any]:
    """The request's JSON, sent as such: what another site's page cannot do unasked."""
    if request.mimetype != "application/json":
        raise ApiError(415, "send the header Content-Type: application/json")
    return openai.parsed(request.get_data())


def _answer(engine: Engine, kind: Kind) -> Response:
    body = body_of()
    jobs = kind.read(body, engine.models.about(body.get("model")))
    stream, echo = openai.flag(body, "stream"), openai.flag(body, "echo") and kind is TEXT
    options = body.get("stream_options") or {}
    if not isinstance(options, dict):
        raise openai.wrong("stream_options", "an object")
    with_usage = openai.flag(options, "include_usage")
    gone = request.environ.get("waitress.client_disconnected", lambda: False)
    ticket = _submitted(engine, jobs)
    answer = Answer(
        jobs, ticket, kind.chunk if stream else kind.choice, kind.chunk_name if stream else kind.name, gone,
        kind.told, engine.models.reader(jobs[0].model).tokenizer, _logged(g.id, time.perf_counter()),
    )  # fmt: skip
    try:
        if stream:
            lines = answer.streamed(with_usage, echo)
            response = Response(lines, mimetype="text/event-stream", headers={"X-Accel-Buffering": "no"})
            response.call_on_close(ticket.cancel)  # also where not one line was asked for
            return response
        return jsonify(answer.whole(echo))
    except Gone:
        return Response(status=HUNG_UP)


def _logged(request_id: str, began: float) -> Callable[[Answer], None]:
    """What writes a line when an answer is over."""

    def line(answer: Answer) -> None:
        ends = ",".join(answer.ends.get(i, "gone") for i in range(len(answer.jobs)))
        seconds = time.perf_counter() - began
        log.info(
            "%s %r read %d wrote %d %s %.3f s",
            request_id, answer.jobs[0].model, answer.read, answer.written, ends, seconds,
        )  # fmt: skip

    return line


def _submitted(engine: Engine, jobs: list[Job]) -> Ticket:
    try:
        ticket: Ticket = engine.submit(jobs)
    except Busy as busy:
        raise ApiError(429, str(busy), code="queue_full", retry=busy.seconds) from None
    except Stopped as stopped:
        raise ApiError(503, str(stopped)) from None
    except Refused as refused:
        raise refusal(refused.failure) from None
    return ticket
