"""`fnlm train` and `fnlm finetune`, in place and as processes: settings, errors, kills, what a resumed run equals."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from cli import settings as gather
from cli.main import cli
from fnlm import PRESETS, TRAINING, checkpoint, data, loop
from fnlm.config import Compute
from fnlm.data import Preparation
from fnlm.loop import RunConfig
from tests import tiny_runs as tiny

SMALL = ("n_layers=2", "n_heads=2", "d_model=16", "seq_len=16", "batch_size=4", "precision=fp32")
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to work in, with prepared data in `data`."""
    tiny.corpus(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str]) -> Run:
    """Run a command in this process: its exit code, stdout and stderr."""

    def inner(*words: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as ended:
            cli.main(list(words))
        out, err = capfd.readouterr()
        return int(ended.value.code or 0), out, err

    return inner


def train(run: Run, *words: str, expect: int = 0) -> str:
    code, out, err = run("train", "shakespeare-char-cpu", "data", *SMALL, *words)
    assert code == expect, err
    return out + err


def same(a: Path, b: Path) -> bool:
    x, y = tiny.state_of(a), tiny.state_of(b)
    return x.keys() == y.keys() and all(torch.equal(x[k], y[k]) for k in x)


# Settings


BASE = PRESETS["shakespeare-char"], TRAINING["shakespeare-char"], RunConfig(), Compute()


def test_no_two_records_share_a_field() -> None:
    total = sum(len(names) for names in loop.settings.field_names().values())
    assert len(gather.owners()) == total


@pytest.mark.parametrize(
    ("pair", "where", "value"),
    [
        (("lr", "3e-4"), (1, "lr"), 3e-4),
        (("train.lr", "3e-4"), (1, "lr"), 3e-4),
        (("learning_rate", "3e-4"), (1, "lr"), 3e-4),
        (("max_iters", "7000"), (1, "steps"), 7000),
        (("n_embd", "96"), (0, "d_model"), 96),
        (("model.n_layer", "3"), (0, "n_layers"), 3),
        (("eval_interval", "9"), (2, "eval_every"), 9),
        (("dtype", "float32"), (1, "precision"), "fp32"),
        (("compile", "True"), (3, "compile"), "step"),
        (("gradient_accumulation_steps", "5"), (1, "micro_batches"), 5),
        (("ramp", "[[10, 2], [20, 4]]"), (1, "ramp"), ((10, 2), (20, 4))),
        (("sample_prompts", '["To be", "or"]'), (2, "sample_prompts"), ("To be", "or")),
        (("patience", "none"), (2, "patience"), None),
    ],
)
def test_a_setting_by_any_of_its_names(pair: tuple[str, str], where: tuple[int, str], value: Any) -> None:
    assert getattr(gather.applied(BASE, [pair])[where[0]], where[1]) == value


@pytest.mark.parametrize(
    ("pair", "says"),
    [
        (("lrr", "1"), "no setting 'lrr'; did you mean 'lr'?"),
        (("train.lrr", "1"), "did you mean 'lr'?"),
        (("model.lr", "1"), "no setting 'model.lr'"),
        (("trian.lr", "1"), "no section 'trian'"),
        (("lr", "fast"), "lr=fast is not a number"),
        (("guard", "skipp"), "did you mean 'skip'?"),
        (("eval_every", "-1"), "eval_every=-1"),
    ],
)
def test_a_wrong_setting_is_one_line(pair: tuple[str, str], says: str) -> None:
    with pytest.raises(ValueError, match=r".") as caught:
        gather.applied(BASE, [pair])
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_file_then_environment_then_command_line(place: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("run.toml").write_text("steps = 7\n[train]\nlr = 0.5\nb2 = 0.9\n[model]\nd_head = 4\n")
    Path("run.yaml").write_text("train:\n  lr: 0.5\n  b2: 0.9\nd_head: 4\nsteps: 7\n")
    monkeypatch.setenv("FNLM_LR", "0.25")
    monkeypatch.setenv("FNLM_CLIP", "none")
    for file in ("run.toml", "run.yaml"):
        config = json.loads(train(run, "--config", file, "--dry-run", "--quiet", "clip=2.0"))
        assert (config["train"]["steps"], config["train"]["b2"], config["model"]["d_head"]) == (7, 0.9, 4)
        assert config["train"]["lr"] == 0.25
        assert config["train"]["clip"] == 2.0


def test_a_variable_that_is_no_setting_is_named(place: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FNLM_API_KEY", "of fnlm serve")
    train(run, "--dry-run")
    monkeypatch.setenv("FNLM_STPES", "3")
    assert "error: environment variable FNLM_STPES: there is no setting 'stpes'" in train(run, expect=2)


def test_a_folder_is_of_one_process(place: Path, run: Run) -> None:
    train(run, "steps=2", "--out", "runs/a")
    before = Path("runs/a/metrics.jsonl").read_bytes()
    with loop.folder.held(Path("runs/a")):
        for words in (("--resume", "steps=4"), ("--force",)):
            assert "error: another process trains in runs/a; " in train(run, "--out", "runs/a", *words, expect=1)
    assert Path("runs/a/metrics.jsonl").read_bytes() == before
    assert not Path("runs/a/.lock").exists()
    train(run, "steps=4", "--out", "runs/a", "--resume")


@pytest.mark.parametrize("name", ["config.json", "samples/mine.wav", "checkpoints/model.pt", "metrics.jsonl"])
def test_what_no_run_has_written_stays(place: Path, run: Run, name: str) -> None:
    """Also with --force: `--out .` in somebody's project."""
    mine = Path("project", name)
    mine.parent.mkdir(parents=True)
    mine.write_text("{}")
    for words in ((), ("--force",)):
        text = train(run, "steps=2", "--out", "project", *words, expect=2)
        assert f"error: project holds {name.partition('/')[0]!r}, which no run of fnlm has written" in text
    assert [path for path in Path("project").rglob("*") if path.is_file()] == [mine]


def test_a_short_run_keeps_its_shape(place: Path, run: Run) -> None:
    """The preset's warm-up does not fit: it shrinks with the run; ten evaluations, unless they are given."""
    config = json.loads(train(run, "--dry-run", "--quiet", "steps=100"))
    assert config["train"]["warmup"] == 10
    assert config["run"]["eval_every"] == 10
    assert json.loads(train(run, "--dry-run", "--quiet", "eval_interval=25"))["run"]["save_every"] == 25


def test_the_model_takes_the_vocabulary_of_the_data(place: Path, run: Run) -> None:
    size = data.open("data").manifest["vocab_size"]
    assert json.loads(train(run, "--dry-run", "--quiet"))["model"]["vocab_size"] == size
    assert json.loads(train(run, "--dry-run", "--quiet", "vocab_size=64"))["model"]["vocab_size"] == 64
    text = train(run, "--dry-run", "vocab_size=5", expect=4)
    assert f"vocab_size=5 is too small for data, whose tokenizer has {size} tokens" in text


def test_a_strategy_on_one_rank_says_how_to_get_more(place: Path, run: Run) -> None:
    said = "one rank: zero2 has nothing to share; start more with --nproc N, torchrun or --simulate N"
    assert said in train(run, "steps=1", "--strategy", "zero2", "--out", "one")
    assert "one rank" not in train(run, "steps=1", "--out", "plain")


def test_batch_auto_keeps_the_global_batch(place: Path, run: Run) -> None:
    config = json.loads(train(run, "--dry-run", "--quiet", "micro_batches=3", "batch=auto"))["train"]
    assert config["batch_size"] * config["micro_batches"] == 12


# Runs


def test_a_run_resumes_in_place_and_is_not_overwritten(place: Path, run: Run) -> None:
    train(run, "steps=6", "eval_every=3", "--out", "runs/a")
    assert "continue it with --resume" in train(run, "steps=6", "--out", "runs/a", expect=2)
    text = train(run, "steps=6", "--out", "runs/a", "--resume")  # finished: nothing to do
    assert "runs/a has done its 6 steps; to go on: fnlm train --resume runs/a steps=9\n" in text
    assert "step 6" in text
    code, out, _ = run("train", "--resume", "runs/a", "steps=9", "--json", "--quiet")
    assert (code, json.loads(out)["step"]) == (0, 9)
    assert json.loads(Path("runs/a/config.json").read_text())["train"]["steps"] == 9
    train(run, "steps=2", "--out", "runs/a", "--force")
    assert [p.name for p in loop.folder.checkpoint.layout.folders(Path("runs/a/checkpoints"))] == [
        "00000001",
        "00000002",
    ]


def test_resume_auto_starts_where_there_is_nothing(place: Path, run: Run) -> None:
    train(run, "steps=2", "--resume", "auto", "--out", "runs/a")
    train(run, "--out", "runs/b", "--resume", "steps=2")  # a setting is no path
    assert "step 3" in train(run, "--out", "runs/b", "--resume", "steps=3")
    assert (Path("runs/a/checkpoints") / "00000002").is_dir()


def test_resume_with_what_does_not_fit(place: Path, run: Run) -> None:
    train(run, "steps=4", "eval_every=2", "--out", "runs/a")
    code, _, err = run("train", "--resume", "runs/a", "steps=6", "d_model=32", "--quiet")
    assert code == 4
    assert "does not fit" in err
    assert sum(line.startswith("error: ") for line in err.splitlines()) == 1
    code, _, err = run("train", "demo", "--resume", "auto", "--out", "runs/a")
    assert code == 2
    assert "runs/a is a run of shakespeare-char-cpu, not of demo" in err
    code, _, err = run("train", "--resume", "runs/b")
    assert code == 4
    assert "there is no runs/b" in err
    data.prepare(Preparation(("b.txt",), Path("data"), "char", ("a.txt",)), force=True)
    code, _, err = run("train", "--resume", "runs/a", "steps=6")
    assert code == 4
    assert "its sha256 differs" in err


def test_a_loss_that_is_not_finite_is_exit_code_5(place: Path, run: Run) -> None:
    text = train(run, "steps=60", "lr=1e30", "clip=none", "warmup=0", "guard=stop", "eval_every=0", expect=5)
    assert "error: step" in text
    assert "--resume goes on behind it" in text
    text = train(run, "steps=60", "lr=1e30", "clip=none", "warmup=0", "guard=off", "--out", "runs/off", expect=5)
    assert text.splitlines()[-1] == "error: the loss of the last steps is nan"


def test_finetune_starts_from_the_model_and_needs_its_tokenizer(place: Path, run: Run) -> None:
    train(run, "steps=4", "--out", "runs/a")
    code, out, err = run("finetune", "runs/a", "data", "steps=0", "--json")
    assert code == 2
    assert "steps=0" in err
    code, out, err = run(
        "finetune", "runs/a", "data", "steps=3", "lr=0", "min_lr=0", "weight_decay=0", "--json", "--quiet"
    )
    assert code == 0, err
    before = checkpoint.load_params("runs/a")[1]
    after = checkpoint.load_params(json.loads(out)["checkpoint"])[1]
    assert all(torch.equal(before[k], after[k]) for k in before), "a rate of 0 leaves the model as it was"
    assert json.loads(Path("runs/data/config.json").read_text())["init_from"].startswith("runs/a")
    Path("other.txt").write_text("quite other letters: QWERTY\n" * 50)
    data.prepare(Preparation(("other.txt",), Path("other"), "char", ("a.txt",)))
    code, _, err = run("finetune", "runs/a", "other")
    assert code == 4
    assert len(err.strip().splitlines()) == 1
    code, _, err = run("finetune", "runs/a", "data", "n_layers=3", "--force")
    assert code == 4
    assert "missing  params/blocks.2.attn_norm.weight" in err
    assert err.splitlines()[-1].endswith("leave out what changes the model, or --partial")
    code, out, err = run(
        "finetune", "runs/a", "data", "n_layers=3", "--force", "--partial", "lr=0", "steps=1", "--json"
    )
    assert code == 0, err
    grown = checkpoint.load_params(json.loads(out)["checkpoint"])[1]
    assert all(torch.equal(before[k], grown[k]) for k in before), "what fits is taken"
    assert "blocks.2.attn.q.weight" in grown
    code, out, err = run("train", "--resume", "runs/data", "n_layers=2", "steps=2", "--partial", "--json", "--quiet")
    assert code == 0, err
    assert len(checkpoint.load_params(json.loads(out)["checkpoint"])[1]) == len(before)


def command(*words: str) -> list[str]:
    return [sys.executable, "-m", "cli", *words]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_process_that_is_told_to_end_saves_first(place: Path, number: int, code: int) -> None:
    words = command("train", "shakespeare-char-cpu", "data", *SMALL, "steps=100000", "save_every=0", "--out", "runs/a")
    process = subprocess.Popen(words, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    wait_for(Path("runs/a/metrics.jsonl"), process, lambda text: '"step": 20' in text)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == code
    assert err.strip().splitlines()[-1].endswith("go on with --resume runs/a")
    saved = checkpoint.newest_good("runs/a/checkpoints")
    assert saved is not None
    assert "Traceback" not in err


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_killed_and_resumed_equals_straight(place: Path, optimizer: str) -> None:
    """40 steps, or 20 and more, kill -9, and the rest in another process: the same bits, with dropout."""
    words = ("train", "shakespeare-char-cpu", "data", *SMALL, f"optimizer={optimizer}", "dropout=0.1", "steps=40")
    words += ("save_every=10", "eval_every=20", "log_every=1", "warmup=5", "--quiet")
    straight = subprocess.run(command(*words, "--out", "runs/a"), capture_output=True, text=True, check=False)
    assert straight.returncode == 0, straight.stderr
    process = subprocess.Popen(command(*words, "--out", "runs/b"), env={**os.environ, "FNLM_STEPS": "40"})
    wait_for(Path("runs/b/checkpoints/latest"), process, lambda text: int(text or 0) >= 20)
    process.kill()
    process.wait()
    assert not (Path("runs/b/checkpoints") / "00000040" / "COMMITTED").exists(), "killed too late to show anything"
    again = subprocess.run(command(*words, "--out", "runs/b", "--resume"), capture_output=True, text=True, check=False)
    assert again.returncode == 0, again.stderr
    a, b = (Path("runs") / name / "checkpoints" / "00000040" for name in "ab")
    assert same(a, b)
    logged = [[(r["step"], r["train/loss"]) for r in loop.session.JsonLines.read(Path("runs") / name / "metrics.jsonl")
               if "train/loss" in r] for name in "ab"]  # fmt: skip
    assert logged[0] == logged[1]


def wait_for(file: Path, process: subprocess.Popen[Any], ready: Callable[[str], bool]) -> None:
    """Until the file says so."""
    until = time.monotonic() + 60
    while not (file.exists() and ready(file.read_text())):
        assert process.poll() is None, "it ended before"
        assert time.monotonic() < until
        time.sleep(0.002)
