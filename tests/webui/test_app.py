"""The app through Flask's test client: routes, OpenAI's shapes, errors, keys, headers, hostile requests."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from flask.testing import FlaskClient
from werkzeug.test import TestResponse

from fnlm.decode import decode, init_cache
from tests.webui.tiny import Script, save
from webui.app import create_app, is_local
from webui.engine import Engine
from webui.models import Models

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
HELLO = {"model": "talk", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 12, "seed": 3}
PLAIN = {"model": "plain", "prompt": "abc", "max_tokens": 12, "seed": 3}


def lines(response: TestResponse) -> list[Any]:
    """The data of every server-sent event; the last is [DONE]."""
    assert response.mimetype == "text/event-stream"
    blocks = response.get_data(as_text=True).split("\n\n")
    assert blocks.pop() == ""
    data = [block.removeprefix("data: ") for block in blocks if not block.startswith(":")]
    assert data.pop() == "[DONE]"
    return [json.loads(d) for d in data]


def error(response: TestResponse, status: int) -> dict[str, Any]:
    assert response.status_code == status, response.get_data(as_text=True)
    body = response.get_json()
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    found: dict[str, Any] = body["error"]
    return found


def test_models(client: FlaskClient) -> None:
    body = client.get("/v1/models").get_json()
    assert [m["id"] for m in body["data"]] == ["plain", "talk"]
    plain, talk = body["data"]
    assert plain["object"] == "model"
    saved = {"name": "plain@7", "step": 7, "loss": 5.25, "saved": plain["created"]}
    assert plain["fnlm"] == {
        "kind": "text", "parameters": 8288, "step": 7, "loss": 5.25, "context": 64, "saved": plain["created"],
        "run": False, "checkpoints": [saved],
    }  # fmt: skip
    assert talk["fnlm"]["kind"] == "chat"
    assert client.get("/v1/models/talk").get_json() == talk
    assert error(client.get("/v1/models/none"), 404)["code"] == "model_not_found"


def test_a_run_that_is_taken_away_while_models_are_listed(
    client: FlaskClient, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    names, listed = engine.models.paths(), engine.models.about()
    monkeypatch.setattr(engine.models, "about", lambda asked=None: listed)
    monkeypatch.setattr(engine.models, "paths", lambda: {})
    found = client.get("/v1/models").get_json()["data"]
    assert [one["id"] for one in found] == list(names)
    assert all(not one["fnlm"]["run"] and one["fnlm"]["checkpoints"] == [] for one in found)


def test_health(client: FlaskClient, engine: Engine) -> None:
    response = client.get("/health")
    assert response.status_code == 200
    assert response.get_json() == {"status": "ok", "models": 2, "active": 0, "waiting": 0}
    engine.ready.clear()
    response = client.get("/health")
    pages = [client.get(path).status_code for path in ("/", "/run", "/v1/models", "/v1/runs")]
    engine.ready.set()
    assert (response.status_code, response.get_json()["status"]) == (503, "loading")
    assert pages == [200] * 4


def test_a_chat_completion(client: FlaskClient) -> None:
    body = client.post(CHAT, json=HELLO).get_json()
    assert body["object"] == "chat.completion"
    assert body["id"].startswith("chatcmpl-")
    assert body["model"] == "talk"
    (choice,) = body["choices"]
    assert choice["message"]["role"] == "assistant"
    assert choice["finish_reason"] in ("stop", "length")
    assert body["usage"]["prompt_tokens"] == len("<user\nhi>\n<assistant\n")
    assert body["usage"]["total_tokens"] == sum(body["usage"][k] for k in ("prompt_tokens", "completion_tokens"))
    assert body["fnlm"] == {"dropped": 0, "seed": 3, "step": 9}


def test_a_stream_is_the_whole_text(client: FlaskClient) -> None:
    for seed in range(6):
        whole = client.post(CHAT, json={**HELLO, "seed": seed}).get_json()
        asked = {**HELLO, "seed": seed, "stream": True, "stream_options": {"include_usage": True}}
        first, *deltas, last, usage = lines(client.post(CHAT, json=asked))
        assert first["object"] == "chat.completion.chunk"
        assert first["choices"][0]["delta"] == {"role": "assistant", "content": ""}
        said = "".join(d["choices"][0]["delta"]["content"] for d in deltas)
        assert said == whole["choices"][0]["message"]["content"]
        assert last["choices"][0] == {
            "index": 0, "delta": {}, "logprobs": None, "finish_reason": whole["choices"][0]["finish_reason"],
        }  # fmt: skip
        assert (usage["choices"], usage["usage"]) == ([], whole["usage"])


def test_a_completion(client: FlaskClient) -> None:
    body = client.post(TEXT, json=PLAIN).get_json()
    assert (body["object"], body["choices"][0]["finish_reason"]) == ("text_completion", "length")
    parts = lines(client.post(TEXT, json={**PLAIN, "stream": True}))
    assert "".join(p["choices"][0]["text"] for p in parts) == body["choices"][0]["text"]
    assert parts[-1]["choices"][0]["finish_reason"] == "length"
    echoed = client.post(TEXT, json={**PLAIN, "echo": True}).get_json()
    assert echoed["choices"][0]["text"] == "abc" + body["choices"][0]["text"]
    parts = lines(client.post(TEXT, json={**PLAIN, "echo": True, "stream": True}))
    assert "".join(p["choices"][0]["text"] for p in parts) == "abc" + body["choices"][0]["text"]
    ids = client.post(TEXT, json={**PLAIN, "prompt": list(b"abc")}).get_json()
    assert ids["choices"] == body["choices"]


def test_sixteen_tokens_unless_told(client: FlaskClient) -> None:
    asked = {"prompt": "abc", "seed": 3, "min_tokens": 16}  # and the first model
    body = client.post(TEXT, json=asked).get_json()
    assert (body["model"], body["usage"]["completion_tokens"]) == ("plain", 16)


def test_up_to_the_end_of_the_context(client: FlaskClient) -> None:
    body = client.post(TEXT, json={**PLAIN, "max_tokens": 5000, "min_tokens": 4000}).get_json()
    assert body["usage"] == {"prompt_tokens": 3, "completion_tokens": 61, "total_tokens": 64}


def test_choices(client: FlaskClient) -> None:
    body = client.post(TEXT, json={**PLAIN, "n": 3}).get_json()
    assert [c["index"] for c in body["choices"]] == [0, 1, 2]
    assert len({c["text"] for c in body["choices"]}) == 3
    assert body["usage"]["prompt_tokens"] == 3
    second = client.post(TEXT, json={**PLAIN, "seed": 4}).get_json()
    assert second["choices"][0]["text"] == body["choices"][1]["text"]
    several = client.post(TEXT, json={**PLAIN, "prompt": ["abc", "de"]}).get_json()
    assert several["choices"][0] == body["choices"][0]
    assert several["usage"]["prompt_tokens"] == 5
    parts = lines(client.post(TEXT, json={**PLAIN, "n": 3, "stream": True}))
    texts = ["", "", ""]
    for part in parts:
        texts[part["choices"][0]["index"]] += part["choices"][0]["text"]
    assert texts == [c["text"] for c in body["choices"]]


def test_what_was_dropped_is_said(client: FlaskClient) -> None:
    turns = [{"role": r, "content": "word " * 4} for r in ("user", "assistant", "user")]
    body = client.post(CHAT, json={**HELLO, "messages": turns}).get_json()
    assert body["fnlm"]["dropped"] == 2


def test_a_long_text_is_truncated_when_asked(client: FlaskClient) -> None:
    body = client.post(TEXT, json={**PLAIN, "prompt": "x" * 64, "truncate": True}).get_json()
    assert (body["fnlm"]["dropped"], body["usage"]["prompt_tokens"]) == (16, 48)


def test_text_parts_and_the_developers_role(client: FlaskClient) -> None:
    parts = [{"type": "text", "text": "h"}, {"type": "text", "text": "i"}]
    one = client.post(CHAT, json={**HELLO, "messages": [{"role": "user", "content": parts}]}).get_json()
    assert one["choices"] == client.post(CHAT, json=HELLO).get_json()["choices"]
    messages = [{"role": "developer", "content": "s"}, *HELLO["messages"]]  # type: ignore[misc]
    assert client.post(CHAT, json={**HELLO, "messages": messages}).status_code == 200


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"temperature": "hot"}, "temperature"),
        ({"temperature": -1}, "temperature"),
        ({"temperature": True}, "temperature"),
        ({"temperature": 10**400}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"top_p": 1.5}, "top_p"),
        ({"top_k": 1.5}, "top_k"),
        ({"top_k": 10**30}, "top_k"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": "9"}, "max_tokens"),
        ({"max_completion_tokens": []}, "max_completion_tokens"),
        ({"min_tokens": 20}, "min_tokens"),
        ({"n": 0}, "n"),
        ({"n": 9}, "n"),
        ({"seed": 0.5}, "seed"),
        ({"stop": ""}, "stop"),
        ({"stop": [1]}, "stop"),
        ({"stop": ["a"] * 17}, "stop"),
        ({"logit_bias": [1]}, "logit_bias"),
        ({"logit_bias": {"a": 1}}, "logit_bias"),
        ({"logit_bias": {"5": 101}}, "logit_bias"),
        ({"stream": 1}, "stream"),
        ({"stream_options": 1}, "stream_options"),
        ({"stream_options": {"include_usage": "yes"}}, "include_usage"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"presence_penalty": 3}, "presence_penalty"),
        ({"logprobs": 1}, "logprobs"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"tools": [{}]}, "tools"),
        ({"messages": None}, "messages"),
        ({"messages": []}, "messages"),
        ({"messages": "hi"}, "messages"),
        ({"messages": [1]}, "messages[0]"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": ["user"], "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": "x" * 500}]}, "messages"),
        ({"model": "plain"}, "model"),
        ({"model": 5}, "model"),
    ],
)
def test_a_wrong_field_is_named(client: FlaskClient, change: dict[str, Any], param: str) -> None:
    for stream in (False, True):
        found = error(client.post(CHAT, json={"stream": stream, **HELLO, **change}), 400)
        assert found["param"] == param
        assert found["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"prompt": 5}, "prompt"),
        ({"prompt": [1.5]}, "prompt"),
        ({"prompt": [[]]}, "prompt"),
        ({"prompt": [-1]}, "prompt"),
        ({"prompt": [300]}, "prompt"),
        ({"prompt": ["a"] * 9}, "prompt"),
        ({"prompt": ["a"] * 5, "n": 2}, "n"),
        ({"prompt": "x" * 64}, "prompt"),
        ({"suffix": "end"}, "suffix"),
        ({"logprobs": 21}, "logprobs"),
        ({"logprobs": True}, "logprobs"),
        ({"best_of": 2}, "best_of"),
        ({"echo": "yes"}, "echo"),
        ({"logit_bias": {"600": 1}}, "logit_bias"),
        ({"typical_p": 0}, "typical_p"),
        ({"typical_p": "high"}, "typical_p"),
        ({"stop_token_ids": 5}, "stop_token_ids"),
        ({"stop_token_ids": [True]}, "stop_token_ids"),
        ({"stop_token_ids": [259]}, "stop_token_ids"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"slide": 1}, "slide"),
        ({"slide": True, "slide_keep": -1}, "slide_keep"),
        ({"slide": True, "slide_keep": 32}, "slide_keep"),
    ],
)
def test_a_wrong_field_of_a_completion_is_named(client: FlaskClient, change: dict[str, Any], param: str) -> None:
    assert error(client.post(TEXT, json={**PLAIN, **change}), 400)["param"] == param


def test_unknown_fields_are_ignored(client: FlaskClient) -> None:
    more = {"user": "me", "mirostat": 2, "top_k": -1, "logprobs": False, "suffix": None, "min_p": None}
    assert client.post(CHAT, json={**HELLO, **more}).get_json()["choices"][0]["message"]


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"\xff", b"[" * 100_000, b'{"a": NaN}', b"1" * 5000, b"null"])
def test_what_is_not_json(client: FlaskClient, body: bytes) -> None:
    assert "JSON" in error(client.post(TEXT, data=body, content_type="application/json"), 400)["message"]


def test_another_site_cannot_post(client: FlaskClient) -> None:
    for kind in ("text/plain", "application/x-www-form-urlencoded", None):
        assert error(client.post(TEXT, data=json.dumps(PLAIN), content_type=kind), 415)
    preflight = client.options(TEXT, headers={"Origin": "https://evil.example"})
    assert not [h for h in preflight.headers if h[0].startswith("Access-Control")]


def test_bodies_are_limited(client: FlaskClient) -> None:
    assert "1,048,576 bytes" in error(client.post(TEXT, json={"prompt": "x" * (1 << 20)}), 413)["message"]


@pytest.mark.parametrize(
    "name",
    [
        "none",
        "",
        "../plain",
        "/etc/passwd",
        "plain/checkpoints/00000007.params",
        "pla\0in",
        "\ud800",
        "x" * 10_000,
        "Plain",
    ],
)
def test_only_what_was_found_can_be_named(client: FlaskClient, name: str) -> None:
    found = error(client.post(TEXT, json={**PLAIN, "model": name}), 404)
    assert (found["param"], found["code"]) == ("model", "model_not_found")
    assert found["message"].endswith("; choose from plain, talk")
    assert len(found["message"]) < 2000


@pytest.mark.parametrize(
    "path", ["/nothing", "/v1", "/static/../app.py", "/static/%2e%2e/app.py", "/static/%00", "/v1/models/"]
)
def test_no_such_page(client: FlaskClient, path: str) -> None:
    assert client.get(path).status_code in (308, 404)


def test_wrong_method(client: FlaskClient) -> None:
    response = client.get(CHAT)
    assert error(response, 405)
    assert "POST" in response.headers["Allow"]


def test_hostile_words_come_back_as_text(client: FlaskClient) -> None:
    for words in (
        "<script>alert(1)</script>",
        "\u2028\u2029</p>",
        "a\ud800b",
        "\0",
        "<|im_end|>",
        "data: x\n\ndata: y",
    ):
        body = {**PLAIN, "prompt": words, "echo": True, "stream": True, "max_tokens": 2}
        said = lines(client.post(TEXT, data=json.dumps(body), content_type="application/json"))
        assert said[0]["choices"][0]["text"] == words.replace("\ud800", "?")


def test_a_run_with_a_hostile_name(tmp_path: Path) -> None:
    name = '<img src=x onerror="alert(1)">'
    save(tmp_path / name, "chat")
    engine = Engine(Models([tmp_path])).start()
    client = create_app(engine).test_client()
    assert client.get("/v1/models").get_json()["data"][0]["id"] == name
    assert "onerror" not in client.get("/").get_data(as_text=True)
    engine.stop()


def test_headers(client: FlaskClient) -> None:
    script = client.get("/static/app.js")
    for response in (client.get("/"), client.get("/v1/models"), client.post(TEXT), script):
        policy = response.headers["Content-Security-Policy"]
        assert "default-src 'none'" in policy
        assert "script-src 'self';" in policy
        assert "unsafe" not in policy
        assert response.headers["X-Content-Type-Options"] == "nosniff"
        assert response.headers["X-Frame-Options"] == "DENY"
        assert response.headers["Referrer-Policy"] == "no-referrer"
        assert len(response.headers["X-Request-Id"]) == 16
    script.close()


def test_the_page_holds_to_its_policy(client: FlaskClient) -> None:
    page = client.get("/").get_data(as_text=True)
    assert "<script>" not in page
    assert " style=" not in page
    assert "http://" not in page.replace("http://www.w3.org", "")
    for file in (Path(__file__).parents[2] / "webui" / "static").iterdir():
        with client.get(f"/static/{file.name}") as response:
            assert response.status_code == 200
            text = response.get_data(as_text=True)
        assert not [w for w in ("innerHTML", "insertAdjacentHTML", "eval(", "document.write", "https://") if w in text]


def test_a_key(engine: Engine) -> None:
    client = create_app(engine, api_key="sesame").test_client()
    assert client.get("/").status_code == 200
    with client.get("/static/app.js") as script:
        assert script.status_code == 200
    assert client.get("/health").status_code == 200
    for header in (None, "Bearer", "Bearer wrong", "sesam", "Bearer sesame2", "Bearer \xff"):
        given = {} if header is None else {"Authorization": header}
        response = client.get("/v1/models", headers=given)
        assert error(response, 401)["type"] == "authentication_error"
        assert response.headers["WWW-Authenticate"] == "Bearer"
    assert client.get("/v1/models", headers={"Authorization": "Bearer sesame"}).status_code == 200


def test_a_page_elsewhere_cannot_rebind_its_name(engine: Engine) -> None:
    client = create_app(engine).test_client()
    assert error(client.get("/v1/models", headers={"Host": "evil.example:8000"}), 403)
    assert client.get("/v1/models", headers={"Host": "127.0.0.1:8000"}).status_code == 200
    wide = create_app(engine, local=False).test_client()
    assert wide.get("/v1/models", headers={"Host": "my.example"}).status_code == 200
    known = ["localhost", "localhost:1", "127.0.0.1", "[::1]:80", "[::1]", "10.0.0.2:80", ""]
    assert [h for h in known if not is_local(h)] == []
    assert [h for h in ("evil.example", "localhost.evil.example", "127.0.0.1.nip.io:80", "::x") if is_local(h)] == []


@pytest.fixture
def slow(tmp_path: Path) -> Iterator[tuple[Engine, Script]]:
    save(tmp_path / "plain", "text", seq_len=8192)
    script = Script(pause=0.001)
    engine = Engine(Models([tmp_path]), streams=1, waiting=0, batch=script).start()
    yield engine, script
    engine.stop()


ENDLESS = {**PLAIN, "max_tokens": 8000, "temperature": 0}


def test_full(slow: tuple[Engine, Script]) -> None:
    engine, _ = slow
    client = create_app(engine).test_client()
    response = client.post(TEXT, json={**ENDLESS, "stream": True}, buffered=False)
    busy = client.post(TEXT, json=PLAIN)
    assert error(busy, 429)["code"] == "queue_full"
    assert int(busy.headers["Retry-After"]) >= 1
    response.close()


def test_silence_is_filled(slow: tuple[Engine, Script], monkeypatch: pytest.MonkeyPatch) -> None:
    """A stream whose next token is long in coming says so, lest a proxy hangs up."""
    engine, script = slow
    monkeypatch.setattr("webui.replies.HEARTBEAT", 0.01)
    script.pause = 0.3
    asked = {**ENDLESS, "max_tokens": 2, "stream": True}
    said = create_app(engine).test_client().post(TEXT, json=asked).get_data(as_text=True)
    assert said.count(": waiting\n\n") >= 2
    assert said.count('"text":"x"') == 2
    assert said.endswith("data: [DONE]\n\n")


def test_a_client_that_leaves_frees_its_place(slow: tuple[Engine, Script]) -> None:
    engine, script = slow
    client = create_app(engine).test_client()
    response = client.post(TEXT, json={**ENDLESS, "stream": True}, buffered=False)
    parts = iter(response.response)
    next(parts)
    next(parts)
    response.close()
    steps = script.steps
    while engine.load()["active"]:
        pass
    assert script.closed == 1
    assert script.steps <= steps + 1


def test_hung_up_while_it_waits(slow: tuple[Engine, Script]) -> None:
    engine, script = slow
    client = create_app(engine).test_client()
    response = client.post(TEXT, json=ENDLESS, environ_overrides={"waitress.client_disconnected": lambda: True})
    assert response.status_code == 499
    while engine.load()["active"]:
        pass
    assert script.closed <= 1


def test_tokens_and_back(client: FlaskClient) -> None:
    body = client.post("/v1/tokenize", json={"model": "plain", "text": "aé<|im_end|>"}).get_json()
    assert body["count"] == len(body["tokens"]) == 3 + len("<|im_end|>")
    assert body["tokens"][:2] == [
        {"id": 97, "text": "a", "special": False},
        {"id": 0xC3, "text": "\\xc3", "special": False},
    ]
    ids = [t["id"] for t in body["tokens"]]
    assert client.post("/v1/detokenize", json={"model": "plain", "tokens": ids}).get_json() == {"text": "aé<|im_end|>"}
    body = client.post("/v1/tokenize", json={"model": "talk", "messages": HELLO["messages"]}).get_json()
    assert body["tokens"][0] == {"id": 257, "text": "<|im_start|>", "special": True}
    assert body["count"] == client.post(CHAT, json=HELLO).get_json()["usage"]["prompt_tokens"]
    for wrong, param in (({}, "text"), ({"text": 1}, "text"), ({"text": "a", "messages": []}, "text")):
        assert error(client.post("/v1/tokenize", json={"model": "plain", **wrong}), 400)["param"] == param
    assert error(client.post("/v1/detokenize", json={"model": "plain", "tokens": [259]}), 400)["param"] == "tokens"


def test_log_probabilities_are_of_the_text(client: FlaskClient) -> None:
    """Streamed or not; a stop string cuts the tokens as it cuts the text."""
    asked = {**HELLO, "logprobs": True, "top_logprobs": 2, "max_tokens": 30, "temperature": 1.5}
    for seed in range(5):
        whole = client.post(CHAT, json={**asked, "seed": seed}).get_json()["choices"][0]
        content = whole["logprobs"]["content"]
        text = bytes(b for t in content for b in t["bytes"]).decode("utf-8", "replace")
        assert text == whole["message"]["content"]
        assert all(t["top_logprobs"][0]["logprob"] >= t["logprob"] for t in content)
        parts = lines(client.post(CHAT, json={**asked, "seed": seed, "stream": True}))
        streamed = [t for p in parts for t in (p["choices"][0]["logprobs"] or {"content": []})["content"]]
        assert streamed == content
        if len(text) > 8 and text[7] not in text[:7] and ord(text[7]) < 128:
            cut = client.post(CHAT, json={**asked, "seed": seed, "stop": text[7]}).get_json()["choices"][0]
            assert cut["message"]["content"] == text[:7]
            said = bytes(b for t in cut["logprobs"]["content"] for b in t["bytes"])
            assert said.decode("utf-8", "replace") == text[:7]
    plain = client.post(CHAT, json=HELLO).get_json()["choices"][0]
    assert plain["logprobs"] is None


def test_log_probabilities_are_the_models(client: FlaskClient, engine: Engine) -> None:
    body = client.post(TEXT, json={**PLAIN, "temperature": 0, "logprobs": 1}).get_json()["choices"][0]["logprobs"]
    model = engine.models.get("plain")
    cache, prompt = init_cache(model.cfg, 1), list(b"abc")
    for token, said in zip(body["ids"], body["token_logprobs"], strict=True):
        logits, cache = decode(model.weights, torch.tensor([prompt]), model.cfg, cache)
        assert said == pytest.approx(float(logits.log_softmax(-1)[0, token]), abs=1e-4)
        prompt = [token]


def test_metrics(client: FlaskClient) -> None:
    def of(name: str) -> float:
        found = re.search(rf"^{re.escape(name)} (\S+)$", client.get("/metrics").get_data(as_text=True), re.MULTILINE)
        return float(found[1]) if found else 0.0

    done = 'fnlm_requests_total{route="/v1/completions",status="200"}'
    before = of("fnlm_tokens_total"), of(done), of("fnlm_time_to_first_token_seconds_count")
    client.post(TEXT, json={**PLAIN, "n": 2})
    after = of("fnlm_tokens_total"), of(done), of("fnlm_time_to_first_token_seconds_count")
    assert [b - a for a, b in zip(before, after, strict=True)] == [24, 1, 2]
    assert client.get("/metrics").content_type.startswith("text/plain; version=0.0.4")
    for row in client.get("/metrics").get_data(as_text=True).splitlines():
        assert re.fullmatch(r"# (HELP|TYPE) \w+ .+|\w+(\{[^{}]*\})? [\d.e+-]+", row), row


def test_the_log_has_no_prompt(client: FlaskClient, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG):
        response = client.post(TEXT, json={**PLAIN, "prompt": "my secret"})
        client.post(TEXT, json={**PLAIN, "prompt": ["my secret"], "temperature": -1})
        client.post("/v1/my secret")
    assert response.headers["X-Request-Id"] in caplog.text
    assert "wrote 12 length" in caplog.text
    assert "secret" not in caplog.text


def test_the_log_counts_what_was_written_for_a_client_that_left(
    client: FlaskClient, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        response = client.post(TEXT, json={**PLAIN, "stream": True, "max_tokens": 40, "min_tokens": 40})
        parts = response.iter_encoded()
        for _ in range(6):
            next(parts)
        response.close()
    assert re.search(r"wrote ([1-9]\d*) gone", caplog.text), caplog.text
