"""The API as an OpenAPI document, made from what reads the requests: /openapi.json, for clients and for fuzzing."""

from __future__ import annotations

from typing import Any

from flask import Blueprint, Response, jsonify

import fnlm
from webui.markdown import MOST_LETTERS, MOST_TEXTS
from webui.openai import (
    COUNTS,
    MOST_CHOICES,
    MOST_LOGPROBS,
    MOST_MESSAGES,
    MOST_STOPS,
    MOST_TOKENS,
    NUMBERS,
    ROLES,
)

Json = dict[str, Any]
TEXT, FLAG, ID = {"type": "string"}, {"type": ["boolean", "null"]}, {"type": "integer", "minimum": 0}
WHOLE, ANY, OBJECT = {"type": "integer"}, {"type": ["number", "null"]}, {"type": "object"}


def routes() -> Blueprint:
    """/openapi.json."""
    blueprint = Blueprint("openapi", __name__)
    made = document()

    @blueprint.get("/openapi.json")
    def openapi() -> Response:
        return jsonify(made)

    return blueprint


def document() -> Json:
    """The document, OpenAPI 3.1."""
    return {
        "openapi": "3.1.0",
        "info": {"title": "fnlm", "version": fnlm.__version__, "description": "An API like OpenAI's."},
        "security": [{}, {"key": []}],
        "paths": _asked() | _told(),
        "components": {
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
            "schemas": {
                "Error": _object(error=_object(message=TEXT, type=TEXT, param=_or_null(TEXT), code=_or_null(TEXT))),
                "Usage": _object(prompt_tokens=ID, completion_tokens=ID, total_tokens=ID),
                "Model": _object(id=TEXT, object={"const": "model"}, created=WHOLE, owned_by=TEXT, fnlm=OBJECT),
                "Message": _object(role={"enum": list(ROLES)}, content={"anyOf": [TEXT, _list(_part())]}),
            },
        },
    }  # fmt: skip


def _asked() -> Json:
    """The routes that take a body."""
    messages = _list(_ref("Message"), 1, MOST_MESSAGES)
    text = _some({"prompt": _prompt(), **_fields(), **_completion()})
    chat = _some({"messages": messages, **_fields(), **_chat()}, "messages")
    either = [_some({"text": TEXT, **_name()}, "text"), _some({"messages": messages, **_name()}, "messages")]
    ids = _some({"tokens": _list(ID), **_name()}, "tokens")
    texts = _some({"texts": _list({**TEXT, "maxLength": MOST_LETTERS}, most=MOST_TEXTS)}, "texts")
    tokens = _object(tokens=_list(_object(id=ID, text=TEXT, special={"type": "boolean"})), count=ID)
    return {
        "/v1/chat/completions": _post("Continue a conversation.", chat, _completed("chat.completion"), stream=True),
        "/v1/completions": _post("Continue a text.", text, _completed("text_completion"), stream=True),
        "/v1/tokenize": _post("A text or a conversation as tokens.", {"oneOf": either}, tokens),
        "/v1/detokenize": _post("Tokens as a text.", ids, _object(text=TEXT)),
        "/v1/markdown": _post("Markdown as harmless HTML.", texts, _object(html=_list(TEXT))),
    }


def _told() -> Json:
    """The routes that only tell."""
    name = {"name": "name", "in": "path", "required": True, "schema": TEXT}
    asked = [{"name": n, "in": "query", "required": n == "name", "schema": TEXT} for n in ("name", "seen")]
    sample = [{"name": n, "in": "query", "required": True, "schema": TEXT} for n in ("name", "at")]
    health = _object(status=TEXT, models=ID, active=ID, waiting=ID)
    listed = _object(object={"const": "list"}, data=_list(_ref("Model")))
    plain = {"200": {"description": "In Prometheus' text.", "content": {"text/plain": {"schema": TEXT}}}}
    loading = {"503": {"description": "The first model is being loaded.", "content": _content(health)}}
    return {
        "/v1/models": _get("The models.", listed),
        "/v1/models/{name}": _get("A model.", _ref("Model"), [name]),
        "/v1/runs": _get("The runs.", _object(object={"const": "list"}, data=_list(_object(id=TEXT)))),
        "/v1/run": _get("How a run stands.", OBJECT, asked),
        "/v1/run/sample": _get("What a run wrote at a step.", _object(at=TEXT, text=TEXT), sample),
        "/health": {"get": {"summary": "Whether it is ready.", "responses": _answers(health) | loading}},
        "/metrics": {"get": {"summary": "Counters.", "responses": plain | {"default": _failed()}}},
    }  # fmt: skip


