"""`fnlm doctor --dist`: ranks that find each other, one that does not come, and no ranks at all."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from cli.main import cli

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]


def ranks(world: int, come: list[int], *words: str) -> list[tuple[int, str]]:
    """Exit code and stdout of each rank that comes."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    base = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(world), "OMP_NUM_THREADS": "1"}
    base |= {"GLOO_SOCKET_IFNAME": "lo"}
    command = [sys.executable, "-m", "cli", "doctor", "--dist", *words]
    started = [
        subprocess.Popen(command, cwd=ROOT, env=os.environ | base | {"RANK": str(r)}, stdout=subprocess.PIPE, text=True)
        for r in come
    ]
    try:
        return [(rank.wait(60), rank.communicate()[0]) for rank in started]
    finally:
        for rank in started:
            rank.kill()


def test_without_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    result = CliRunner().invoke(cli, ["doctor", "--dist"])
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.startswith("error: --dist needs ranks; torchrun")


def test_all_come() -> None:
    (code, said), (other, quiet) = ranks(2, [0, 1])
    assert (code, other, quiet) == (0, 0, "")
    assert said.splitlines()[-1] == "all 2 ranks are well"
    assert said.startswith("data: all ranks came; an all-reduce of 1 MiB takes")


def test_one_does_not_come() -> None:
    for code, said in ranks(3, [0, 1]):
        assert code == 3
        assert said.startswith("rendezvous: rank 2 did not come within 5 s (told by rank ")
