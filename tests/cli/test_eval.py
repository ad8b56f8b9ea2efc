"""`fnlm eval`: a line for each model with the figures of `evaluate`, the demo world's questions, and its errors."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from click.testing import CliRunner, Result

from cli.main import cli
from fnlm import ModelConfig, checkpoint, data, init_params, init_state, key, optim, world
from fnlm.evaluate import evaluate


def fnlm(*words: str) -> Result:
    return CliRunner().invoke(cli, list(words))


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two sets of data, text and chat, and a run on the text with two checkpoints."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tale.txt").write_text("Once upon a time there was a text. " * 30, encoding="utf-8")
    talk = [{"prompt": f"How is {i}?", "completion": f"Fine, {i}."} for i in range(60)]
    (tmp_path / "talk.jsonl").write_text("".join(json.dumps(row) + "\n" for row in talk))
    assert fnlm("prepare", "tale.txt", "--tokenizer", "byte").exit_code == 0
    assert fnlm("prepare", "talk.jsonl", "--tokenizer", "data/tale").exit_code == 0
    run("runs/one", 1, 10)
    run("runs/one", 2, 20)
    checkpoint.mark_best("runs/one/checkpoints/00000010")
    return tmp_path


def run(folder: str, seed: int, step: int, where: str = "data/tale") -> None:
    dataset = data.open(where)
    cfg = ModelConfig(vocab_size=dataset.manifest["vocab_size"], n_layers=1, n_heads=2, d_model=16, seq_len=32)
    state = init_state(init_params(cfg, key(seed)), optim.sgd(0.1))
    config = {"model": asdict(cfg), "data": where, "kind": "text"}
    checkpoint.save(
        Path(folder) / "checkpoints",
        state._replace(step=state.step + step),
        config=config,
        tokenizer=Path(where) / "tokenizer.json",
    )


def figures(*words: str) -> list[dict[str, Any]]:
    result = fnlm("eval", *words, "--json")
    assert result.exit_code == 0, result.stderr
    found: list[dict[str, Any]] = json.loads(result.stdout)["models"]
    return found


def test_what_was_measured_before_a_mistake_is_shown() -> None:
    result = fnlm("eval", "runs/one", "runs/none", "--json", "--out", "results.json")
    assert result.exit_code == 4 and "there is no runs/none" in result.stderr
    assert [row["model"] for row in json.loads(result.stdout)["models"]] == ["runs/one"]
    assert fnlm("eval", "runs/none").stdout == ""


def test_the_figures_are_those_of_evaluate() -> None:
    (row,) = figures("runs/one")
    cfg, params, _ = checkpoint.load_params("runs/one/checkpoints/00000010")
    found = evaluate(params, cfg, data.open("data/tale").val)
    assert (row["step"], row["data"], row["split"], row["counted"]) == (10, "data/tale", "val", "all tokens")
    words = len(Path("tale.txt").read_text()[-row["bytes"] :].split())
    assert row["words"] in (words, words + 1)  # a word may lie across the border of the splits
    assert row["word_perplexity"] == pytest.approx(math.exp(row["loss"] * (row["tokens"] + 1) / row["words"]))
    assert row["byte_perplexity"] == pytest.approx(2 ** row["bits_per_byte"])
    assert {k: v for k, v in found._asdict().items() if k != "seconds"} == {
        k: row[k] for k in found._fields if k != "seconds"
    }
    assert row["tokens"] == len(data.open("data/tale").val.tokens) - 1


def test_options_reach_it() -> None:
    assert figures("runs/one", "--split", "train")[0]["tokens"] > figures("runs/one")[0]["tokens"]
    assert figures("runs/one", "--limit", "1")[0]["tokens"] == 32
    assert figures("runs/one", "--seq-len", "8", "--limit", "2")[0]["tokens"] == 16
    slid = figures("runs/one", "--stride", "4")[0]
    assert (slid["stride"], slid["tokens"]) == (4, figures("runs/one")[0]["tokens"])
    assert slid["loss"] != figures("runs/one")[0]["loss"] != figures("runs/one", "--precision", "bf16")[0]["loss"]


def test_any_text_is_measured_and_its_words_and_bytes_are_counted(here: Path) -> None:
    (here / "texts").mkdir()
    (here / "texts" / "a.txt").write_text("Größe zählt, and  more.\n", encoding="utf-8")
    (here / "texts" / "b.jsonl").write_text('{"text": "one"}\n{"text": "two words"}\n')
    (row,) = figures("runs/one", "--data", "texts")
    assert (row["words"], row["bytes"], row["tokens"], row["split"]) == (7, 27 + 3 + 9, 27 + 3 + 9, None)
    assert row["bits_per_byte"] == pytest.approx(row["loss"] / math.log(2))  # a byte tokenizer: each byte a token
    one, two = figures("runs/one", "--data", "texts/a.txt", "--data", "texts/b.jsonl")
    assert one["loss"] * 27 + two["loss"] * 12 == pytest.approx(row["loss"] * 39, rel=0.02)  # others' contexts differ
    assert fnlm("eval", "runs/one", "--data", "texts", "--split", "train").exit_code == 2


def test_every_checkpoint_and_a_file_of_results(here: Path) -> None:
    run("runs/two", 7, 5)
    rows = figures("runs/one", "runs/two", "--all-checkpoints", "--out", "out/results.json")
    assert [(r["model"], r["step"]) for r in rows] == [("runs/one", 10), ("runs/one", 20), ("runs/two", 5)]
    whole = json.loads((here / "out" / "results.json").read_text())
    assert whole["models"] == rows and whole["fnlm"] and whole["torch"]
    kept = [json.loads(line) for line in (here / "runs/one/evaluations.jsonl").read_text().splitlines()]
    assert [r["loss"] for r in kept] == [r["loss"] for r in rows[:2]] and all("measured" in r for r in kept)
    assert [p.name for p in (here / "out").iterdir()] == ["results.json"]


def test_lambada_and_hellaswag_from_files(here: Path) -> None:
    (here / "l.jsonl").write_text('{"text": "Once upon a time"}\n{"text": "there was a text."}\n')
    row = {"activity_label": "A", "ctx_a": "Once [x] upon", "ctx_b": "a", "endings": ["b", "time there"], "label": "1"}
    (here / "h.jsonl").write_text(json.dumps(row) + "\n")
    both = figures("runs/one", "--lambada", "l.jsonl", "--hellaswag", "h.jsonl")
    assert both[0]["tasks"]["lambada"]["examples"] == 2 and both[0]["tasks"]["lambada"]["perplexity"] > 1
    assert set(both[1]["tasks"]["hellaswag"]) == {"acc", "acc_norm", "examples"}
    run("runs/two", 7, 5)
    lines = fnlm("eval", "runs/one", "runs/two", "--lambada", "l.jsonl", "--limit", "1").stdout.splitlines()
    assert lines[0].split() == ["task", "metric", "runs/one", "runs/two"]
    assert lines[-1].split() == ["lambada", "examples", "1", "1"]


def test_interrupted_it_says_what_was_measured(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import signal

    import fnlm.evaluate as evaluating

    plain, seen = evaluating.nats, []

    def nats(*args: Any) -> Any:
        seen.append(1)
        if len(seen) == 3:
            signal.raise_signal(signal.SIGINT)
        return plain(*args)

    monkeypatch.setattr(evaluating, "nats", nats)
    monkeypatch.setattr(evaluating, "BATCH_TOKENS", 32)
    result = fnlm("eval", "runs/one", "runs/one", "--json")
    (row,) = json.loads(result.stdout)["models"]
    assert (result.exit_code, row["tokens"], row["complete"]) == (130, 3 * 32, False)
    said = "interrupted in 1 of 2 models: of runs/one 96 tokens of data/tale"
    assert result.stderr.splitlines()[-1] == said
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_tasks_need_lm_eval(monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    result = fnlm("eval", "runs/one", "--tasks", "hellaswag")
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.startswith("error: --tasks needs lm-eval: pip install 'fnlm[eval]'; --lambada and --hellaswag")


def test_rounded_to_int8_it_loses_little() -> None:
    wide, small = figures("runs/one")[0]["loss"], figures("runs/one", "--quantize")[0]["loss"]
    assert 0 < abs(small - wide) < 0.01
    assert figures("runs/one", "--quantize", "int8")[0]["loss"] == small
    assert 0.0001 < abs(figures("runs/one", "--quantize=int4")[0]["loss"] - wide) < 0.1
    result = fnlm("eval", "runs/one", "--quantize=int2")
    assert result.exit_code == 2
    assert "'int2' is not one of 'int8', 'int4'" in result.stderr


def test_the_checkpoint_can_be_chosen() -> None:
    steps = [figures("runs/one", "--checkpoint", c)[0]["step"] for c in ("best", "newest", "10", "20")]
    assert steps == [10, 20, 10, 20]
    result = fnlm("eval", "runs/one", "--checkpoint", "15")
    assert (result.exit_code, result.stdout) == (4, "")
    assert result.stderr == "error: runs/one/checkpoints has no checkpoint of step 15; it has 10, 20\n"


def test_the_table_has_a_line_for_each_model() -> None:
    run("runs/two", 7, 5)
    result = fnlm("eval", "runs/one", "runs/two", "--device", "cpu")
    assert result.exit_code == 0, result.stderr
    head, one, two = result.stdout.splitlines()
    assert head.split() == [
        "model", "step", "data", "loss", "perplexity", "ppl/word", "ppl/byte", "bits/byte", "tokens", "seconds"
    ]  # fmt: skip
    loss = figures("runs/two")[0]["loss"]
    assert one.startswith("runs/one    10  data/tale val  ")
    assert f"{loss:.4f}" in two
    assert f"{math.exp(loss):.4g}" in two
    assert len(result.stderr.splitlines()) == 2


def test_of_conversations_the_learnt_tokens_are_counted_and_it_says_so() -> None:
    result = fnlm("eval", "runs/one", "--data", "data/talk", "--limit", "2")
    assert result.stdout.splitlines()[2:] == [
        "of conversations only the learnt tokens are counted: the answers and their ends",
        f"measured on 2 of {figures('runs/one', '--data', 'data/talk')[0]['of_windows']} windows",
    ]
    (row,) = figures("runs/one", "--data", "data/talk")
    assert row["tokens"] == int(data.open("data/talk").val.mask[1:].sum())  # type: ignore[index]
    assert (row["counted"], row["bits_per_byte"]) == ("learnt tokens", None)


def test_data_of_another_tokenizer_are_refused() -> None:
    fnlm("prepare", "tale.txt", "--tokenizer", "char", "--out", "data/other")
    result = fnlm("eval", "runs/one", "--data", "data/other")
    assert (result.exit_code, result.stdout) == (4, "")
    assert result.stderr.startswith("error: data/other was made with another tokenizer (char of 18 tokens, sha256 ")
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        ((), 2, "error: name a model, such as runs/demo; see 'fnlm eval --help'"),
        (("runs/one", "--data", "data/none"), 4, "error: data/none does not exist"),
        (("runs/one", "--seq-len", "64"), 2, "error: seq_len=64 is not from 1 to the model's seq_len=32"),
        (("runs/one", "--stride", "33"), 2, "error: stride=33 is not from 1 to seq_len=32"),
        (("runs/one", "--checkpoint", "last"), 2, "error: --checkpoint last is not best, newest or the number of a"),
        (("runs/one", "--questions", "3", "--data", "data/tale"), 2, "error: --questions are asked without --data"),
    ],
)
def test_mistakes_are_one_line(words: tuple[str, ...], code: int, says: str) -> None:
    result = fnlm("eval", *words)
    assert (result.exit_code, result.stdout) == (code, "")
    assert result.stderr.startswith(says)
    assert result.stderr.count("\n") == 1


def test_a_model_that_is_not_there() -> None:
    result = fnlm("eval", "runs/on")
    assert result.exit_code == 4
    assert result.stderr == "error: there is no runs/on; did you mean 'one'?\n"


class Said(NamedTuple):
    text: str


def test_questions_are_asked_and_scored(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for generation knows every answer but those about colours: what is asked, and how it is scored."""
    known = {q.messages[-1]["content"]: q for q in world.questions(0, 180)}
    asked: list[str] = []

    def complete(
        params: Any, cfg: Any, tokenizer: Any, prompts: list[list[int]], settings: Any, *_: Any, **__: Any
    ) -> Any:
        assert settings.temperature == 0
        for ids in prompts:
            words = tokenizer.decode(ids)
            assert words.startswith("<|im_start|>user\n")
            assert words.endswith("<|im_end|>\n<|im_start|>assistant\n")
            asked.append(words.split("\n")[1].removesuffix("<|im_end|>"))
        return [Said("" if known[q].kind == "colour" else known[q].answer) for q in asked[-len(prompts) :]]

    monkeypatch.setattr("fnlm.generate.complete", complete)
    (row,) = figures("runs/one", "--questions", "180")
    assert sorted(asked) == sorted(q.messages[-1]["content"] for q in world.questions(0, 180))
    assert row["score"] == {kind: float(kind != "colour") for kind in world.KINDS} | {"overall": 160 / 180}
    lines = fnlm("eval", "runs/one", "--questions", "180").stdout.splitlines()
    assert lines[0].split() == ["right", "answers", "runs/one"]
    assert lines[-1].split() == ["all", "180", "88.9", "%"]
    assert ["colour", "0.0", "%"] in [line.split() for line in lines]
