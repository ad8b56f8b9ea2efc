"""What a request may ask for: prompts scored, texts that slide, drafts, rarer fields; each against the library."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from flask.testing import FlaskClient

import fnlm
from fnlm import random, trained
from fnlm.decode import prepare
from fnlm.generate import complete
from fnlm.sampling import Settings
from fnlm.speculate import Begin, lookup, with_model
from fnlm.tokenizers import Tokenizer
from fnlm.tokens import SINKS
from tests.webui.test_app import CHAT, PLAIN, TEXT, lines
from tests.webui.test_engine import rest
from tests.webui.tiny import save
from webui.app import create_app
from webui.engine import Engine, Job
from webui.models import Models


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("drafted")
    save(made / "plain", "text", seq_len=64, positions="rope")
    save(made / "talk", "chat", seq_len=128, positions="rope")
    return made


@pytest.fixture(scope="module")
def build(folder: Path) -> Iterator[Callable[..., Engine]]:
    made: list[Engine] = []

    def one(**options: Any) -> Engine:
        made.append(Engine(Models([folder], precision=options.pop("precision", "auto")), **options).start())
        return made[-1]

    yield one
    for engine in made:
        engine.stop()


def want(model: Path, job: dict[str, Any], seed: int, prompt: str = "abc", **how: Any) -> str:
    found = trained.load(model)
    key = random.fold_in(random.key(seed), torch.arange(1))
    settings = Settings(**{"temperature": 1.0, **job})
    return complete(found.params, found.cfg, found.tokenizer, [prompt], settings, key, **how)[0].text


def test_a_prompt_is_scored(client: FlaskClient, engine: Engine) -> None:
    """echo with logprobs: the prompt's own tokens too, the first with null; streamed and whole alike."""
    asked = {**PLAIN, "prompt": "a tale", "echo": True, "logprobs": 2, "max_tokens": 3}
    body = client.post(TEXT, json=asked).get_json()
    (choice,) = body["choices"]
    told = choice["logprobs"]
    assert choice["text"].startswith("a tale")
    assert told["ids"][:6] == list(b"a tale")
    assert told["text_offset"][:6] == list(range(6))
    assert (told["token_logprobs"][0], told["top_logprobs"][0]) == (None, None)
    model = trained.load(engine.models.paths()["plain"])
    logp = fnlm.forward(model.params, torch.tensor([told["ids"]]), model.cfg)[0].log_softmax(-1)
    for i, (token, said) in enumerate(zip(told["ids"][1:], told["token_logprobs"][1:], strict=True)):
        assert said == pytest.approx(float(logp[i, token]), abs=1e-4)
        assert len(told["top_logprobs"][i + 1]) == 2
    assert body["usage"] == {"prompt_tokens": 6, "completion_tokens": 3, "total_tokens": 9}
    plain = client.post(TEXT, json={**asked, "echo": False, "logprobs": None}).get_json()["choices"][0]
    assert choice["text"] == "a tale" + plain["text"]
    parts = lines(client.post(TEXT, json={**asked, "stream": True}))
    assert "".join(p["choices"][0]["text"] for p in parts) == choice["text"]
    streamed = [i for p in parts if p["choices"][0]["logprobs"] for i in p["choices"][0]["logprobs"]["ids"]]
    assert streamed == told["ids"]
    ids = client.post(TEXT, json={**asked, "prompt": list(b"a tale")}).get_json()["choices"][0]
    assert ids == choice


def test_a_prompt_is_only_scored(client: FlaskClient) -> None:
    """max_tokens 0: what benchmarks of language models ask for."""
    asked = {**PLAIN, "prompt": ["ab", "b", ""], "echo": True, "logprobs": 0, "max_tokens": 0}
    body = client.post(TEXT, json=asked).get_json()
    assert [c["text"] for c in body["choices"]] == ["ab", "b", ""]
    assert [len(c["logprobs"]["ids"]) for c in body["choices"]] == [2, 1, 0]
    assert body["usage"]["completion_tokens"] == 0
    assert {c["finish_reason"] for c in body["choices"]} == {"length"}
    echoed = client.post(TEXT, json={**asked, "logprobs": None, "prompt": [97, 98]}).get_json()
    assert echoed["choices"][0] == {"index": 0, "text": "ab", "logprobs": None, "finish_reason": "length"}


def test_a_long_prompt_is_scored_in_pieces(build: Callable[..., Engine], folder: Path, tmp_path: Path) -> None:
    save(tmp_path / "long", "text", seq_len=400)
    engine = Engine(Models([tmp_path]), streams=2).start()
    asked = {"prompt": "abcdefg " * 40, "echo": True, "logprobs": 0, "max_tokens": 0}
    told = create_app(engine).test_client().post(TEXT, json=asked).get_json()["choices"][0]["logprobs"]
    engine.stop()
    model = trained.load(tmp_path / "long")
    ids = torch.tensor([told["ids"]])
    logp = fnlm.forward(model.params, ids, model.cfg)[0, :-1].log_softmax(-1).gather(-1, ids[0, 1:, None])
    assert told["token_logprobs"][1:] == pytest.approx(logp.flatten().tolist(), abs=1e-4)


