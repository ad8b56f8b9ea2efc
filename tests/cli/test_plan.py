"""`fnlm plan`: the table, what fits, and the refusals."""

from __future__ import annotations

import json
import time

import pytest
from click.testing import CliRunner, Result

from cli.main import cli

TINY = ["n_layers=2", "n_heads=4", "d_model=32", "vocab_size=65", "seq_len=16"]


def run(*words: str) -> Result:
    return CliRunner().invoke(cli, ["plan", "--model", "gpt2", *words])


def test_every_strategy_that_can_use_the_mesh() -> None:
    result = run(*TINY, "--mesh", "data=4", "--json")
    assert result.exit_code == 0, result.stderr
    report = json.loads(result.stdout)
    assert list(report["strategies"]) == ["ddp", "ddp_flat", "ddp_bucketed", "zero1", "zero2", "zero3"]
    assert [r["rank"] for r in report["strategies"]["zero3"]] == [0, 3]
    zero3, ddp = (report["strategies"][how][0] for how in ("zero3", "ddp"))
    assert 3.9 < ddp["parameters"] / zero3["parameters"] < 4.1
    assert (report["ranks"], report["fits"], report["memory"]) == (4, None, None)


def test_the_table_and_what_fits() -> None:
    result = run(*TINY, "--mesh", "data=2,tensor=2", "--strategy", "zero1,fsdp", "--memory", "80GB")
    assert result.exit_code == 0, result.stderr
    assert "gpt2, 28.1 k parameters, on data=2,tensor=2, 4 ranks" in result.stdout
    assert "fit 74.5 GiB: zero1, zero3" in result.stdout
    assert "not in it: the allocator's slack" in result.stdout


@pytest.mark.parametrize(
    ("words", "nearest"),
    [
        (["--mesh", "data=8", "--strategy", "ddp", "--memory", "300KB"], "zero2 --mesh data=8 --micro-batch 1"),
        (["--mesh", "data=8", "--micro-batch", "32", "--memory", "1MB"], "zero3 --mesh data=8 --micro-batch 16"),
        (["--mesh", "data=2", "--memory", "300KB"], "zero3 --mesh data=4 --micro-batch 1"),
    ],
)  # fmt: skip
def test_nothing_fits(words: list[str], nearest: str) -> None:
    result = run(*TINY, *words)
    assert result.exit_code == 3
    assert result.stderr.startswith("error: nothing fits")
    assert f"the nearest that would: --strategy {nearest}" in result.stderr, result.stdout
    assert result.stderr.count("\n") == 1


def test_nothing_ever_fits() -> None:
    result = run(*TINY, "--mesh", "data=2", "--strategy", "zero3", "--memory", "1KB")
    assert result.exit_code == 3
    assert "take a smaller model" in result.stderr


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--mesh", "date=2"], "mesh axis 'date' is unknown; did you mean 'data'?"),
        (["--mesh", "data=2,tensor=13"], "n_kv_heads=12 is too few for tensor=13; choose at most tensor=12"),
        (["--mesh", "context=3", "--strategy", "context"], "seq_len=1024 is not divisible by context=3"),
        (["--mesh", "data=2", "--strategy", "hsdp"], "strategy hsdp needs an axis shard"),
        (["--mesh", "data=2", "--strategy", "zero9"], "strategy 'zero9' is unknown"),
        (["--mesh", "data=2", "--memory", "lots"], "Invalid value for '--memory': 'lots' is no amount of memory"),
        (["--mesh", "data=2", "more"], "'more' is one word too many"),
        (["--mesh", "data=2,replica=2"], "no strategy can use mesh data=2,replica=2"),
        (["--mesh", "data=2", "--seq-len", "2000"], "--seq-len 2000 is more than the model's seq_len=1024"),
        (["--mesh", "data=2", "--model", "gpt9"], "there is no preset 'gpt9'"),
    ],
)  # fmt: skip
def test_refused_in_one_line(words: list[str], says: str) -> None:
    result = run(*words)
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.startswith(f"error: {says}")
    assert result.stderr.count("\n") == 1


@pytest.mark.slow
def test_gpt2_xl_on_512_ranks_takes_seconds() -> None:
    words = ["plan", "--model", "gpt2-xl", "--mesh", "data=64,tensor=8", "--strategy", "zero3", "--memory", "80GB"]
    begun = time.process_time()
    assert CliRunner().invoke(cli, words).exit_code == 0
    assert time.process_time() - begun < 5


def test_a_part_of_a_model_is_planned(capsys: pytest.CaptureFixture[str]) -> None:
    """Adapters of rank 4: gradients and state of them alone."""
    words = ["plan", "--model", "gpt2", "n_layers=1", "--mesh", "data=2", "--strategy", "ddp_bucketed", "--json"]
    found = []
    for more in ((), ("lora=4", "lora_targets=q,v")):
        with pytest.raises(SystemExit):
            cli.main([*words, *more])
        found.append(json.loads(capsys.readouterr().out))
    every, some = (x["strategies"]["ddp_bucketed"][0] for x in found)
    assert [x["trained"] for x in found] == [found[0]["parameters"], 2 * 4 * (768 + 768)]
    assert (every["gradients"], some["gradients"]) == (4 * found[0]["parameters"], 4 * found[1]["trained"])
    assert 8 * found[1]["trained"] <= some["optimizer_state"] <= 8 * found[1]["trained"] + 64