def _fields() -> Json:
    """What both kinds of completion take."""
    numbers = {name: {**ANY, "minimum": a, "maximum": b} for name, (a, b) in NUMBERS.items()}
    for name in ("top_p", "typical_p"):
        numbers[name] = {**ANY, "exclusiveMinimum": 0, "maximum": 1}
    counts = {name: {"type": ["integer", "null"], "minimum": a, "maximum": b} for name, (a, b) in COUNTS.items()}
    stop = {"anyOf": [{**TEXT, "minLength": 1}, _list({**TEXT, "minLength": 1}, most=MOST_STOPS), {"type": "null"}]}
    bias = {"type": ["object", "null"], "propertyNames": {"pattern": "^[0-9]{1,9}$"},
            "additionalProperties": {"type": ["number", "null"], "minimum": -100, "maximum": 100}}  # fmt: skip
    return {
        **_name(), **numbers, **counts, "stop": stop, "logit_bias": bias,
        "stop_token_ids": _or_null(_list(ID, most=MOST_STOPS)),
        "seed": {"type": ["integer", "null"], "minimum": -(1 << 63), "maximum": (1 << 64) - 1},
        "n": {"type": ["integer", "null"], "minimum": 1, "maximum": MOST_CHOICES},
        "slide": FLAG, "slide_keep": {"type": ["integer", "null"], "minimum": 0, "maximum": MOST_TOKENS},
        "stream": FLAG, "stream_options": {"type": ["object", "null"], "properties": {"include_usage": FLAG}},
    }  # fmt: skip


def _chat() -> Json:
    top = {"type": ["integer", "null"], "minimum": 0, "maximum": MOST_LOGPROBS}
    most = {"type": ["integer", "null"], "minimum": 1, "maximum": MOST_TOKENS}
    return {"logprobs": FLAG, "top_logprobs": top, "max_completion_tokens": most}


def _completion() -> Json:
    top = {"type": ["integer", "null"], "minimum": 0, "maximum": MOST_LOGPROBS}
    least = {"type": ["integer", "null"], "minimum": 0, "maximum": MOST_TOKENS}
    return {"logprobs": {"anyOf": [top, {"const": False}]}, "echo": FLAG, "truncate": FLAG, "max_tokens": least}


def _prompt() -> Json:
    ids = _list(ID, 1)
    return {"anyOf": [TEXT, ids, _list(TEXT, 1, MOST_CHOICES), _list(ids, 1, MOST_CHOICES)]}


def _completed(kind: str) -> Json:
    said = {"message": OBJECT} if kind == "chat.completion" else {"text": TEXT}
    choice = _object(index=ID, finish_reason=TEXT, logprobs={"type": ["object", "null"]}, **said)
    return _object(
        id=TEXT, object={"const": kind}, created=WHOLE, model=TEXT, choices=_list(choice, 1),
        system_fingerprint=TEXT, usage=_ref("Usage"), fnlm=OBJECT,
    )  # fmt: skip


def _post(summary: str, body: Json, answer: Json, stream: bool = False) -> Json:
    responses = _answers(answer)
    if stream:
        events = {"description": "Events, each with a chunk of the answer as JSON."}
        responses["200"]["content"]["text/event-stream"] = {"schema": events}
        responses["429"] = {
            **_failed(),
            "description": "All places are taken; the header Retry-After says for how long.",
        }
    return {"post": {"summary": summary, "requestBody": {"required": True, "content": _content(body)}, "responses": responses}}  # fmt: skip  # noqa: E501


def _get(summary: str, answer: Json, parameters: list[Json] | None = None) -> Json:
    return {"get": {"summary": summary, "parameters": parameters or [], "responses": _answers(answer)}}


def _answers(answer: Json) -> Json:
    """A good one, and for all others OpenAI's error object."""
    return {"200": {"description": "Done.", "content": _content(answer)}, "default": _failed()}


def _failed() -> Json:
    return {"description": "Why not, and which field is to blame.", "content": _content(_ref("Error"))}


def _content(schema: Json) -> Json:
    return {"application/json": {"schema": schema}}


def _object(**properties: Json) -> Json:
    """An object that has all of these."""
    return _some(properties, *properties)


def _some(properties: Json, *required: str) -> Json:
    """An object that may have these and others."""
    return {"type": "object", "properties": properties, "required": list(required)}


def _list(items: Json, least: int = 0, most: int | None = None) -> Json:
    return {"type": "array", "items": items, "minItems": least} | ({} if most is None else {"maxItems": most})


def _part() -> Json:
    return _object(type={"const": "text"}, text=TEXT)


def _name() -> Json:
    return {"model": {"type": ["string", "null"], "description": "One of /v1/models; null: the first."}}


def _ref(name: str) -> Json:
    return {"$ref": f"#/components/schemas/{name}"}


def _or_null(schema: Json) -> Json:
    return {"anyOf": [schema, {"type": "null"}]}
