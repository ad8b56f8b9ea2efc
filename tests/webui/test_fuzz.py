"""Hostile and malformed requests by the thousand: an answer in OpenAI's shape each, never a 500, never a traceback."""

from __future__ import annotations

import json
import logging
import random
from typing import Any

import pytest
from flask.testing import FlaskClient

from tests.webui.test_app import CHAT, HELLO, PLAIN, TEXT, lines
from webui.app import create_app
from webui.engine import Engine

TOKENIZE, DETOKENIZE, MARKDOWN = "/v1/tokenize", "/v1/detokenize", "/v1/markdown"
STRINGS = [
    "",
    "a",
    "\0",
    "\ud800",
    "é\u2028",
    "<|im_end|>",
    "x" * 100,
    "../../etc/passwd",
    "plain",
    "talk",
    "{{7*7}}",
    "\U0001f600",
]
NUMBERS = [0, 1, -1, 2, 3.5, 1e308, -1e-308, 10**400, 2**63, 2**64 - 1, -(2**63), 20, 64, 257, 258, 259]
FIELDS = [
    "model", "messages", "prompt", "temperature", "top_p", "top_k", "min_p", "max_tokens", "max_completion_tokens",
    "min_tokens", "stop", "seed", "n", "logit_bias", "presence_penalty", "frequency_penalty", "repetition_penalty",
    "logprobs", "top_logprobs", "echo", "suffix", "best_of", "stream", "stream_options", "truncate", "tools", "user",
    "text", "tokens", "texts", "__class__", "typical_p", "stop_token_ids", "slide", "slide_keep",
]  # fmt: skip
BASES: list[tuple[str, dict[str, Any]]] = [
    (CHAT, {**HELLO, "max_tokens": 3}),
    (TEXT, {**PLAIN, "max_tokens": 3}),
    (TOKENIZE, {"model": "plain", "text": "a b"}),
    (TOKENIZE, {"model": "talk", "messages": HELLO["messages"]}),
    (DETOKENIZE, {"model": "plain", "tokens": [97, 98]}),
    (MARKDOWN, {"texts": ["*a*"]}),
]


def value(dice: random.Random, depth: int = 0) -> Any:
    kind = dice.randrange(8 if depth < 3 else 5)
    if kind < 2:
        return dice.choice(NUMBERS)
    if kind < 4:
        return dice.choice(STRINGS)
    if kind == 4:
        return dice.choice([None, True, False])
    if kind == 5:
        return {
            dice.choice([*STRINGS, *FIELDS, "role", "content", "5"]): value(dice, depth + 1)
            for _ in range(dice.randrange(3))
        }
    if kind == 6:
        return [value(dice, depth + 1) for _ in range(dice.randrange(4))]
    return [{"role": dice.choice(["user", "system", "assistant", "tool"]), "content": value(dice, depth + 2)}]


def body(dice: random.Random, base: dict[str, Any]) -> bytes:
    asked = dict(base)
    for _ in range(dice.randint(1, 3)):
        asked[dice.choice(FIELDS)] = value(dice)
    if dice.random() < 0.1:
        del asked[dice.choice(list(asked))]
    data = json.dumps(asked, ensure_ascii=dice.random() < 0.9).encode("utf-8", "surrogatepass")
    if dice.random() < 0.1:
        at = dice.randrange(len(data))
        data = data[:at] + bytes([dice.randrange(256)]) * dice.randrange(3) + data[at + dice.randrange(4) :]
    return data


def checked(client: FlaskClient, path: str, data: bytes) -> int:
    """The status of the answer, whose shape is as it must be."""
    response = client.post(path, data=data, content_type="application/json")
    said = response.get_data(as_text=True)
    assert response.status_code in (200, 400, 404, 413), (path, data, said)
    assert "Traceback" not in said
    if response.mimetype == "text/event-stream":
        for part in lines(response):
            assert set(part) >= {"choices"} or set(part) == {"error"}, (data, part)
    else:
        assert set(response.get_json()) & {"error", "choices", "tokens", "text", "html"}, (path, data, said)
    return response.status_code


@pytest.mark.parametrize("seed", range(4))
def test_hostile_requests(engine: Engine, seed: int, caplog: pytest.LogCaptureFixture) -> None:
    dice, client = random.Random(seed), create_app(engine).test_client()
    with caplog.at_level(logging.WARNING):
        found = [checked(client, path, body(dice, base)) for path, base in (dice.choice(BASES) for _ in range(600))]
    assert found.count(200) > 60
    assert found.count(400) > 200
    assert not [r for r in caplog.records if r.levelno >= logging.WARNING]
    assert engine.load() == {"active": 0, "waiting": 0}


def test_hostile_paths(client: FlaskClient) -> None:
    dice = random.Random(0)
    parts = [
        "v1",
        "models",
        "..",
        "%2e%2e",
        "static",
        "app.js",
        "\x00",
        "%00",
        "%ff",
        "//",
        "a" * 300,
        "<b>",
        "?x=%",
        "%F0%9F",
    ]
    for _ in range(400):
        path = "/" + "/".join(dice.choice(parts) for _ in range(dice.randint(1, 5)))
        response = client.open(path, method=dice.choice(["GET", "POST", "PUT", "DELETE", "OPTIONS", "PATCH"]))
        assert response.status_code in (200, 308, 404, 405), path
        response.close()
