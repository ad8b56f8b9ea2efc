"""The routes that read: texts to tokens and back, as a model's tokenizer sees them."""

from __future__ import annotations

from flask import Blueprint, Response, jsonify

from webui import openai
from webui.completions import body_of
from webui.engine import Engine
from webui.models import Reader
from webui.openai import ApiError
from webui.shapes import spelled

MOST_TEXT = 200_000  # characters; more would hold up the engine meanwhile


def routes(engine: Engine) -> Blueprint:
    """/v1/tokenize and /v1/detokenize for this engine's models."""
    blueprint = Blueprint("texts", __name__)

    def reader_of(body: dict[str, object]) -> Reader:
        name = openai.model_of(body, engine.models.about(body.get("model"))).name
        try:
            return engine.models.reader(name)
        except (KeyError, ValueError, OSError):
            raise ApiError(500, f"{name[:200]} cannot be read; the server's log says why") from None

    @blueprint.post("/v1/tokenize")
    def tokenize() -> Response:
        """{model, text | messages} -> {tokens: [{id, text, special}], count}."""
        body = body_of()
        reader, given = reader_of(body), openai.text_or_messages(body)
        tokenizer = reader.tokenizer
        if (len(given) if isinstance(given, str) else sum(len(m["content"]) for m in given)) > MOST_TEXT:
            raise ApiError(400, f"the text has more than {MOST_TEXT:,} characters", "text")
        if isinstance(given, str):
            ids = tokenizer.encode(given)
        else:
            try:
                ids = reader.dialogue.prompt(given)
            except ValueError as error:
                raise ApiError(400, str(error), "messages") from None
        special = set(tokenizer.special.values())
        tokens = [{"id": i, "text": spelled(tokenizer, i), "special": i in special} for i in ids]
        return jsonify({"tokens": tokens, "count": len(ids)})

    @blueprint.post("/v1/detokenize")
    def detokenize() -> Response:
        """{model, tokens: [ids]} -> {text}."""
        body = body_of()
        tokenizer = reader_of(body).tokenizer
        return jsonify({"text": tokenizer.decode(openai.ids_of(body, tokenizer.vocab_size))})

    return blueprint
