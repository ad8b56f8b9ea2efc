"""The real app around tiny models, whose replies say what was asked, as slowly as asked: for tests of the page."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from flask import Flask, Response, request
from werkzeug.serving import make_server


@dataclass
class Echo:
    """Stands before an app's API. `reply` makes the pieces of a reply out of the request's body."""

    names: list[str] = field(default_factory=lambda: ["talk"])
    kind: str = "chat"
    pause: float = 0.0
    asked: list[dict[str, Any]] = field(default_factory=list)
    left: int = 0
    reply: Callable[[dict[str, Any]], list[str]] = lambda body: last(body).split(" ")

    def before(self, app: Flask) -> Flask:
        """The app, which now answers with echoes."""

        @app.before_request
        def answer() -> Response | None:
            if request.path == "/v1/models":
                about = {
                    "kind": self.kind,
                    "chat": self.kind == "chat",
                    "parameters": 8288,
                    "step": 7,
                    "loss": 5.25,
                    "context": 64,
                }
                return app.json.response({"data": [{"id": name, "fnlm": about} for name in self.names]})
            if request.path not in ("/v1/chat/completions", "/v1/completions"):
                return None
            self.asked.append(request.get_json())
            return Response(self.stream(self.asked[-1]), mimetype="text/event-stream")

        return app

    def stream(self, body: dict[str, Any]) -> Iterator[str]:
        """Server-sent events as the API has them."""
        is_chat, pieces = "messages" in body, self.reply(body)
        try:
            yield line({"choices": [], "fnlm": {"dropped": 0, "seed": body.get("seed") or 1, "step": 7}})
            for i, piece in enumerate(pieces):
                text = piece if i == 0 else f" {piece}"
                entry = {"token": text, "bytes": list(text.encode()), "logprob": -0.5 * (i % 9), "id": i}
                other = {"token": f"{text}!", "bytes": list(f"{text}!".encode()), "logprob": -1.0, "id": i + 1}
                scores = {"content": [{**entry, "top_logprobs": [entry, other]}]} if body.get("logprobs") else None
                said = {"delta": {"content": text}} if is_chat else {"text": text}
                yield line({"choices": [{"index": 0, **said, "logprobs": scores, "finish_reason": None}]})
                if self.pause:
                    time.sleep(self.pause)
            yield line({"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]})
            yield line({"choices": [], "usage": {"completion_tokens": len(pieces)}})
            yield "data: [DONE]\n\n"
        except GeneratorExit:
            self.left += 1
            raise


def last(body: dict[str, Any]) -> str:
    """The newest words of a request."""
    words = body["messages"][-1]["content"] if "messages" in body else body["prompt"]
    return words if isinstance(words, str) else f"{len(words)} ids"


def line(body: dict[str, Any]) -> str:
    return f"data: {json.dumps(body)}\n\n"


@contextlib.contextmanager
def serving(app: Flask) -> Iterator[str]:
    """The address of an app while it is served on a free port."""
    server = make_server("127.0.0.1", 0, app, threaded=True)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()
    server.server_close()
    thread.join(5)
