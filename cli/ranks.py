"""Ranks: the processes that `--nproc` starts and watches, and what one of several does differently."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import IO, NamedTuple

import click

LOST = 75  # the exit code of a rank that ended because another one had; see fnlm.sharding.processes
GRACE = 20.0  # seconds that the others have to end, once one has
PIPE = "LAUNCHER_PIPE"  # closes when the launcher ends, however it does
FAILURE = 1


class Rank(NamedTuple):
    """A process, and where it writes what it has to say."""

    number: int
    process: subprocess.Popen[bytes]
    said: IO[bytes] | None

    @property
    def code(self) -> int | None:
        """The exit code as a shell gives it; None while it runs."""
        code = self.process.poll()
        return code if code is None or code >= 0 else 128 - code

    def cause(self) -> str:
        """Why it ended, in one line."""
        code = self.process.returncode
        if code is not None and code < 0:
            return f"it was killed by {signal.Signals(-code).name}" + ("; is memory full?" if code == -9 else "")
        lines = self._lines()
        return lines[-1].removeprefix("error: ") if lines else f"it ended with exit code {code}"

    def _lines(self) -> list[str]:
        if self.said is None:
            return []
        self.said.seek(0)
        return [line for line in self.said.read().decode(errors="replace").splitlines() if line.strip()]


def count(text: str) -> int:
    """The number of processes that `--nproc` means: auto is one for each GPU."""
    if text == "auto":
        import torch

        return max(1, torch.cuda.device_count())
    if not text.isdecimal() or int(text) < 1:
        raise ValueError(f"--nproc {text}: write a number of processes from 1, or auto for one on each GPU")
    return int(text)


def is_rank() -> bool:
    """Whether this process is one of several already."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def is_lead() -> bool:
    """Whether this process is the one that writes."""
    return os.environ.get("RANK", "0") == "0" or not is_rank()


def launch(words: Sequence[str], world: int) -> int:
    """Run `fnlm WORDS` in so many processes and return their exit code; the first that fails ends the others.

    SIGINT and SIGTERM go on to all. Rank 0 has our stdout and stderr; of the others one line is shown where one fails.
    """
    port, (read, write) = free_port(), os.pipe()
    ranks: list[Rank] = []
    sent: list[int] = []

    def forward(number: int, _: FrameType | None) -> None:
        sent.append(number)
        for rank in ranks:
            if rank.process.poll() is None:
                rank.process.send_signal(number)

    before = {number: signal.signal(number, forward) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        for number in range(world):
            ranks.append(start(words, number, world, port, read))
        return watch(ranks, sent)
    finally:
        for rank in ranks:
            if rank.process.poll() is None:
                rank.process.kill()
            rank.process.wait()
            if rank.said is not None:
                rank.said.close()
        for number, handler in before.items():
            signal.signal(number, handler)
        os.close(read)
        os.close(write)


def start(words: Sequence[str], number: int, world: int, port: int, pipe: int) -> Rank:
    """One rank, as torchrun would start it."""
    root, environment = str(Path(__file__).parents[1]), dict(os.environ)
    environment |= {"RANK": str(number), "LOCAL_RANK": str(number), PIPE: str(pipe)}
    environment |= {"WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world)}
    environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, (root, environment.get("PYTHONPATH"))))
    environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // world)))
    environment.setdefault("GLOO_SOCKET_IFNAME", "lo0" if sys.platform == "darwin" else "lo")
    said = tempfile.TemporaryFile() if number else None  # noqa: SIM115  (closed with the rank)
    process = subprocess.Popen(
        [sys.executable, "-m", "cli", *words], env=environment, pass_fds=(pipe,), start_new_session=True,
        stdout=subprocess.DEVNULL if number else None, stderr=said,
    )  # fmt: skip
    return Rank(number, process, said)


def watch(ranks: list[Rank], sent: Sequence[int] = ()) -> int:
    """Until all have ended; what went wrong first, in one line that names the rank, unless it is what was `sent`."""
    ended: list[Rank] = []
    since: float | None = None
    while len(ended) < len(ranks):
        ended += sorted((r for r in ranks if r not in ended and r.code is not None), key=blame)
        if since is None and any(r.code for r in ended):
            since = time.monotonic()
        hung = all(r.code == LOST for r in ended)  # whoever still runs is the one that they waited for
        if since is not None and time.monotonic() - since > (GRACE / 5 if hung else GRACE):
            break
        time.sleep(0.02)
    silent = [r for r in ranks if r.code is None]
    failed = [r for r in ended if r.code]
    if not failed:
        return 0
    culprit = next((r for r in failed if r.code != LOST), None)
    if culprit is None:
        names = ", ".join(str(r.number) for r in silent) or "?"
        click.echo(f"error: rank {names} did not answer the others in time; all were ended", err=True)
        return FAILURE
    code = culprit.code or FAILURE
    if code - 128 in sent:
        return code
    if (culprit.number and any(r.code != code for r in ranks)) or culprit.process.returncode < 0:
        click.echo(f"error: rank {culprit.number} ended the run: {culprit.cause()}", err=True)
    return code


def blame(rank: Rank) -> tuple[bool, bool, int]:
    """Of several that ended at once: the killed first, those that only lost another last."""
    return rank.code == LOST, rank.process.returncode >= 0, rank.number


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def end_with_launcher() -> None:
    """In a rank: where the launcher is gone, save and end, as if it had sent SIGTERM."""
    pipe = os.environ.get(PIPE)
    if pipe is None:
        return

    def listen() -> None:
        os.read(int(pipe), 1)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=listen, daemon=True, name="launcher").start()
