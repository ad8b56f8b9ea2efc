"""`fnlm chat`: through a pipe and on a terminal, its commands, Ctrl-C, and its errors."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import pytest
from click.testing import CliRunner, Result

from cli import chat
from cli.chat import Talk
from cli.main import cli
from tests.webui.tiny import Script, save
from webui.engine import Engine, Ticket
from webui.models import Models


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("talks")
    save(folder / "plain", "text")
    save(folder / "talk", "chat")
    return folder


def fnlm(*words: object, said: str = "") -> Result:
    return CliRunner().invoke(cli, ["chat", *map(str, words)], input=said)


def test_through_a_pipe(runs: Path) -> None:
    said = "hi\n\nwho are you?\n"
    result = fnlm(runs / "talk", "--seed", "1", "--max-new-tokens", "5", said=said)
    assert result.exit_code == 0, result.stderr
    assert "talk, 8,288 parameters, step 7" in result.stderr
    assert result.stdout
    again = fnlm(runs / "talk", "--seed", "1", "--max-new-tokens", "5", said=said)
    assert again.stdout == result.stdout
    assert fnlm(runs / "talk", "--seed", "2", "--max-new-tokens", "5", said=said).stdout != result.stdout


def test_a_plain_model_continues(runs: Path) -> None:
    result = fnlm(runs / "plain", "--min-tokens", "300", said="Once upon\n")  # as many as the context has
    assert result.exit_code == 0
    assert "It was trained on plain text: it continues what you write" in result.stderr


def test_commands(runs: Path, tmp_path: Path) -> None:
    file = tmp_path / "said.jsonl"
    said = f"/system Be brief.\nhi\n/regen\n/temp 0\n/topk 3\n/tokens 4\n/temp hot\n/temp -1\n/what\n/save {file}\n"
    said += "/clear\n/regen\n/help\n/exit\nnever said\n"
    result = fnlm(runs / "talk", "--seed", "1", "--max-new-tokens", "6", said=said)
    assert result.exit_code == 0, result.stderr
    messages = json.loads(file.read_text(encoding="utf-8"))["messages"]
    assert [m["role"] for m in messages] == ["system", "user", "assistant"]
    assert messages[:2] == [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hi"}]
    for line in (
        "(instructions set)", "(temperature 0.0)", "(top_k 3)", "(max_tokens 4)", "hot is not a number",
        "there is no /what; /help lists what there is", f"(saved as {file})", "(a new conversation)",
        "there is no answer yet",
    ):  # fmt: skip
        assert line in result.stderr.splitlines()
    assert "temperature=-1.0" in result.stderr
    again = fnlm(runs / "talk", said=f"/save {file}\nhello\n/save! {file}\n/save {tmp_path}\n")
    assert f"{file} is there already; /save! {file} writes over it" in again.stderr.splitlines()
    assert json.loads(file.read_text(encoding="utf-8"))["messages"][0]["content"] == "hello"
    assert chat.HELP.splitlines()[0] in result.stderr


def test_what_cannot_be_answered_costs_the_exit_code(runs: Path) -> None:
    result = fnlm(runs / "talk", said="x" * 100 + "\nhi\n")
    assert result.exit_code == 1
    assert "error: the last message needs 119 tokens" in result.stderr
    assert result.stdout.count("\n") >= 1  # the next line is answered all the same


def test_turns_that_are_left_out_are_said(runs: Path) -> None:
    result = fnlm(runs / "talk", "--max-new-tokens", "2", said="a long one indeed\nanother long one\nand more\n")
    assert "(the conversation outgrew what the model can read: its oldest 2 messages were left out)" in result.stderr


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        (["none"], 4, "there is no none"),
        (["."], 4, ". holds 2 models; choose one of plain, talk"),
        (
            ["plain/checkpoints/00000007.params/config.json"],
            4,
            "plain/checkpoints/00000007.params/config.json holds no model",
        ),
        (["talk", "--temperature", "-1"], 2, "temperature=-1.0"),
        (["talk", "--top-p", "0"], 2, "top_p=0.0"),
        ([], 2, "Missing argument 'MODEL'"),
    ],
)
def test_errors_are_one_line(
    words: list[str], code: int, says: str, runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(runs)
    result = fnlm(*words, said="hi\n")
    assert (result.exit_code, result.stdout) == (code, "")
    assert result.stderr.startswith("error: " + says)
    assert result.stderr.count("\n") == 1


def test_input_that_is_not_utf8(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"\xff\n"), "utf-8", "surrogateescape"))
    talk = Talk(next(iter(Models([runs / "talk"]).about().values())), cast(Engine, None), {})
    with pytest.raises(ValueError, match=r"^the input is not UTF-8$"):
        talk.run()


def test_escape_codes_are_not_written() -> None:
    assert (
        chat.harmless("a\x1b[2Jb\r\x07\x9bc\n\té \U0001f469\u200d\U0001f4bb")
        == "a[2Jbc\n\té \U0001f469\u200d\U0001f4bb"
    )


@pytest.fixture
def talk(runs: Path) -> Iterator[Callable[[Script], Talk]]:
    engines: list[Engine] = []

    def begin(script: Script) -> Talk:
        models = Models([runs / "talk"])
        engines.append(Engine(models, streams=1, batch=script).start())
        return Talk(models.about()["talk"], engines[0], {}, terminal=True)

    yield begin
    for engine in engines:
        engine.stop()


def test_ctrl_c_stops_the_answer_and_a_second_one_leaves(
    talk: Callable[[Script], Talk], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    script = Script(pause=0.001)
    session = talk(script)
    inputs = iter(["hi", KeyboardInterrupt])
    got = [0]
    get = Ticket.get

    def interrupted(self: Ticket, timeout: float | None = None) -> Any:
        got[0] += 1
        if got[0] == 4:
            raise KeyboardInterrupt
        return get(self, timeout)

    def typed(_: str) -> str:
        value = next(inputs)
        if isinstance(value, str):
            return value
        raise value

    monkeypatch.setattr(Ticket, "get", interrupted)
    monkeypatch.setattr("builtins.input", typed)
    assert session.run() == 130
    assert session.messages == [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "xx"}]
    out = capsys.readouterr()
    assert out.out == "xx\n\n"
    assert "(stopped; Ctrl-C again leaves)" in out.err
    session.engine.stop()
    assert session.engine.load()["active"] == 0


def test_the_end_of_input_leaves(talk: Callable[[Script], Talk], monkeypatch: pytest.MonkeyPatch) -> None:
    def ended(_: str) -> str:
        raise EOFError

    monkeypatch.setattr("builtins.input", ended)
    assert talk(Script()).run() == 0
