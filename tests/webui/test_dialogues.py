"""Models with a chat template of their own: through the API, tokenize, the terminal and `fnlm sample`, to the token."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from flask.testing import FlaskClient

from cli.main import cli
from fnlm import trained
from fnlm.generate import Generation, complete, turns_of
from fnlm.sampling import Settings
from tests.templates import ENDED, GEMMA, LLAMA, PLAIN, ZEPHYR, came, talk
from tests.webui.tiny import save
from webui.app import create_app
from webui.engine import Engine
from webui.jobs import Job, kept
from webui.models import Models
from webui.prompts import TooLong, chat_ids

NAMES = {"llama": LLAMA, "zephyr": ZEPHYR, "gemma": GEMMA, "plain": PLAIN}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("templates")
    for seed, (name, template) in enumerate(NAMES.items()):
        save(folder / name, "text", seed=seed, seq_len=160, tokenizer=ENDED, more=came(template))
    crossed = came("{% for m in messages %}{{ m.content + 'xxx\n' }}{% endfor %}")
    save(folder / "crossed", "text", seq_len=160, tokenizer=ENDED, more=crossed)
    return folder


@pytest.fixture(scope="module")
def engine(runs: Path) -> Iterator[Engine]:
    running = Engine(Models([runs]), streams=2, most_tokens=300).start()
    yield running
    running.stop()


@pytest.fixture
def client(engine: Engine) -> FlaskClient:
    return create_app(engine).test_client()


def asked(client: FlaskClient, name: str, messages: list[dict[str, str]], **fields: Any) -> Any:
    body = {"model": name, "messages": messages, "temperature": 0, "max_tokens": 12, **fields}
    return client.post("/v1/chat/completions", json=body)


def direct(runs: Path, name: str, messages: list[dict[str, str]], most: int = 12) -> Generation:
    model = trained.load(runs / name)
    settings = turns_of(Settings(temperature=0, max_tokens=most), model.dialogue)
    ids = [model.dialogue.prompt(messages)]
    return complete(model.params, model.cfg, model.tokenizer, ids, settings, torch.tensor([0, 1]))[0]


@pytest.mark.parametrize("name", NAMES)
def test_the_api_asks_as_the_template_does(name: str, client: FlaskClient, runs: Path) -> None:
    said = talk("hi", "ho", "and </s> you?")
    answer = asked(client, name, said).get_json()
    wanted = direct(runs, name, said)
    assert answer["choices"][0]["message"]["content"] == wanted.text
    assert answer["usage"]["prompt_tokens"] == wanted.prompt_tokens
    told = client.post("/v1/tokenize", json={"model": name, "messages": said}).get_json()
    ids = [token["id"] for token in told["tokens"]]
    assert ids == trained.load(runs / name).dialogue.prompt(said)
    assert sum(token["special"] for token in told["tokens"]) == {"llama": 3, "zephyr": 3, "gemma": 4, "plain": 0}[name]
    kinds = {m["id"]: m["fnlm"]["kind"] for m in client.get("/v1/models").get_json()["data"]}
    assert kinds[name] == "chat"


def test_a_turn_ends_as_the_template_ends_it(client: FlaskClient) -> None:
    """A bias makes the model say what closes a turn there, which must not be shown."""
    for name, token in (("llama", "</s>"), ("gemma", "<|end|>")):
        bias = {str(ENDED.special[token]): 100}
        choice = asked(client, name, talk("hi"), logit_bias=bias).get_json()["choices"][0]
        assert (choice["message"]["content"], choice["finish_reason"]) == ("", "stop")
        choice = asked(client, name, talk("hi"), logit_bias=bias, min_tokens=3).get_json()["choices"][0]
        assert len(choice["message"]["content"]) > 0
    bias = {str(ord("x")): 100}  # what it says for ever, and what stands between two turns
    choice = asked(client, "crossed", talk("hi"), logit_bias=bias).get_json()["choices"][0]
    assert (choice["message"]["content"], choice["finish_reason"]) == ("", "stop")
    choice = asked(client, "plain", talk("hi"), logit_bias=bias).get_json()["choices"][0]
    assert (choice["message"]["content"], choice["finish_reason"]) == ("x" * 12, "length")


def test_instructions_that_a_template_refuses(client: FlaskClient, runs: Path) -> None:
    for route in ("chat/completions", "tokenize"):
        refused = client.post(f"/v1/{route}", json={"model": "gemma", "messages": talk("hi", system="Be brief.")})
        error = refused.get_json()["error"]
        assert (refused.status_code, error["param"]) == (400, "messages")
        assert error["message"] == (
            "the chat template refuses a conversation: no system role; this model takes no system message here, "
            "so leave it out"
        )
    assert asked(client, "llama", talk("hi", system="Be brief.")).status_code == 200
    answer = CliRunner().invoke(cli, ["chat", str(runs / "gemma"), "--system", "Be brief."], input="hi\n")
    assert (answer.exit_code, answer.stdout) == (1, "")
    assert answer.stderr.splitlines()[-1] == f"error: {error['message']}"


def test_the_oldest_turns_are_left_out(engine: Engine) -> None:
    for name, n in product(NAMES, (9, 11, 13, 15, 17, 19)):
        contents = ["ab"[i % 2] * 20 for i in range(n)]
        reader = engine.models.reader(name)
        for system in (None, "S" * 9)[: 1 if name == "gemma" else 2]:
            first = talk(system=system)
            ids, dropped = chat_ids(reader, [*first, *talk(*contents)])
            assert dropped > 0 and dropped % 2 == 0
            assert ids == reader.dialogue.prompt([*first, *talk(*contents)[dropped:]])
            assert len(ids) <= reader.context - reader.context // 8
            more = reader.dialogue.prompt([*first, *talk(*contents)[dropped - 2 :]])
            assert len(more) > reader.context - reader.context // 8
        with pytest.raises(TooLong, match=r"the last message needs \d+ tokens"):
            chat_ids(reader, talk("a", "b", "c" * 155))


def test_what_cannot_fit_is_not_read(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    reader, read = engine.models.reader("llama"), list[int]()
    encode = type(reader.tokenizer).encode_batch

    def counted(self: Any, texts: Any) -> Any:
        read.append(sum(map(len, texts)))
        return encode(self, texts)

    monkeypatch.setattr(type(reader.tokenizer), "encode_batch", counted)
    assert chat_ids(reader, talk(*["word " * 5000] * 40, "a", "b", "c"))[1] == 40
    assert sum(read) < 1000


def test_the_next_turn_reads_only_what_is_new(client: FlaskClient, engine: Engine) -> None:
    def reused() -> int:
        found = re.search(r"^fnlm_prompt_tokens_reused_total (\d+)", engine.metrics.text({}), re.MULTILINE)
        return int(found[1]) if found else 0

    for name in NAMES:
        said = talk("tell me something", "nothing", f"{name}?")
        first = asked(client, name, said, min_tokens=5, max_tokens=5).get_json()
        answer, before = first["choices"][0]["message"], reused()
        asked(client, name, [*said, answer, *talk("more")])
        assert reused() - before >= first["usage"]["prompt_tokens"], name


def test_what_a_sliding_text_keeps(client: FlaskClient, engine: Engine) -> None:
    reader = engine.models.reader("llama")
    job = Job("llama", talk("hello", system="Be brief."), slide=True)
    begins = "<s>[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\n"
    assert kept(reader, job) == len(begins) - len("<s>") + 1 + 4
    long = asked(client, "llama", talk("hi"), slide=True, max_tokens=301)
    assert (long.status_code, long.get_json()["error"]["param"]) == (400, "max_tokens")
    assert long.get_json()["error"]["message"] == (
        "max_tokens=301 is more than the 300 that this server writes of a text that slides; ask for 300 at most"
    )
    assert asked(client, "llama", talk("hi"), max_tokens=301).status_code == 200  # it ends with the context


def test_in_the_terminal_and_by_sample(runs: Path) -> None:
    for name in NAMES:
        wanted = direct(runs, name, talk("hi there"))
        words = ["--temperature", "0", "--max-new-tokens", "12"]
        said = CliRunner().invoke(cli, ["chat", str(runs / name), *words], input="hi there\n")
        assert "It was trained on plain text" not in said.stderr
        assert said.stdout == "".join(c for c in wanted.text if c.isprintable() or c in "\n\t") + "\n"
        sampled = CliRunner().invoke(cli, ["sample", str(runs / name), "--prompt", "hi there", *words, "--json"])
        (sample,) = json.loads(sampled.stdout)["samples"]
        assert (sample["text"], sample["prompt_tokens"]) == (wanted.text, wanted.prompt_tokens)


def test_a_run_that_was_trained_by_a_template(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From nothing, so that no import brought the template: prompts, samples while it trains, and the export."""
    monkeypatch.chdir(tmp_path)
    rows = [json.dumps({"prompt": f"q{i}", "completion": f"a{i}"}) + "\n" for i in range(40)]
    Path("talks.jsonl").write_text("".join(rows))
    Path("zephyr.jinja").write_text(ZEPHYR)
    ENDED.save("tokenizer.json")
    shape = [
        "n_layers=1",
        "n_heads=2",
        "d_model=16",
        "seq_len=32",
        "batch_size=2",
        "steps=2",
        'sample_prompts=["who?"]',
    ]
    for words in (
        ["prepare", "talks.jsonl", "--out", "data", "--tokenizer", "tokenizer.json", "--template", "zephyr.jinja"],
        ["train", "shakespeare-char-cpu", "data", "--out", "run", "--quiet", *shape, "norm=layernorm"],
        ["export", "run", "--out", "out", "--no-parity"],
    ):
        result = CliRunner().invoke(cli, words)
        assert result.exit_code == 0, result.stderr
    found = trained.load("run")
    asked_for = ENDED.decode(found.dialogue.prompt(talk("who?")))
    assert asked_for == "<|user|>\nwho?</s>\n<|assistant|>\n"
    assert (found.is_chat, found.dialogue.learnt, found.dialogue.ends) == (True, True, {ENDED.special["</s>"]})
    samples = next(Path("run/samples").iterdir()).read_text(encoding="utf-8")
    assert samples.startswith(f"{asked_for}\u23f5")
    assert Path("out/chat_template.jinja").read_text() == ZEPHYR
    assert json.loads(Path("out/generation_config.json").read_text())["eos_token_id"] == ENDED.special["</s>"]
    assert trained.load("out").dialogue.text == ZEPHYR
