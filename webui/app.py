"""The Flask app: routes, errors as OpenAI's object, and the headers that keep a page with untrusted text harmless."""

from __future__ import annotations

import hmac
import ipaddress
import secrets
from collections.abc import Callable
from typing import Any

from flask import Flask, Response, g, jsonify, render_template, request
from werkzeug.exceptions import HTTPException

from webui import markdown, openai
from webui.engine import Busy, Engine, Job, Stopped
from webui.openai import ApiError, Shape
from webui.replies import Answer, Gone

BODY_LIMIT = 1 << 20
OPEN = ("/", "/health")  # answered without a key, as is /static/
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), geolocation=(), microphone=()",
}
HUNG_UP = 499  # nobody reads it; the log does


def create_app(engine: Engine, api_key: str | None = None, local: bool = True) -> Flask:
    """The app around an engine that is running. `local`: the server is bound to this machine only."""
    app = Flask("webui")
    app.config["MAX_CONTENT_LENGTH"] = BODY_LIMIT
    app.json.sort_keys = False  # type: ignore[attr-defined]
    _guard(app, api_key, local)
    _pages(app, engine, api_key)
    _api(app, engine)
    app.register_blueprint(markdown.blueprint)
    return app


def _guard(app: Flask, api_key: str | None, local: bool) -> None:
    """Who may ask, and what every answer carries."""

    @app.before_request
    def admit() -> None:
        g.id = secrets.token_hex(8)
        if api_key is None:
            if local and not is_local(request.headers.get("Host", "")):
                raise ApiError(403, "this server is for this machine; to use it under another name, give it --api-key")
        elif request.path not in OPEN and not request.path.startswith("/static/"):
            given = request.headers.get("Authorization", "").removeprefix("Bearer ").strip()
            if not hmac.compare_digest(given.encode("latin-1", "replace"), api_key.encode()):
                raise ApiError(401, "the API key is missing or wrong; send it as Authorization: Bearer KEY")

    @app.after_request
    def armed(response: Response) -> Response:
        response.headers.update(HEADERS)
        response.headers["X-Request-Id"] = g.get("id", "")
        response.headers["Cache-Control"] = "no-cache" if request.path.startswith("/static/") else "no-store"
        return response

    @app.errorhandler(ApiError)
    def refused(error: ApiError) -> Response:
        response = jsonify(error.body())
        response.status_code = error.status
        if error.status == 401:
            response.headers["WWW-Authenticate"] = "Bearer"
        if error.retry is not None:
            response.headers["Retry-After"] = str(error.retry)
        return response

    @app.errorhandler(HTTPException)
    def no_such(error: HTTPException) -> Response:
        messages = {
            404: f"there is no {request.path[:200]}; see /v1/models, /v1/chat/completions, /v1/completions, /health",
            405: f"{request.path[:200]} does not take {request.method}",
            413: f"the request is larger than {BODY_LIMIT:,} bytes",
            500: "the request failed; the server's log says why",
        }
        status = error.code or 500
        response = refused(ApiError(status, messages.get(status, error.description or "refused")))
        if status == 405:
            response.headers["Allow"] = ", ".join(getattr(error, "valid_methods", None) or ())
        return response


def is_local(host: str) -> bool:
    """Whether a Host header names this machine by address or as localhost: a page elsewhere cannot make it so."""
    name = host.rpartition(":")[0] if host.rpartition(":")[2].isdigit() else host
    if name in ("localhost", ""):
        return True
    try:
        ipaddress.ip_address(name.strip("[]"))
    except ValueError:
        return name.endswith(".localhost")
    return True


def _pages(app: Flask, engine: Engine, api_key: str | None) -> None:
    @app.get("/")
    def page() -> str:
        return render_template("page.html", needs_key=api_key is not None)

    @app.get("/health")
    def health() -> tuple[Response, int]:
        ready = engine.ready.is_set()
        status = {"status": "ok" if ready else "loading", "models": len(engine.models.paths()), **engine.load()}
        return jsonify(status), 200 if ready else 503

    @app.get("/v1/models")
    def models() -> Response:
        about = engine.models.about().values()
        return jsonify({"object": "list", "data": [openai.model_object(a) for a in about]})

    @app.get("/v1/models/<path:name>")
    def model(name: str) -> Response:
        return jsonify(openai.model_object(openai.model_of({"model": name}, engine.models.about())))


def _api(app: Flask, engine: Engine) -> None:
    @app.post("/v1/chat/completions")
    def chat() -> Response:
        return _answer(engine, openai.chat_jobs, openai.chat_chunk, openai.chat_choice, "chat.completion")

    @app.post("/v1/completions")
    def completions() -> Response:
        return _answer(engine, openai.completion_jobs, openai.text_choice, openai.text_choice, "text_completion")


def _answer(engine: Engine, read: Callable[..., list[Job]], chunk: Shape, choice: Shape, kind: str) -> Response:
    """Read the request, submit it, and answer it whole or as a stream."""
    if request.mimetype != "application/json":  # what another site's page cannot send unasked
        raise ApiError(415, "send the header Content-Type: application/json")
    body = openai.parsed(request.get_data())
    jobs = read(body, engine.models.about())
    stream, echo = openai.flag(body, "stream"), openai.flag(body, "echo") and kind == "text_completion"
    options = body.get("stream_options") or {}
    if not isinstance(options, dict):
        raise openai.wrong("stream_options", "an object")
    with_usage = openai.flag(options, "include_usage")
    if stream and kind == "chat.completion":
        kind = "chat.completion.chunk"
    gone = request.environ.get("waitress.client_disconnected", lambda: False)
    answer = Answer(jobs, _submitted(engine, jobs), chunk if stream else choice, kind, gone)
    try:
        if stream:
            lines = answer.streamed(with_usage, echo)
            response = Response(lines, mimetype="text/event-stream", headers={"X-Accel-Buffering": "no"})
            response.call_on_close(answer.ticket.cancel)  # also where not one line was asked for
            return response
        return jsonify(answer.whole(echo))
    except Gone:
        return Response(status=HUNG_UP)


def _submitted(engine: Engine, jobs: list[Job]) -> Any:
    try:
        return engine.submit(jobs)
    except Busy as busy:
        raise ApiError(429, str(busy), code="queue_full", retry=busy.seconds) from None
    except Stopped as stopped:
        raise ApiError(503, str(stopped)) from None