def test_rarer_fields(client: FlaskClient, engine: Engine) -> None:
    path = engine.models.paths()["plain"]
    body = client.post(TEXT, json={**PLAIN, "typical_p": 0.3}).get_json()
    assert body["choices"][0]["text"] == want(path, {"typical_p": 0.3, "max_tokens": 12}, 3)
    free = client.post(TEXT, json={**PLAIN, "logprobs": 0}).get_json()["choices"][0]["logprobs"]["ids"]
    stop = next(i for i in free[2:] if i not in free[:2])
    cut = client.post(TEXT, json={**PLAIN, "stop_token_ids": [stop], "logprobs": 0}).get_json()["choices"][0]
    assert (cut["finish_reason"], cut["logprobs"]["ids"]) == ("stop", free[: free.index(stop)])
    kept = client.post(TEXT, json={**PLAIN, "stop_token_ids": [stop], "min_tokens": 12}).get_json()
    assert kept["usage"]["completion_tokens"] == 12


@pytest.mark.parametrize("temperature", [0, 1.0])
def test_a_text_slides_past_the_contexts_end(client: FlaskClient, engine: Engine, temperature: float) -> None:
    """As the library's does, token for token; without being asked it ends there."""
    asked = {**PLAIN, "max_tokens": 150, "min_tokens": 150, "temperature": temperature}
    body = client.post(TEXT, json={**asked, "slide": True, "slide_keep": 3}).get_json()
    settings = {"max_tokens": 150, "min_tokens": 150, "temperature": temperature}
    path = engine.models.paths()["plain"]
    assert body["choices"][0]["text"] == want(path, settings, 3, slide=True, keep=3)
    assert body["usage"]["completion_tokens"] == 150
    several = client.post(TEXT, json={**asked, "slide": True, "slide_keep": 3, "n": 3}).get_json()
    assert several["choices"][0]["text"] == body["choices"][0]["text"]
    short = client.post(TEXT, json=asked).get_json()
    assert (short["usage"]["completion_tokens"], short["choices"][0]["finish_reason"]) == (61, "length")
    default = client.post(TEXT, json={**asked, "slide": True}).get_json()["choices"][0]["text"]
    assert default == want(path, settings, 3, slide=True, keep=SINKS)


def test_a_conversation_that_slides_keeps_its_instructions(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, seen = Engine(Models([folder]), streams=1), list[list[int]]()
    monkeypatch.setattr("webui.stage.slid", lambda ids, size, keep: seen.append(ids[:keep]) or ids[:keep] + ids[-size // 2 :])  # type: ignore[func-returns-value]  # fmt: skip  # noqa: E501
    client = create_app(engine.start()).test_client()
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hi"}]
    asked = {"model": "talk", "messages": messages, "max_tokens": 120, "min_tokens": 120, "slide": True, "seed": 1}
    assert client.post(CHAT, json=asked).get_json()["usage"]["completion_tokens"] == 120
    found = bytes(i for i in seen[0] if i < 256).decode()
    assert found.startswith("system\nBe brief.\n")
    whole = client.post(CHAT, json={**asked, "max_tokens": None, "min_tokens": 900}).get_json()
    assert whole["usage"]["completion_tokens"] == 128  # without a limit as many as the context has
    engine.stop()


def drafting(folder: Path, by: str) -> Callable[[Tokenizer], Begin | None]:
    if by == "lookup":
        return lambda tokenizer: lookup
    model = trained.load(folder / ("plain" if by == "itself" else "talk"))
    return lambda tokenizer: with_model(prepare(model.params, model.cfg), model.cfg, tokenizer.vocab_size)


@pytest.mark.parametrize("by", ["lookup", "itself", "other"])
def test_speculated_replies_are_the_plain_ones(folder: Path, build: Callable[..., Engine], by: str) -> None:
    """Greedy, and with lookup whatever is drawn; with stops, scores, and past the context's end."""
    plain, engine = build(streams=8), build(streams=8, draft=drafting(folder, by))
    wishes: list[dict[str, Any]] = [
        {"temperature": 0, "max_tokens": 40, "min_tokens": 40},
        {"temperature": 0, "max_tokens": 40, "frequency_penalty": 0.4},
        {"temperature": 0, "max_tokens": 100, "min_tokens": 100},
    ]
    if by == "lookup":
        wishes += [{"temperature": 0.7, "top_p": 0.9, "max_tokens": 40}, {"temperature": 0.2, "max_tokens": 30}]
    jobs = [
        Job("plain", prompt="abcabcab", settings=w, seed=5, top=1, slide=w["max_tokens"] == 100, keep=4) for w in wishes
    ]
    got, asked = [engine.submit([job]) for job in jobs], [plain.submit([job]) for job in jobs]
    for ours, theirs in zip(got, asked, strict=True):
        assert rest(ours)[-1].value == rest(theirs)[-1].value

    def of(name: str) -> int:
        found = re.search(rf"^{name} (\d+)", engine.metrics.text({}), re.MULTILINE)
        return int(found[1]) if found else 0

    drafted, accepted = of("fnlm_drafted_tokens_total"), of("fnlm_accepted_tokens_total")
    assert 0 < accepted <= drafted
    assert by != "itself" or accepted > 0.5 * drafted  # penalties are not the draft's


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("by", ["lookup", "other"])
def test_speculated_replies_do_not_see_their_neighbours(
    folder: Path, build: Callable[..., Engine], by: str, precision: str
) -> None:
    engine = build(streams=8, draft=drafting(folder, by), precision=precision)
    jobs = [
        Job("plain", prompt="xyxyx" * n, settings={"max_tokens": 30, "temperature": t}, seed=n)
        for n, t in ((1, 0.5), (3, 1.0), (2, 0), (5, 0.3))
    ]
    alone = [rest(engine.submit([job]))[-1].value for job in jobs]
    for _ in range(2):
        tickets = [engine.submit([job]) for job in jobs]
        assert [rest(ticket)[-1].value for ticket in tickets] == alone
