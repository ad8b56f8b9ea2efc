"""The same cases on processes: 2 and 4 ranks over gloo."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
Case = tuple[str, str, dict[str, Any], int]
DATA = ("ddp", "ddp_flat", "ddp_bucketed", "zero1", "zero2", "zero3")
TWO: list[Case] = [
    *(("data=2", how, {}, micro) for how in DATA for micro in (1, 3)),
    *(("data=2", how, {"part": part}, 3) for how in ("ddp", "zero3") for part in ("lora", "middle")),
    ("data=2", "ddp_bucketed", {"bucket_bytes": 2000}, 1),
    ("data=2", "zero3", {"bucket_bytes": 2000, "prefetch": 2}, 3),
    ("tensor=2", "tensor_parallel", {}, 1),
    ("tensor=2", "tensor_parallel", {"sequence_parallel": True}, 3),
    ("context=2", "context", {}, 1),
]
FOUR: list[Case] = [
    *((f"data={n},tensor={4 // n}", how, {}, 3) for n in (2, 4) for how in DATA),
    *(("data=2,context=2", how, {}, 1) for how in ("ddp_bucketed", "zero3")),
    ("replica=2,shard=2", "hsdp", {}, 3),
    ("shard=4", "hsdp", {}, 1),
]


def run(world: int, cases: list[Case], folder: Path, timeout: float) -> list[list[list[Any]]]:
    """What each rank printed; none is left behind."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    command = [sys.executable, "-W", "error", "-m", "tests.sharding.processes"]
    ranks = [
        subprocess.Popen(
            [*command, str(rank), str(world), str(folder / "store"), json.dumps(cases)],
            cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for rank in range(world)
    ]  # fmt: skip
    try:
        said = [rank.communicate(timeout=timeout) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    for rank, (_, err) in zip(ranks, said, strict=True):
        assert rank.returncode == 0, err[-3000:]
    return [[json.loads(line) for line in out.splitlines()] for out, _ in said]


@pytest.mark.slow
@pytest.mark.parametrize(("world", "cases"), [(2, TWO), (4, FOUR)])
def test_processes_end_where_one_ends(world: int, cases: list[Case], tmp_path: Path) -> None:
    for said in run(world, cases, tmp_path, 240):
        assert [tuple(row[:4]) for row in said] == cases
        assert {(row[0], row[1]): row[4] for row in said if not row[4] < 1e-10} == {}


def test_two_processes(tmp_path: Path) -> None:
    for said in run(2, [("data=2", "zero3", {}, 3), ("data=2", "ddp_bucketed", {}, 1)], tmp_path, 60):
        assert [row[4] < 1e-10 for row in said] == [True, True]
