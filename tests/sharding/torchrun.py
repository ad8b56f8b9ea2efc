"""torchrun as a user starts it, and what a test does to it."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

ROOT = Path(__file__).parents[2]


def torchrun(
    options: Sequence[str], module: Sequence[str], cwd: Path, prefix: Sequence[str] = (), interface: str = "lo"
) -> subprocess.Popen[str]:
    """`torchrun OPTIONS -m MODULE ...` in a session of its own; its output goes to pipes."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": interface}
    environment = {k: v for k, v in environment.items() if k not in ("RANK", "WORLD_SIZE")}
    return subprocess.Popen(
        [*prefix, sys.executable, "-m", "torch.distributed.run", *options, "-m", *module], cwd=cwd, env=environment,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip


def standalone(ranks: int) -> list[str]:
    """The options for ranks on this machine."""
    return ["--standalone", f"--nproc_per_node={ranks}"]


def descendants(pid: int) -> dict[int, dict[str, str]]:
    """The processes below one, with their environments."""
    parents, found = {}, dict[int, dict[str, str]]()
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            except OSError:
                continue
    reached = {pid}
    while more := {child for child, parent in parents.items() if parent in reached} - reached:
        reached |= more
    for child in reached - {pid}:
        try:
            words = Path(f"/proc/{child}/environ").read_text(errors="replace").split("\0")
        except OSError:
            continue
        found[child] = dict(word.split("=", 1) for word in words if "=" in word)
    return found


def rank_of(process: subprocess.Popen[str], number: int) -> int:
    """The process id of a rank."""
    return next(pid for pid, env in descendants(process.pid).items() if env.get("RANK") == str(number))


def kill(process: subprocess.Popen[str]) -> None:
    """kill -9 of torchrun and of all that it has started, at once."""
    for pid in [process.pid, *descendants(process.pid)]:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    process.communicate()


def until(there: Callable[[], bool], process: subprocess.Popen[str], seconds: float = 120.0) -> None:
    """Wait until something is so, while the process runs."""
    deadline = time.monotonic() + seconds
    while not there():
        if process.poll() is not None:
            raise AssertionError(f"it has ended with {process.returncode}: {process.communicate()}")
        if time.monotonic() > deadline:
            kill(process)
            raise AssertionError("what was waited for did not come")
        time.sleep(0.02)


def ended(process: subprocess.Popen[str], seconds: float = 120.0) -> tuple[int, str, str]:
    """How it ended: exit code, stdout, stderr."""
    try:
        out, err = process.communicate(timeout=seconds)
    finally:
        kill(process)
    return process.returncode, out, err
