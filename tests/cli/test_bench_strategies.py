"""`fnlm bench strategies`: every strategy ends where one process ends, and sends what was planned."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from cli.main import cli
from fnlm.benchmark_strategies import cases

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]


def test_on_two_threads() -> None:
    result = CliRunner().invoke(cli, ["bench", "strategies", "--quick", "--simulate", "2"])
    assert result.exit_code == 0, result.output
    head, *rows = result.stdout.splitlines()
    assert head.split()[:2] == ["strategy", "mesh"]
    data = ["ddp_flat", "ddp_bucketed", "zero1", "zero2", "zero3"]
    assert [row.split()[0] for row in rows] == ["single", *data, "hsdp", "tensor_parallel", "context"]
    assert all(" yes " in row for row in rows)


def test_cases_use_every_rank() -> None:
    for world in (1, 2, 3, 4, 5, 6, 8):
        for _, shape in cases(world):
            n = 1
            for size in shape.values():
                n *= size
            assert n == world


@pytest.mark.slow
def test_under_torchrun_pytorchs_own_are_rows() -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    told = subprocess.run(
        [*command, "-m", "cli", "bench", "strategies", "--quick", "--json"], cwd=ROOT, capture_output=True, text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}, check=False, timeout=240,
    )  # fmt: skip
    assert told.returncode == 0, told.stderr[-2000:]
    report = json.loads(told.stdout)
    assert (report["ok"], report["processes"]) == (True, True)
    ddp, zero3, fsdp = (next(r for r in report["rows"] if r["strategy"] == how) for how in ("ddp", "zero3", "FSDP2"))
    assert ddp["sent"] == ddp["planned"] > 0
    assert fsdp["gap"] < 1e-10
    assert zero3["planned"] <= fsdp["sent"] < 1.2 * zero3["planned"]
