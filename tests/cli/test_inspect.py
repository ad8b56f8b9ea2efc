"""`fnlm inspect`: the numbers are those of the library, the JSON is whole, and every wrong word is answered."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, replace

import pytest
from click.testing import CliRunner, Result

import fnlm
from cli.inspect import OPTIONS, command, complete, traits
from cli.main import cli
from fnlm import FINETUNING, PRESETS, TRAINING, budget
from fnlm.config import TrainConfig


def run(*words: str) -> Result:
    return CliRunner().invoke(cli, ["inspect", *words])


def report(*words: str) -> dict:
    result = run(*words, "--json")
    assert (result.exit_code, result.stderr) == (0, "")
    return json.loads(result.stdout)


@pytest.mark.parametrize("name", list(PRESETS))
def test_the_json_is_whole_and_agrees_with_the_library(name: str) -> None:
    cfg, got = PRESETS[name], report(name)
    assert got["preset"] == name
    assert got["changed"] == {}
    assert got["config"] == json.loads(json.dumps(asdict(cfg)))
    parameters = got["parameters"]
    assert parameters["total"] == fnlm.count(cfg) == sum(t["parameters"] for t in parameters["tensors"])
    assert {t["name"]: tuple(t["shape"]) for t in parameters["tensors"]} == fnlm.shapes(cfg)
    assert all(t["parameters"] == math.prod(t["shape"]) for t in parameters["tensors"])
    assert got["flops_per_token"]["training"] == fnlm.flops_per_token(cfg)
    assert got["kv_cache_bytes"]["full_context"] == cfg.seq_len * got["kv_cache_bytes"]["per_token"]
    assert got["inference_bytes"] == {"fp32": 4 * fnlm.count(cfg), "bf16": 2 * fnlm.count(cfg)}
    for kind, known in (("training", TRAINING), ("finetuning", FINETUNING)):
        if name not in known:
            assert got[kind] is None
        else:
            assert got[kind].items() >= json.loads(json.dumps(asdict(known[name]))).items()
            assert got[kind]["flops"] == budget.training_flops(cfg, known[name])


@pytest.mark.parametrize("name", list(PRESETS))
def test_the_text_holds_the_counts_and_folds_the_blocks(name: str) -> None:
    out, cfg = run(name).stdout, PRESETS[name]
    assert f"{fnlm.count(cfg):,}" in out
    assert f"blocks.{{0..{cfg.n_layers - 1}}}" in out
    assert "blocks.1." not in out
    every = run(name, "--all").stdout
    assert all(f"  {tensor} " in every for tensor in fnlm.shapes(cfg))
    assert all(len(line) <= 120 and line == line.rstrip() for line in out.splitlines())


def test_without_a_preset_it_lists_them() -> None:
    out = run().stdout.splitlines()
    assert [line.split()[0] for line in out] == ["preset", *PRESETS]
    listed = report()["presets"]
    assert [p["name"] for p in listed] == list(PRESETS)
    assert all(p["parameters"] == fnlm.count(PRESETS[p["name"]]) for p in listed)
    assert all(p["n_layers"] == PRESETS[p["name"]].n_layers for p in listed)


def test_traits_are_what_sets_a_model_apart() -> None:
    assert traits(replace(PRESETS["gpt2"], bias=False)) == []
    assert traits(PRESETS["llama-135m"]) == ["rope", "rmsnorm", "swiglu", "grouped"]


@pytest.mark.parametrize(
    "words",
    [
        ["gpt2", "n_layers=6", "dropout=0.1"],
        ["gpt2", "--n_layers", "6", "--dropout=0.1"],
        ["n_layer=6", "gpt2", "--dropout", "0.1"],
        ["--json", "--n-layers", "6", "gpt2", "dropout=0.1"],
    ],
)
def test_overrides_anywhere(words: list[str]) -> None:
    got = report(*words)
    cfg = replace(PRESETS["gpt2"], n_layers=6, dropout_embed=0.1, dropout_attn=0.1, dropout_residual=0.1)
    assert got["config"] == json.loads(json.dumps(asdict(cfg)))
    assert got["parameters"]["total"] == fnlm.count(cfg)
    assert set(got["changed"]) == {"n_layers", "dropout_embed", "dropout_attn", "dropout_residual"}


def test_the_text_says_what_was_changed() -> None:
    assert run("gpt2", "n_layer=6").stdout.startswith("gpt2 with n_layers=6\n")


def test_options_of_the_estimates() -> None:
    cfg = PRESETS["gpt2"]
    got = report("gpt2", "--batch", "3", "--seq-len", "128", "--precision", "fp16", "--optimizer", "lion")
    train = replace(TRAINING["gpt2"], batch_size=3, precision="fp16", optimizer="lion")
    memory = budget.training_memory(cfg, train, 128)
    asked = {"batch_size": 3, "seq_len": 128, "micro_batches": 40, "precision": "fp16", "optimizer": "lion"}
    assert got["training_bytes"] == asked | memory._asdict() | {"total": memory.total}
    assert got["flops_per_token"] == {
        "seq_len": 128,
        "training": fnlm.flops_per_token(cfg, 128),
        "inference": fnlm.flops_per_token(cfg, 128) // 3,
    }
    assert got["training"] == report("gpt2")["training"]  # the preset's own settings stay


def test_a_preset_without_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(TRAINING, "gpt2")
    assert report("gpt2")["training_bytes"]["total"] == (
        budget.training_memory(PRESETS["gpt2"], TrainConfig(steps=1, batch_size=1)).total
    )
    assert "the preset has no settings for it" in run("gpt2").stdout


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_the_text_of_the_memory(precision: str) -> None:
    out = run("shakespeare-char-cpu", "--precision", precision).stdout
    assert f"memory for training, 12 x 64 tokens, {precision}, adamw" in out
    assert ("not needed" in out) == (precision == "fp32")
    assert ("fp32 once unscaled" in out) == (precision == "fp16")


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["gtp2"], "there is no preset 'gtp2'; did you mean 'gpt2'?"),
        (["zzz"], f"there is no preset 'zzz'; choose from {', '.join(PRESETS)}"),
        (["n_layers=6"], f"n_layers changes which model? name a preset first: {', '.join(PRESETS)}"),
        (["gpt2", "demo"], "'demo' is one word too many; a change is written key=value, for example n_layers=6"),
        (["gpt2", "n_haeds=6"], "ModelConfig has no field 'n_haeds'; did you mean 'n_heads'?"),
        (["gpt2", "n_heads=abc"], "n_heads=abc is not a whole number"),
        (["gpt2", "--precison", "bf16"], "ModelConfig has no field 'precison'; did you mean '--precision'?"),
        (["gpt2", "--tied"], "--tied has no value; write tied=true or false"),
        (["gpt2", "--seq-len", "2048"], "--seq-len 2048 is more than the model's seq_len=1024; add seq_len=2048"),
    ],
)
def test_every_refusal_is_one_line(words: list[str], line: str) -> None:
    result = run(*words)
    assert (result.exit_code, result.stdout, result.stderr) == (2, "", f"error: {line}\n")


@pytest.mark.parametrize(
    "words", [["--batch", "0"], ["--seq-len", "x"], ["--optimizer", "adm"], ["--precision", "int8"]]
)
def test_a_value_that_an_option_does_not_take(words: list[str]) -> None:
    result = run("gpt2", *words)
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.startswith(f"error: Invalid value for '{words[0]}': ")
    assert result.stderr.endswith("; see 'fnlm inspect --help'\n")


def test_a_longer_model_takes_longer_sequences() -> None:
    assert report("gpt2", "seq_len=2048", "--seq-len", "2048")["flops_per_token"]["seq_len"] == 2048


def test_all_options_are_suggested() -> None:
    names = {name for p in command.params for name in p.opts if name.startswith("--")}
    assert set(OPTIONS) == names


def test_the_shell_completes_presets_and_fields() -> None:
    assert [c.value for c in complete(None, None, "gpt2-m")] == ["gpt2-medium"]  # type: ignore[arg-type]
    assert "n_layers=" in [c.value for c in complete(None, None, "n_")]  # type: ignore[arg-type]


def test_where_each_parameter_lies() -> None:
    small = ["shakespeare-char-cpu", "n_layers=1", "--mesh", "data=3", "--strategy", "zero3"]
    first, last = (CliRunner().invoke(cli, ["inspect", *small, *more]) for more in ([], ["--rank", "2"]))
    assert first.exit_code == last.exit_code == 0, first.output
    assert first.stdout.splitlines()[0].split() == ["parameter", "shape", "spec", "here", "group", "bucket"]
    assert first.stdout.splitlines()[1].split() == [
        "embed.tokens.weight",
        "65x128",
        "P(None,",
        "'data')",
        "65x43",
        "root",
        "4",  # tied: complete when the backward pass ends
    ]
    assert last.stdout.splitlines()[1].split()[4] == "65x42"
    rows = json.loads(CliRunner().invoke(cli, ["inspect", *small, "--json"]).stdout)["rows"]
    assert rows[0]["here"] == "65x43" and {row["group"] for row in rows} == {"root", "blocks.0"}


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--strategy", "zero3"], "--strategy and --mesh go together"),
        (["--strategy", "zero3", "--mesh", "tensor=2"], "strategy zero3 needs an axis data"),
        (["--strategy", "zero3", "--mesh", "data=2", "--rank", "2"], "rank 2 is not in mesh data=2; choose 0 to 1"),
    ],
)
def test_wrong_meshes(words: list[str], says: str) -> None:
    result = CliRunner().invoke(cli, ["inspect", "gpt2", *words])
    assert (result.exit_code, result.stdout, result.stderr.count("\n")) == (2, "", 1)
    assert result.stderr.startswith(f"error: {says}")
