"""`fnlm sample`: what it prints where, its JSON, and its errors as one line with their exit codes."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result

import fnlm as library
from cli.main import cli
from fnlm import checkpoint, optim, trained
from fnlm.quantize import quantize
from fnlm.tokenizers import Byte, Char, Tokenizer
from fnlm.types import TrainState

CHAR = Char("\n abcdefgh")


def save(folder: Path, tokenizer: Tokenizer, kind: str, steps: tuple[int, ...] = (1,), seq_len: int = 48) -> None:
    """A run with untrained models, one for each step."""
    cfg = library.ModelConfig(
        vocab_size=tokenizer.vocab_size + 3, n_layers=1, n_heads=2, d_model=16, seq_len=seq_len, positions="rope"
    )
    beside = tokenizer.save(folder.parent / f"{folder.name}.json")
    for step in steps:
        params = library.init_params(cfg, library.key(step))
        state = TrainState(torch.tensor(step), params, optim.sgd(0.1).init(params), library.key(0))
        config = {"model": asdict(cfg), "kind": kind}
        checkpoint.save(folder / "checkpoints", state, config=config, tokenizer=beside)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    save(folder / "letters", CHAR, "text", (1, 2))
    save(folder / "talk", Byte(), "chat", seq_len=100)
    return folder


@pytest.fixture(autouse=True)
def here(models: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(models)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def fnlm(*words: str, stdin: str | bytes | None = None) -> Result:
    return CliRunner().invoke(cli, ["sample", *words], input=stdin)


def good(*words: str, **more: Any) -> str:
    result = fnlm(*words, **more)
    assert result.exit_code == 0, result.stderr
    return result.stdout


def test_a_sample_follows_its_prompt() -> None:
    result = fnlm("letters", "--prompt", "abc", "--max-new-tokens", "9", "--seed", "3")
    assert result.exit_code == 0, result.stderr
    assert len(result.stdout) == len("abc") + 9 + 1
    assert result.stdout.startswith("abc")
    assert result.stderr.startswith("letters, step 2: 9 tokens, ")
    assert result.stderr.endswith(" a second, seed 3, ended by length\n")


def test_a_seed_gives_the_same_text_alone_and_among_others() -> None:
    words = ("letters", "--prompt", "abc", "--seed", "3", "--max-new-tokens", "9")
    one, three = good(*words), good(*words, "--num-samples", "3")
    assert good(*words) == one
    assert good("letters", "--prompt", "abc", "--seed", "4", "--max-new-tokens", "9") != one
    parts = three.split("---------------\n")
    assert [len(part) for part in parts] == [13] * 3
    assert parts[0] == one
    assert len(set(parts)) == 3


@pytest.mark.parametrize(("option", "bits"), [("--quantize", 8), ("--quantize=int4", 4)])
def test_quantized_it_writes_with_rounded_matrices(monkeypatch: pytest.MonkeyPatch, option: str, bits: int) -> None:
    """With those of another model, to be seen in what it writes."""
    other = trained.load("letters@1").params
    asked = list[int]()

    def rounded(params: Any, to: Any) -> Any:
        asked.append(to)
        assert params.keys() == other.keys()
        return quantize(other, to)

    monkeypatch.setattr("cli.sample.small", rounded)
    words = ("--prompt", "abc", "--seed", "3", "--max-new-tokens", "30", "--min-tokens", "30")
    assert good("letters", option, *words) == good("letters@1", *words) != good("letters", *words)
    assert asked == [bits]


def test_more_samples_than_are_made_at_once() -> None:
    words = ("letters", "--prompt", "a", "--seed", "3", "--max-new-tokens", "9", "--temperature", "1", "--json")
    many = [s["text"] for s in json.loads(good(*words, "--num-samples", "40"))["samples"]]
    assert len(set(many)) == 40
    assert many[:3] == [s["text"] for s in json.loads(good(*words, "--num-samples", "3"))["samples"]]


def test_json() -> None:
    found = json.loads(
        good("letters", "--prompt", "a", "--prompt", "bb", "--num-samples", "2", "--seed", "1", "--json", "--greedy")
    )
    assert list(found) == ["model", "checkpoint", "step", "settings", "samples", "seconds", "tokens_per_second"]
    assert (found["step"], found["settings"]["temperature"], found["settings"]["seed"]) == (2, 0, 1)
    assert [(s["prompt"], s["prompt_tokens"], s["tokens"], s["finish"]) for s in found["samples"]] == [
        ("a", 1, 47, "length"), ("a", 1, 47, "length"), ("bb", 2, 46, "length"), ("bb", 2, 46, "length"),
    ]  # fmt: skip
    assert found["samples"][0] == found["samples"][1]  # greedy


def test_which_checkpoint() -> None:
    def step(*words: str) -> int:
        return int(json.loads(good("letters", "--json", "--max-new-tokens", "1", *words))["step"])

    assert step() == 2
    checkpoint.mark_best("letters/checkpoints/00000001")
    assert (step(), step("--checkpoint", "newest"), step("--checkpoint", "2")) == (1, 2, 2)
    Path("letters/checkpoints/best").unlink()
    assert good("letters/checkpoints/00000001", "--greedy") == good("letters", "--checkpoint", "1", "--greedy")


def test_prompts_from_a_file_and_from_stdin() -> None:
    Path("begin.txt").write_text("ab\ncd", encoding="utf-8")
    words = ("--max-new-tokens", "3", "--seed", "0")
    asked = good("letters", "--prompt", "ab\ncd", *words)
    assert good("letters", "--prompt", "FILE:begin.txt", *words) == asked
    assert good("letters", "--prompt", "-", *words, stdin="ab\ncd") == asked


def test_without_a_prompt_a_document_begins() -> None:
    assert len(good("letters", "--max-new-tokens", "5")) == 6
    assert json.loads(good("letters", "--json", "--max-new-tokens", "5"))["samples"][0]["prompt_tokens"] == 1


def test_a_chat_model_answers() -> None:
    words = ("talk", "--prompt", "Hi", "--max-new-tokens", "8", "--seed", "2", "--json")
    asked = len("<im_start>user\nHi<im_end>\n<im_start>assistant\n") - 3 * len("<im_start>") + 4
    (said,) = json.loads(good(*words))["samples"]
    assert asked - 4 < said["prompt_tokens"] < asked + 4
    (plain,) = json.loads(good(*words, "--plain"))["samples"]
    assert plain["prompt_tokens"] == 2
    assert good(*words[:-1]) != good(*words[:-1], "--plain")
    assert good(*words[:-1], "--plain").startswith("Hi")


def test_stops_and_settings() -> None:
    text = good("letters", "--prompt", "a", "--seed", "5", "--temperature", "2")[:-1]
    cut = text[6]
    want = text[: 1 + text[1:].index(cut)]
    result = fnlm("letters", "--prompt", "a", "--seed", "5", "--temperature", "2", "--stop", cut)
    assert result.stdout == want + "\n"
    assert result.stderr.endswith(", ended by stop\n")
    assert good("letters", "--prompt", "a", "--top-k", "1") == good("letters", "--prompt", "a", "--greedy")
    whole = good("letters", "--prompt", "a", "--top-p", "0.9", "--min-p", "0.1", "--repetition-penalty", "1.3")
    assert len(whole) == 49
    assert len(good("letters", "--prompt", "a", "--max-new-tokens", "0", "--precision", "bf16")) == 49


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        (["nothing"], 4, "there is no nothing"),
        (["leters"], 4, "did you mean 'letters'?"),
        ([], 2, "Missing argument 'MODEL'"),
        (["letters", "--checkpoint", "7"], 4, "has no checkpoint of step 7; it has"),
        (["letters", "--checkpoint", "bset"], 2, "--checkpoint bset is not best, newest or the number of a step"),
        (["letters", "--prompt", "a" * 48], 2, "has 48 tokens, the model's context only 48"),
        (["letters", "--prompt", "aéz"], 2, "knows 10 characters, but not 'z' (U+007A), 'é' (U+00E9)"),
        (["letters", "--prompt", "FILE:gone.txt"], 1, "gone.txt: No such file or directory"),
        (["letters", "--prompt", "a", "--chat"], 4, "this char tokenizer has no <|endoftext|>"),
        (["talk"], 2, "what to say to it? give --prompt TEXT, or --plain"),
        (["letters", "--temperature", "-1"], 2, "temperature=-1.0 is not a number from 0 to 100"),
        (["letters", "--top-k", "0"], 2, "top_k=0 is not a whole number of at least 1"),
        (["letters", "--top-p", "2"], 2, "top_p=2.0 is not a number above 0 and at most 1"),
        (["letters", "--top-k", "many"], 2, "'many' is not a valid integer"),
        (["letters", "--min-tokens", "9", "--max-new-tokens", "8"], 2, "--min-tokens 9 and --max-new-tokens 8"),
        (["letters", "--seed", "-1"], 2, "seed=-1"),
        (["letters", "--stop", ""], 2, "none of them empty"),
        (["letters", "--device", "abacus"], 2, "--device abacus is not there; choose cpu"),
    ],
)
def test_errors(words: list[str], code: int, says: str) -> None:
    result = fnlm(*words)
    assert (result.exit_code, result.stdout) == (code, ""), result.stderr
    assert says in result.stderr
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1


def test_a_file_that_is_not_text() -> None:
    Path("noise.txt").write_bytes(b"ab\xff")
    result = fnlm("letters", "--prompt", "FILE:noise.txt")
    assert (result.exit_code, result.stderr) == (4, "error: noise.txt is not UTF-8 at byte 2; save it as UTF-8\n")


@pytest.mark.parametrize("by", ["lookup", "letters"])
def test_speculation(by: str) -> None:
    words = ("letters", "--prompt", "abcabcab", "--greedy", "--max-new-tokens", "30", "--json", "--num-samples", "2")
    found, plain = (json.loads(good(*words, *more)) for more in (("--speculate", by), ()))
    assert [s["text"] for s in found["samples"]] == [s["text"] for s in plain["samples"]]
    said = found["speculation"]
    assert said["acceptance_rate"] == said["accepted"] / said["drafted"]
    assert by == "lookup" or said["acceptance_rate"] == 1
    assert "speculation" not in plain
    result = fnlm(*words[:-3], "--speculate", by)
    assert re.search(r"; \d+ of \d+ drafted tokens were right$", result.stderr.strip())


def test_a_draft_with_another_tokenizer_is_refused() -> None:
    result = fnlm("letters", "--speculate", "talk")
    assert (result.exit_code, result.stderr) == (
        2, "error: --speculate talk has another tokenizer; name a model that has the same, or lookup\n",
    )  # fmt: skip


def test_a_text_slides() -> None:
    words = ("letters", "--prompt", "abc", "--seed", "1", "--slide", "--max-new-tokens", "100", "--json")
    (one,) = json.loads(good(*words))["samples"]
    assert (one["tokens"], one["finish"]) == (100, "length")
    (long,) = json.loads(good(*words, "--prompt", "a" * 70, "--keep", "0"))["samples"][1:]
    assert (long["tokens"], long["prompt_tokens"]) == (100, 70)


def test_a_run_without_a_checkpoint_says_how_far_it_is(models: Path) -> None:
    (models / "young" / "checkpoints" / "00000009").mkdir(parents=True)
    (models / "young" / "config.json").write_text('{"run": {"save_every": 50}}')
    (models / "young" / "metrics.jsonl").write_text('{"time": 1, "step": 11}\n{"time": 2, "step": 12, "train/lo')
    result = fnlm("young")
    assert (result.exit_code, result.stderr.splitlines()[-1]) == (
        4,
        "error: young/checkpoints holds no complete checkpoint; its log is at step 12 and it saves one each "
        "save_every=50 steps: wait for the first, or train it anew with --force",
    )


def test_of_many_folders_the_nearest_are_named(models: Path) -> None:
    for i in range(300):
        (models / "many" / f"run-{i:03d}").mkdir(parents=True)
    assert fnlm("many/run-0077").stderr == "error: there is no many/run-0077; did you mean 'run-077'?\n"
    said = fnlm("many/elsewhere").stderr
    assert said.startswith("error: there is no many/elsewhere; choose from the 300 folders there, such as run-")
    assert said.count("run-") == 5
