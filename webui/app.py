"""The Flask app: routes, errors as OpenAI's object, and the headers that keep a page with untrusted text harmless."""

from __future__ import annotations

import hmac
import ipaddress
import logging
import secrets
import time
from typing import Any

from flask import Flask, Response, g, jsonify, render_template, request
from werkzeug.exceptions import HTTPException

from webui import completions, follow, markdown, openai, openapi, texts
from webui.engine import Engine
from webui.follow import Runs
from webui.metrics import TYPE
from webui.models import About
from webui.openai import ApiError
from webui.shapes import model_object

BODY_LIMIT = 1 << 20
OPEN = ("/", "/run", "/health")  # answered without a key, as is /static/
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
log = logging.getLogger("fnlm.serve")


def create_app(engine: Engine, api_key: str | None = None, local: bool = True, runs: Runs | None = None) -> Flask:
    """The app around an engine that is running. `local`: the server is bound to this machine only; `runs`: those that
    have a page, the runs among its models if none are given."""
    app = Flask("webui")
    app.config["MAX_CONTENT_LENGTH"] = BODY_LIMIT
    app.json.sort_keys = False  # type: ignore[attr-defined]
    _guard(app, api_key, local)
    _errors(app)
    _count(app, engine)
    _pages(app, engine)
    for blueprint in (
        follow.routes(runs or Runs(engine.models)),
        completions.routes(engine),
        texts.routes(engine),
        markdown.blueprint,
        openapi.routes(),
    ):
        app.register_blueprint(blueprint)
    return app


def _guard(app: Flask, api_key: str | None, local: bool) -> None:
    """Who may ask, and what every answer carries."""

    @app.before_request
    def admit() -> None:
        g.id, g.began = secrets.token_hex(8), time.perf_counter()
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


def _count(app: Flask, engine: Engine) -> None:
    """A line in the log for each request, without a word of what was asked, and a count of it."""

    @app.after_request
    def noted(response: Response) -> Response:
        rule = str(request.url_rule or "none")
        engine.metrics.add("fnlm_requests_total", route=rule, status=response.status_code)
        if response.status_code >= 400:
            seconds = time.perf_counter() - g.get("began", time.perf_counter())
            log.info("%s %s %s %d %.3f s", g.get("id", ""), request.method, rule, response.status_code, seconds)
        return response


def _errors(app: Flask) -> None:
    """All of them as OpenAI's object."""

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


def _pages(app: Flask, engine: Engine) -> None:
    @app.get("/")
    def page() -> str:
        return render_template("page.html")

    @app.get("/run")
    def run() -> str:
        return render_template("run.html")

    @app.get("/health")
    def health() -> tuple[Response, int]:
        ready = engine.ready.is_set()
        status = {"status": "ok" if ready else "loading", "models": len(engine.models.paths()), **engine.load()}
        return jsonify(status), 200 if ready else 503

    @app.get("/metrics")
    def metrics() -> Response:
        load = engine.load()
        gauges: dict[str, tuple[float, str]] = {
            "fnlm_replies_active": (load["active"], "Replies that are being written."),
            "fnlm_replies_waiting": (load["waiting"], "Replies that wait for a place."),
            "fnlm_replies_most": (engine.streams, "Replies that can be written at once."),
        }
        return Response(engine.metrics.text(gauges), content_type=TYPE)

    def told(about: About) -> dict[str, Any]:
        """A model, whether it has a page as a run, and the checkpoints that can be asked for as NAME@STEP."""
        found = model_object(about)
        try:
            kept = sorted(engine.models.saved(about.name), key=lambda a: a.step)
            run = follow.is_run(engine.models.where(about.name))
        except KeyError:  # taken away at this moment
            kept, run = [], False
        saved = [{"name": a.name, "step": a.step, "loss": a.loss, "saved": a.saved} for a in kept]
        found["fnlm"] |= {"run": run, "checkpoints": saved}
        return found

    @app.get("/v1/models")
    def models() -> Response:
        return jsonify({"object": "list", "data": [told(a) for a in engine.models.about().values()]})

    @app.get("/v1/models/<path:name>")
    def model(name: str) -> Response:
        return jsonify(told(openai.model_of({"model": name}, engine.models.about(name))))
