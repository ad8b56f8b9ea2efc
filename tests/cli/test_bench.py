"""`fnlm bench step`: what is asked of the benchmark, what is printed and written, and the refusals before any work."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result

from cli import bench
from cli.main import cli
from fnlm import benchmark
from fnlm.benchmark import Shape

CONTESTANT = {
    "precision": "bf16", "step_ms": 5.0, "tokens_per_s": 1000.0, "against": {}, "first_step_s": 1.0,
    "first_loss_s": 2.0, "peak_mb": None, "life_mb": None, "loss": 4.1, "mfu": None,
}  # fmt: skip


def run(*words: str) -> Result:
    return CliRunner().invoke(cli, ["bench", "step", *words])


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> dict:
    """What the command asks `step_benchmark` for; the report it gets is small, and `ok` unless this says otherwise."""
    seen: dict = {"ok": True}

    def step_benchmark(**options: object) -> dict:
        log = options.pop("log")
        log("fnlm: first step")  # type: ignore[operator]
        part = {"model_gflop": 1.0, "others_cores": None, "contestants": {"fnlm": CONTESTANT}}
        seen.update(options)
        return {
            "date": "today", "machine": {"cpu": "a processor", "threads": 1, "cores": 2}, "versions": {"torch": "2.13"},
            "shapes": {"tiny": part | {"unequal_work": [] if seen["ok"] else ["loss"]}}, "ok": seen["ok"],
        }  # fmt: skip

    monkeypatch.setattr(bench, "step_benchmark", step_benchmark)
    return seen


def test_by_default_it_asks_for_what_the_benchmark_does_by_default(asked: dict) -> None:
    result = run()
    assert result.exit_code == 0
    assert asked == {
        "ok": True, "shapes": None, "against": None, "rounds": None, "threads": None, "precision": "bf16",
        "device": "cpu", "compiled": False, "quick": False,
    }  # fmt: skip
    assert "contestant" in result.stdout
    assert result.stderr == "fnlm: first step\n"


def test_every_option_arrives(asked: dict) -> None:
    words = "--against ng --shape gpt2 --shape ryan-12m --rounds 3 --threads 1 --precision fp32 --compiled --quick"
    assert run(*words.split()).exit_code == 0
    assert asked == {
        "ok": True, "shapes": ("gpt2", "ryan-12m"), "against": "ng", "rounds": 3, "threads": 1, "precision": "fp32",
        "device": "cpu", "compiled": True, "quick": True,
    }  # fmt: skip


@pytest.mark.usefixtures("asked")
def test_json_goes_to_stdout_and_to_the_file(tmp_path: Path) -> None:
    out = tmp_path / "step.json"
    out.write_text("older")
    result = run("--json", "--out", str(out))
    assert json.loads(result.stdout)["shapes"]["tiny"]["contestants"]["fnlm"]["step_ms"] == 5.0
    assert out.read_text() == result.stdout
    assert list(tmp_path.iterdir()) == [out]


@pytest.mark.usefixtures("asked")
def test_the_file_is_beside_the_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = run("--out", "step.json")
    assert "contestant" in result.stdout
    assert json.loads(Path("step.json").read_text())["ok"] is True


def test_unequal_work_fails_and_is_still_reported(asked: dict, tmp_path: Path) -> None:
    asked["ok"] = False
    result = run("--out", str(tmp_path / "step.json"))
    assert result.exit_code == 1
    assert "UNEQUAL WORK" in result.stdout
    assert json.loads((tmp_path / "step.json").read_text())["ok"] is False


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--against", "."], "no model.py in .; clone https://github.com/karpathy/nanoGPT and name that folder"),
        (["--against", "nowhere"], "no model.py in nowhere; clone"),
        (["--shape", "gpt3"], "unknown shape 'gpt3'; choose from shakespeare-char-cpu, ryan-12m, gpt2"),
        (["--out", "."], "--out . is a folder; name a file in it"),
        (["--out", "none/x.json"], "--out none/x.json: none is no folder that can be written to"),
        (["--rounds", "0"], "Invalid value for '--rounds'"),
        (["--threads", "0"], "Invalid value for '--threads'"),
        (["--precision", "int8"], "Invalid value for '--precision'"),
        (["--device", "tpu"], "Invalid value for '--device'"),
    ],
)
def test_refused_before_any_work(words: list[str], says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(benchmark, "_one_shape", None)  # to reach it is an error
    result = run(*words)
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.startswith(f"error: {says}")
    assert result.stderr.count("\n") == 1


def test_another_model_py_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.py").write_text("class Net: ...")
    result = run("--against", str(tmp_path))
    assert result.exit_code == 2
    assert result.stderr.startswith(f"error: {tmp_path / 'model.py'} is not nanoGPT's; clone https://")


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_cuda_without_a_gpu() -> None:
    result = run("--device", "cuda")
    assert result.exit_code == 2
    assert result.stderr == "error: --device cuda: torch sees no GPU here; `fnlm doctor` says what it sees\n"


def test_a_contestants_death_is_told_with_its_log(monkeypatch: pytest.MonkeyPatch) -> None:
    def dies(**_: object) -> dict:
        raise RuntimeError("fnlm ended during 'build':\nKeyError: 'x'")

    monkeypatch.setattr(bench, "step_benchmark", dies)
    result = run()
    assert result.exit_code == 1
    assert result.stderr == "error: fnlm ended during 'build':\nKeyError: 'x'\n"


@pytest.mark.slow
def test_a_real_run(monkeypatch: pytest.MonkeyPatch) -> None:
    shape = Shape(n_layers=2, n_heads=2, d_model=8, seq_len=4, batch_size=2, vocab_size=11, rounds=2, steps=1)
    monkeypatch.setitem(benchmark.SHAPES, "tiny", shape)
    result = run("--shape", "tiny", "--threads", "1", "--precision", "fp32", "--json")
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["shapes"]["tiny"]["contestants"]["fnlm"]["loss"] > 0
