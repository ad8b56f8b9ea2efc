"""/openapi.json tells of every route, and is true: requests made from it, and spoilt ones, meet answers as it says."""

from __future__ import annotations

import json
import random
import re
import shutil
import socket
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import waitress
from flask.testing import FlaskClient

from cli.serve import server_of
from tests.webui.test_fuzz import value
from webui.app import create_app
from webui.engine import Engine
from webui.models import Models
from webui.openapi import document

DOC = document()
TYPES = {
    "string": str, "integer": int, "number": (int, float), "boolean": bool, "object": dict, "array": list,
    "null": type(None),
}  # fmt: skip


def resolved(schema: dict[str, Any]) -> dict[str, Any]:
    while "$ref" in schema:
        schema = DOC["components"]["schemas"][schema["$ref"].rsplit("/", 1)[1]]
    return schema


def types_of(schema: dict[str, Any]) -> list[str]:
    kind = schema.get("type", [])
    return [kind] if isinstance(kind, str) else kind


def wrong(schema: dict[str, Any], given: Any, at: str = "$") -> Iterator[str]:
    """Where a value is not what a schema says: as much of JSON Schema as the document uses for answers."""
    schema = resolved(schema)
    kinds = types_of(schema)
    ok = any(isinstance(given, TYPES[k]) and (k == "boolean" or not isinstance(given, bool)) for k in kinds)  # type: ignore[arg-type]
    if kinds and not ok:
        yield f"{at} is {given!r}, no {kinds}"
        return
    if "const" in schema and given != schema["const"]:
        yield f"{at} is {given!r}, not {schema['const']!r}"
    if "anyOf" in schema and all(any(wrong(s, given, at)) for s in schema["anyOf"]):
        yield f"{at} is {given!r}, none of {schema['anyOf']}"
    if isinstance(given, dict):
        yield from (f"{at} has no {name}" for name in schema.get("required", []) if name not in given)
        for name, inner in schema.get("properties", {}).items():
            if name in given:
                yield from wrong(inner, given[name], f"{at}.{name}")
    if isinstance(given, list) and "items" in schema:
        for i, item in enumerate(given):
            yield from wrong(schema["items"], item, f"{at}[{i}]")


def made(dice: random.Random, schema: dict[str, Any], name: str = "") -> Any:
    """A value that a schema allows."""
    schema = resolved(schema)
    options = schema.get("anyOf") or schema.get("oneOf")
    if options:
        return made(dice, dice.choice(options), name)
    if "enum" in schema or "const" in schema:
        return dice.choice(schema.get("enum") or [schema["const"]])
    kind = dice.choice(types_of(schema) or ["null"])
    if kind == "string":
        words = ["plain", "talk"] if name == "model" else ["a", "é\u2028", "hello you", "<|im_end|>", "\0"]
        return dice.choice(words)
    if kind in ("integer", "number"):
        low = schema.get("minimum", schema.get("exclusiveMinimum", 0) + (0.001 if kind == "number" else 1))
        high = min(schema.get("maximum", 255), low + dice.choice([3, 300, 10**7]))
        return dice.randint(int(low), int(high)) if kind == "integer" else dice.uniform(low, high)
    if kind == "boolean":
        return dice.random() < 0.5
    if kind == "array":
        n = dice.randint(schema.get("minItems", 0), min(schema.get("maxItems", 4), 4))
        return [made(dice, schema["items"], name) for _ in range(n)]
    if kind == "object":
        named = schema.get("properties", {})
        must = schema.get("required", [])
        return {k: made(dice, s, k) for k, s in named.items() if k in must or dice.random() < 0.2}
    return None


def asked(dice: random.Random, path: str, about: dict[str, Any]) -> dict[str, Any]:
    schema = about["requestBody"]["content"]["application/json"]["schema"]
    body: dict[str, Any] = made(dice, schema)
    if "completions" in path:
        body["max_tokens"] = dice.randint(1, 4) if dice.random() < 0.9 else body.get("max_tokens")
        body["n"] = dice.choice([None, 1, 2])
        body.pop("max_completion_tokens", None)
    if dice.random() < 0.5:  # spoilt
        body[dice.choice([*body, *resolved(schema).get("properties", {"texts": 0}), "more"])] = value(dice)
    return body


def test_every_route_is_told_of(client: FlaskClient) -> None:
    assert client.get("/openapi.json").get_json() == DOC
    pages = {"/", "/run", "/openapi.json"}
    rules = {re.sub(r"<(?:\w+:)?(\w+)>", r"{\1}", r.rule) for r in client.application.url_map.iter_rules()}
    assert set(DOC["paths"]) == {r for r in rules if r not in pages and not r.startswith("/static/")}


def hostile(client: FlaskClient, seed: int, n: int) -> list[int]:
    """So many requests; the status of each answer, which is as the document says."""
    dice, found = random.Random(seed), []
    posts = [(path, about["post"]) for path, about in DOC["paths"].items() if "post" in about]
    gets = [(path, about["get"]) for path, about in DOC["paths"].items() if "get" in about]
    for _ in range(n):
        if dice.random() < 0.05:
            path, about = dice.choice(gets)
            name = dice.choice(["plain", "talk", "..", "a" * 50, "\u2028"])
            response = client.get(path.replace("{name}", name), query_string={"name": name, "at": "x", "seen": "1"})
        else:
            path, about = dice.choice(posts)
            response = client.post(path, json=asked(dice, path, about))
        found.append(response.status_code)
        said = about["responses"].get(str(response.status_code), about["responses"]["default"])["content"]
        assert response.mimetype in said, (path, response.status_code, response.mimetype)
        text = response.get_data(as_text=True)
        assert response.status_code < 500, (path, text)
        assert "Traceback" not in text
        if response.mimetype == "application/json":
            complaints = list(wrong(said["application/json"]["schema"], response.get_json()))
            assert not complaints, (path, complaints, text)
    return found


def test_answers_are_as_the_document_says(client: FlaskClient) -> None:
    found = hostile(client, 1, 250)
    assert min(found.count(200), found.count(400)) > 50


@pytest.mark.slow
def test_ten_thousand_hostile_requests(engine: Engine) -> None:
    before = threading.active_count()
    found = hostile(create_app(engine).test_client(), 2, 10_000)
    assert min(found.count(200), found.count(400)) > 2000
    assert set(found) <= {200, 400, 404, 413}
    assert engine.load() == {"active": 0, "waiting": 0}
    assert threading.active_count() <= before


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("schemathesis") is None, reason="schemathesis is not installed")
def test_schemathesis(runs: Path, tmp_path: Path) -> None:
    """What it makes of the document, over HTTP; but a text that slides may have a million tokens."""
    engine, place = Engine(Models([runs]), streams=4).start(), socket.create_server(("127.0.0.1", 0))
    server = server_of(create_app(engine), place, 24)
    threading.Thread(target=server.run, daemon=True).start()
    told = json.dumps(DOC).replace('"slide":', '"slides":')
    (tmp_path / "openapi.json").write_text(told, encoding="utf-8")
    at = ["--url", f"http://127.0.0.1:{place.getsockname()[1]}", str(tmp_path / "openapi.json")]
    checks = "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance"
    words = ["schemathesis", "run", *at, "--checks", checks, "-n", "50", "--phases", "coverage,fuzzing"]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, timeout=600)
    engine.stop()
    server.task_dispatcher.shutdown(timeout=5)
    waitress.wasyncore.close_all(server._map)
    assert done.returncode == 0, done.stdout[-3000:]
