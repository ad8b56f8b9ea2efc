"""`fnlm merge` writes a run that every command reads, `fnlm diff` says what changed; what does not fit is named."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result

import fnlm
from cli.main import cli
from fnlm import interop, tokenizers, trained
from fnlm.report.changes import changes

CFG = fnlm.ModelConfig(vocab_size=259, n_layers=2, n_heads=2, d_model=16, seq_len=16)
Made = Callable[..., Path]


def run(*words: str) -> Result:
    return CliRunner().invoke(cli, list(words))


@pytest.fixture
def made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Made:
    monkeypatch.chdir(tmp_path)

    def write(name: str, seed: int, cfg: fnlm.ModelConfig = CFG, kind: str = "byte") -> Path:
        tokenizer = tokenizers.named("byte") if kind == "byte" else tokenizers.train("char", ["abc"])
        config = {"model": asdict(cfg), "kind": "text", "data": "data/x"}
        return interop.write_run(fnlm.init_params(cfg, fnlm.key(seed)), config, tokenizer, Path("runs") / name)

    return write


def test_a_soup_is_a_run(made: Made) -> None:
    a, b = made("a", 1), made("b", 2)
    result = run("merge", str(a), str(b), "--weights", "1,3", "--out", "runs/soup")
    assert (result.exit_code, result.stdout) == (0, "runs/soup: average of 2 models\n"), result.stderr
    one, two, soup = (trained.load(f"runs/{name}") for name in ("a", "b", "soup"))
    for name, value in soup.params.items():
        torch.testing.assert_close(value, one.params[name] / 4 + 3 * two.params[name] / 4, rtol=1e-6, atol=1e-7)
    merge = soup.config["merge"]
    assert [(m["model"], m["weight"]) for m in merge["models"]] == [("runs/a", 1.0), ("runs/b", 3.0)]
    assert len(merge["models"][0]["sha256"]) == 64 and soup.config["data"] == "data/x"
    assert run("sample", "runs/soup", "--prompt", "ab", "--max-new-tokens", "3").exit_code == 0
    assert run("export", "runs/soup", "--no-parity").exit_code == 0
    again = run("merge", str(a), "--out", "runs/soup")
    assert (again.exit_code, again.stderr.startswith("error: runs/soup exists; choose another --out")) == (4, True)
    assert run("merge", str(a), "--out", "runs/soup", "--force").exit_code == 0


def test_task_arithmetic_and_its_base(made: Made) -> None:
    base, a = made("base", 1), made("a", 2)
    result = run("merge", str(a), "--base", str(base), "--weights", "-1", "--out", "runs/less", "--json")
    said = json.loads(result.stdout)
    assert (said["method"], said["base"]["model"]) == ("task arithmetic", "runs/base")
    less, one, zero = (trained.load(f"runs/{name}").params for name in ("less", "a", "base"))
    for name, value in less.items():
        torch.testing.assert_close(value, 2 * zero[name] - one[name], rtol=1e-5, atol=1e-6)


def test_adapters_of_a_run_are_added_in(made: Made) -> None:
    from fnlm import checkpoint, lora, random
    from fnlm.types import TrainState

    params = fnlm.init_params(CFG, fnlm.key(1))
    adapters = lora.init(params, 2, fnlm.key(2))
    adapters = {k: torch.randn(v.shape, generator=torch.Generator().manual_seed(1)) for k, v in adapters.items()}
    config = {"model": asdict(CFG), "kind": "text", "train": {"lora": 2, "lora_alpha": 8.0}}
    folder = Path("runs/tuned/checkpoints")
    folder.mkdir(parents=True)
    vocabulary = tokenizers.named("byte").save(folder.parent)
    state = TrainState(torch.tensor(3), {**params, **adapters}, (), random.key(0))
    checkpoint.save(folder, state, config=config, tokenizer=vocabulary, what="params")
    assert run("merge", "runs/tuned", "--out", "runs/plain").exit_code == 0
    plain = trained.load("runs/plain")
    assert "train" not in plain.config and list(plain.params) == list(params)
    name = "blocks.0.attn.q"
    want = params[f"{name}.weight"] + 4.0 * adapters[f"{name}{lora.B}"] @ adapters[f"{name}{lora.A}"]
    torch.testing.assert_close(plain.params[f"{name}.weight"], want, rtol=1e-5, atol=1e-5)


def test_what_does_not_fit_is_named(made: Made) -> None:
    a = str(made("a", 1))
    made("deep", 1, replace(CFG, n_layers=3, n_heads=4))
    made("other", 1, CFG, "char")
    for command in (["merge", a, "runs/{}", "--out", "runs/x"], ["diff", a, "runs/{}"]):
        for name, says in (
            ("deep", "runs/a and runs/deep are not of one architecture: n_layers=2 and 3, n_heads=2 and 4"),
            ("other", "runs/a and runs/other have different tokenizers: byte of 259 tokens and char of 3 tokens"),
        ):
            result = run(*(word.format(name) for word in command))
            assert result.exit_code == 4 and result.stderr.startswith(f"error: {says}"), result.stderr
    assert not Path("runs/x").exists()


def test_what_is_no_run_is_not_replaced(made: Made) -> None:
    a = str(made("a", 1))
    Path("mine").mkdir()
    Path("mine/thesis.txt").write_text("x")
    result = run("merge", a, "--out", "mine", "--force")
    assert (result.exit_code, "mine is no run, and is not replaced" in result.stderr) == (4, True)
    inside = run("merge", a, "--out", a, "--force")
    assert (inside.exit_code, "holds a model that is merged" in inside.stderr) == (2, True)


def test_a_table_of_changes_and_a_picture(made: Made) -> None:
    a = made("a", 1)
    params = dict(trained.load(a).params)
    params["blocks.1.mlp.up.weight"] = params["blocks.1.mlp.up.weight"] + 1
    config = {"model": asdict(CFG), "kind": "text"}
    interop.write_run(params, config, tokenizers.named("byte"), Path("runs/b"))
    result = run("diff", "runs/a", "runs/b", "--top", "1", "--out", "out/diff.html")
    assert result.exit_code == 0, result.stderr
    lines = result.stdout.splitlines()
    assert lines[0].split() == ["parameter", "relative", "largest", "cosine"]
    assert lines[2].split()[:3:2] == ["blocks.1.mlp.up.weight", "1.000e+00"]
    assert lines[3] == f"and {len(params) - 1} more: --all"
    said = json.loads(run("diff", "runs/a", "runs/b", "--json").stdout)
    assert next(iter(said["parameters"])) == "blocks.1.mlp.up.weight"
    assert sum(row["max_abs"] > 0 for row in said["parameters"].values()) == 1
    page = Path("out/diff.html").read_text()
    assert page.count("<rect") == len(params) and page.count('class="none"') == len(params) - 1
    assert "blocks.1.mlp.up.weight: " in page and "<script" not in page
    assert [p.name for p in Path("out").iterdir()] == ["diff.html"]


def test_a_name_on_the_page_is_only_text() -> None:
    page = changes("<b>", "b", {"<i>": (1.0, 1.0, 0.5)}, (1.0, 1.0, 0.5))
    assert "<b>" not in page and "<i>" not in page and "&lt;i&gt;" in page
