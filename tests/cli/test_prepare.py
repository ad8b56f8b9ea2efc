"""`fnlm prepare`: what it prints where, what it writes, and its errors as one line with their exit codes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from cli.main import cli


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tale.txt").write_text("Once upon a time there was a text. " * 30, encoding="utf-8")
    talk = [{"prompt": f"How is {i}?", "completion": f"Fine, {i}."} for i in range(40)]
    (tmp_path / "talk.jsonl").write_text("".join(json.dumps(row) + "\n" for row in talk))
    return tmp_path


def fnlm(*words: str) -> Result:
    return CliRunner().invoke(cli, ["prepare", *words])


def test_the_table_on_stdout_and_the_story_on_stderr(here: Path) -> None:
    result = fnlm("tale.txt", "--tokenizer", "char")
    assert result.exit_code == 0
    assert result.stdout.splitlines() == [
        "data/tale: text, char tokenizer of 18 tokens, uint16",
        "  split  tokens  documents   text  bytes a token",
        "  train     945          1  945 B           1.00",
        "  val       105          1  105 B           1.00",
    ]
    assert result.stderr == "1 document, 1,050 bytes of text: its last 10 % are to validate with\n"
    assert sorted(p.name for p in (here / "data" / "tale").iterdir()) == [
        "manifest.json", "tokenizer.json", "train.bin", "val.bin",
    ]  # fmt: skip


def test_json_is_the_manifest(here: Path) -> None:
    result = fnlm("tale.txt", "--tokenizer", "byte", "--json", "--out", "made")
    assert json.loads(result.stdout) == json.loads((here / "made" / "manifest.json").read_text())


def test_a_conversation_is_shown_with_what_is_learnt() -> None:
    result = fnlm("talk.jsonl", "--tokenizer", "bpe:300", "--show", "2")
    assert result.exit_code == 0, result.stderr
    assert " learnt" in result.stdout.splitlines()[1]
    documents = [line for line in result.stdout.splitlines() if line.startswith("<|im_start|>")]
    assert len(documents) == 2
    before, _, after = documents[0].partition("[")
    assert before.replace("|", "").endswith("assistant\\n")
    assert after.replace("|", "").endswith("[<im_end>]\\n<endoftext>")
    assert fnlm("--show", "2", "data/talk").stdout == result.stdout
    assert fnlm("--show", "1", "data/talk").stdout.count("document ") == 1


def test_verify() -> None:
    fnlm("talk.jsonl", "--tokenizer", "byte")
    result = fnlm("--verify", "data/talk")
    assert (result.exit_code, len(result.stdout.splitlines())) == (0, 5)
    mask = Path("data/talk/train.mask")
    mask.write_bytes(mask.read_bytes().replace(b"\1", b"\0", 1))
    result = fnlm("--verify", "data/talk")
    assert result.exit_code == 4
    assert result.stderr == "error: data/talk/train.mask was changed: its sha256 differs; prepare the data again\n"


def test_the_tokenizer_of_other_data() -> None:
    fnlm("tale.txt", "--tokenizer", "bpe:270")
    result = fnlm("talk.jsonl", "--tokenizer", "data/tale")
    assert result.exit_code == 0, result.stderr
    assert "chat, bpe tokenizer of 270 tokens" in result.stdout
    assert Path("data/talk/tokenizer.json").read_bytes() == Path("data/tale/tokenizer.json").read_bytes()


def test_again() -> None:
    fnlm("tale.txt", "--tokenizer", "char")
    again = fnlm("tale.txt", "--tokenizer", "char")
    assert (again.exit_code, again.stderr) == (0, "data/tale is already prepared from these files\n")
    other = fnlm("tale.txt", "--tokenizer", "byte")
    assert other.exit_code == 2
    assert other.stderr == "error: data/tale already holds other data; choose another --out, or --force to replace it\n"
    assert fnlm("tale.txt", "--tokenizer", "byte", "--force").exit_code == 0


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        ([], 2, "name a file, a folder or a pattern to prepare"),
        (["none.txt"], 1, "none.txt: no such file, folder or pattern"),
        (["*.txt"], 2, "what to call the data of *.txt? give --out data/NAME"),
        (["tale.txt", "--tokenizer", "gtp2"], 2, "there is no tokenizer 'gtp2'; did you mean 'gpt2'?"),
        (
            ["tale.txt", "--tokenizer", "runs/base"],
            2,
            "there is no runs/base; give the path of a tokenizer.json, of prepared data or of a run",
        ),
        (["tale.txt", "--tokenizer", "bpe:9"], 2, "vocab_size=9 has no room for 256 bytes and 3 special tokens"),
        (["tale.txt", "--val-fraction", "2"], 2, "val_fraction=2.0 must be between 0 and 1"),
        (["tale.txt", "--tokenizer", "gpt2:none"], 2, "gpt2 needs vocab.bpe (and encoder.json); there is no none"),
        (["empty.txt"], 4, "empty.txt is empty"),
        (["broken.txt"], 4, "broken.txt: byte 3 is not UTF-8 (invalid start byte); convert the file first"),
        (["--verify", "none"], 4, "none does not exist; make it with 'fnlm prepare PATH --out none'"),
        (["tale.txt", "--tokenizer", "broken.txt"], 2, "broken.txt is not a tokenizer.json"),
    ],
)
def test_errors_are_one_line(words: list[str], code: int, says: str, here: Path) -> None:
    (here / "empty.txt").touch()
    (here / "broken.txt").write_bytes(b"abc\xff")
    result = fnlm(*words)
    assert (result.exit_code, result.stdout) == (code, "")
    last = result.stderr.splitlines()[-1]
    assert last.startswith("error: " + says), result.stderr
    assert "Traceback" not in result.stderr
    assert not list(here.glob("data/.*"))


def test_data_by_name(here: Path) -> None:
    result = fnlm("demo", "--documents", "60")
    assert result.exit_code == 0, result.stderr
    lines = result.stdout.splitlines()
    assert [line for line in lines if line.startswith("data")] == [
        "data/demo: text, bpe tokenizer of 657 tokens, uint16",
        "data/demo-chat: chat, bpe tokenizer of 657 tokens, uint16",
    ]
    assert [m["kind"] for m in json.loads(fnlm("demo", "--documents", "60", "--json").stdout)] == ["text", "chat"]
    assert sorted(p.name for p in (here / "data").iterdir()) == ["demo", "demo-chat"]
    shown = fnlm("demo", "--documents", "60", "--show", "1")
    assert shown.stdout.count("document 1: ") == 2


def test_a_file_of_that_name_comes_first(here: Path) -> None:
    (here / "demo").mkdir()
    (here / "demo" / "a.txt").write_text("text " * 99)
    assert "data/demo: text, byte tokenizer" in fnlm("demo", "--tokenizer", "byte").stdout


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["demo", "--val-fraction", "0.2"], "--val-fraction has no meaning here: the data of a name are validated on"),
        (["tale.txt", "--tokens", "3"], "--tokens has no meaning here: they are those of mix"),
        (["mix", "a=1", "b=2", "--val", "x.txt"], "--val has no meaning here: the folders of a mixture are prepared"),
    ],
)
def test_options_that_have_no_meaning(words: list[str], says: str) -> None:
    result = fnlm(*words)
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.splitlines()[-1].startswith("error: " + says), result.stderr


def test_a_run_lends_its_tokenizer(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert fnlm("tale.txt", "--tokenizer", "char").exit_code == 0
    saved = here / "runs" / "one" / "checkpoints" / "00000001"
    saved.mkdir(parents=True)
    (saved / "tokenizer.json").write_bytes((here / "data/tale/tokenizer.json").read_bytes())
    asked: list[str] = []
    monkeypatch.setattr("cli.prepare.locate", lambda path: asked.append(str(path)) or saved)
    for run in ("runs/one", "runs/one@1"):
        result = fnlm("tale.txt", "--tokenizer", run, "--out", f"data/{Path(run).name}")
        assert result.exit_code == 0, result.stderr
        assert "char tokenizer" in result.stdout
    assert asked == ["runs/one", "runs/one@1"]
