"""What goes wrong under torchrun and `--nproc`, on processes: who is named, what is saved, how the run goes on."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from fnlm import checkpoint
from tests import tiny_runs as tiny
from tests.sharding.test_moving import TRAIN, logged, saved
from tests.sharding.torchrun import ROOT, ended, kill, rank_of, standalone, torchrun, until

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="finds ranks in /proc")
SPOILT = """
import os, resource, sys, threading, time

def spoil():
    while not hasattr(sys.modules.get("fnlm.loop.session"), "Session"):
        time.sleep(0.01)
    session, count = sys.modules["fnlm.loop.session"], [0]
    pieces = session.pieces

    def spoilt(*given):
        parts, count[0] = pieces(*given), count[0] + 1
        if count[0] == 4 and os.environ["SPOIL"] == "loss":
            parts[-1].weights[-1, -1] = float("inf")
        if count[0] == 4 and os.environ["SPOIL"] == "memory":
            import torch
            used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (used + (1 << 20), used + (1 << 20)))
            parts[0].weights.repeat(1 << 10, 1 << 10)
        return parts

    session.pieces = spoilt

if os.environ.get("RANK") == "1" and "SPOIL" in os.environ:
    threading.Thread(target=spoil, daemon=True).start()
"""


@pytest.fixture
def place(tmp_path: Path) -> Path:
    tiny.corpus(tmp_path)
    return tmp_path


@pytest.fixture
def alone(place: Path) -> dict[int, float]:
    """The losses of one process."""
    words = [sys.executable, "-m", "cli", "train", "shakespeare-char", "data", *TRAIN, "--out", "alone"]
    subprocess.run(words, cwd=place, env=os.environ | {"PYTHONPATH": str(ROOT)}, check=True, capture_output=True)
    return logged(place / "alone")


def spoilt(place: Path, how: str, *words: str) -> tuple[int, str]:
    """A run of which rank 1 is spoilt at the fourth step."""
    (place / "sitecustomize.py").write_text(SPOILT)
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{place}", "OMP_NUM_THREADS": "1", "SPOIL": how}
    command = [sys.executable, "-m", "cli", "train", "shakespeare-char", "data", *TRAIN, "--out", "run", *words]
    done = subprocess.run(command, cwd=place, env=environment, capture_output=True, text=True, timeout=120)
    return done.returncode, done.stderr


@pytest.mark.slow
def test_what_is_not_finite_on_one_rank_is_skipped_on_all(place: Path) -> None:
    code, err = spoilt(place, "loss", "steps=6", "--strategy", "zero3", "--nproc", "2")
    assert code == 0, err
    assert sorted(logged(place / "run")) == [1, 2, 3, 4, 5, 6]
    assert (place / "run" / "metrics.jsonl").read_text().count('"spike"') == 1
    assert "step 3: the loss is nan; its update was left out" in (place / "run" / "metrics.jsonl").read_text()
    state = tiny.state_of(place / "run" / "checkpoints" / "00000006")
    assert all(bool(x.isfinite().all()) for x in state.values())


@pytest.mark.slow
def test_memory_that_runs_out_on_one_rank_ends_all(place: Path) -> None:
    code, err = spoilt(place, "memory", "--strategy", "zero3", "--nproc", "3")
    assert code == 3, err
    assert len(err.strip().splitlines()) == 1, err
    said = r"error: rank 1 ended the run: this needs about .* of memory for 3 ranks of zero3 .*; a limit of .*"
    assert re.match(said, err), err


@pytest.mark.slow
def test_torchrun_starts_again_where_the_run_was(place: Path, alone: dict[int, float]) -> None:
    """A rank is killed after the second save; `--max-restarts` and `--resume auto` do the rest."""
    options = ["--max-restarts=1", *standalone(2)]
    words = ["cli", "train", "shakespeare-char", "data", *TRAIN, "--out", "run", "--resume", "auto"]
    process = torchrun(options, [*words, "--strategy", "zero2"], place)
    until(lambda: saved(place / "run", 20), process)
    os.kill(rank_of(process, 1), signal.SIGKILL)
    code, _, err = ended(process, 180)
    assert code == 0, err
    assert "failed (exitcode: -9) local_rank: 1" in err  # torchrun's own words
    assert "resumed from" in (place / "run" / "metrics.jsonl").read_text()
    got = logged(place / "run")
    assert sorted(got) == sorted(alone)
    assert max(abs(got[i] - alone[i]) for i in got) < 1e-5


IP = shutil.which("ip") or "/usr/sbin/ip"
HOSTS = ("fnlm-one", "fnlm-two")


def ip(*words: str) -> None:
    subprocess.run([IP, *words], check=True, capture_output=True, text=True)


@pytest.fixture
def hosts() -> Iterator[tuple[list[str], list[str]]]:
    """Two network namespaces with a cable between them: what to put before a command to run it on either."""
    if not Path(IP).exists():
        pytest.skip("ip (iproute2) is not installed")
    try:
        ip("netns", "add", HOSTS[0])
    except subprocess.CalledProcessError as error:
        pytest.skip(f"network namespaces are not permitted: {error.stderr.strip()}")
    try:
        ip("netns", "add", HOSTS[1])
        ip("link", "add", "fnlm-a", "netns", HOSTS[0], "type", "veth", "peer", "name", "fnlm-b", "netns", HOSTS[1])
        for name, end, address in (*zip(HOSTS, ("fnlm-a", "fnlm-b"), ("10.77.0.1/24", "10.77.0.2/24"), strict=True),):
            ip("-n", name, "addr", "add", address, "dev", end)
            ip("-n", name, "link", "set", end, "up")
            ip("-n", name, "link", "set", "lo", "up")
        one, two = ([IP, "netns", "exec", name] for name in HOSTS)
        yield one, two
    finally:
        for name in HOSTS:
            subprocess.run([IP, "netns", "del", name], check=False, capture_output=True)


def on_both(hosts: tuple[list[str], list[str]], place: Path, *more: str) -> list[subprocess.Popen[str]]:
    """The same run started on both hosts."""
    words = ["cli", "train", "shakespeare-char", "data", *TRAIN, "--out", "run", "--resume", "auto", *more]
    started = []
    for number, (prefix, interface) in enumerate(zip(hosts, ("fnlm-a", "fnlm-b"), strict=True)):
        options = ["--nnodes=2", "--nproc_per_node=1", f"--node_rank={number}"]
        options += ["--master_addr=10.77.0.1", "--master_port=29617"]
        started.append(torchrun(options, [*words, "--strategy", "zero3", "timeout=6"], place, prefix, interface))
    return started


@pytest.mark.slow
def test_two_hosts_whose_link_is_cut(place: Path, alone: dict[int, float], hosts: tuple[list[str], list[str]]) -> None:
    """Both ends say in time who is gone; with the link restored the same lines go on, to the losses of one process."""
    both = on_both(hosts, place)
    try:
        until(lambda: saved(place / "run", 10), both[0])
        ip("-n", HOSTS[0], "link", "set", "fnlm-a", "down")
        cut = time.monotonic()
        for number, process in enumerate(both):
            until(lambda process=process: process.poll() is not None, process, 60) if process.poll() is None else None
            _, err = process.communicate(timeout=60)
            assert process.returncode != 0
            said = [line for line in err.splitlines() if line.startswith("error:")]
            assert len(said) == 1, err
            assert re.match(rf"error: rank {number} of 2: rank {1 - number}\b.* did not answer within 6 s", said[0]), (
                said
            )
        assert time.monotonic() - cut < 45
        ip("-n", HOSTS[0], "link", "set", "fnlm-a", "up")
        at = checkpoint.newest_good(place / "run" / "checkpoints")
        assert at is not None
        assert int(at.name) < 40, "the link was cut too late"
        both = on_both(hosts, place)
        for process in both:
            _, err = process.communicate(timeout=120)
            assert process.returncode == 0, err
    finally:
        for process in both:
            kill(process)
    got = logged(place / "run")
    assert sorted(got) == sorted(alone)
    assert max(abs(got[i] - alone[i]) for i in got) < 1e-5
