"""One contestant of `fnlm bench step`, alone in its process: JSON requests on stdin, one a line, replies on stdout.

    {"build": job}    -> {"import_s", "build_s", "versions"}
    {"steps": n}      -> {"seconds", "cpu", "losses"} a step, "cpu_s" of all; at first also first_step_s, first_loss_s
    {"memory": null}  -> {"peak_mb", "life_mb", "idle_cpu"}: since step 2, of the whole life; the CPU used while waiting
    {"norm": null}    -> {"matrix_norm", "vector_norm"}: the 2-norms of all weights with two dimensions and with one
    {"call": job}     -> {"value"}: of any function of a job

It is run by path, not as a module of fnlm: the yardstick's process must not pay for our imports. A job is a dict:
`run` (FILE.py:FUNCTION), `shape, precision, device, threads, against, weights, spawned` and the contestant's `options`.
"""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TextIO

if TYPE_CHECKING:
    from torch import Tensor

Job = dict[str, Any]
Reply = dict[str, Any]
SEED = 1337


class Recipe(NamedTuple):
    """A built contestant: `batch(tokens, targets)` off the clock, `step(batch) -> loss` on it, the weights of now."""

    batch: Callable[[Tensor, Tensor], Any]
    step: Callable[[Any], Any]
    params: Callable[[], Iterable[Tensor]]


def function_at(place: str) -> Callable[..., Any]:
    """The function named by FILE.py:FUNCTION. Raises ValueError for a file that is not Python."""
    path, name = place.rsplit(":", 1)
    spec = importlib.util.spec_from_file_location("contestant", path)
    if spec is None or spec.loader is None:
        raise ValueError(f"cannot import {path}")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return getattr(module, name)  # type: ignore[no-any-return]


def tokens_at(step: int, shape: dict[str, int]) -> tuple[Tensor, Tensor]:
    """Tokens and targets (B, T) of a step, drawn anew from p(rank r) ~ 1/r.

    A few steps learn much of that, so unequal optimizers give unequal losses, and no number of steps exhausts it.
    """
    import torch

    b, t, v = shape["batch_size"], shape["seq_len"], shape["vocab_size"]
    rng = torch.Generator().manual_seed(SEED + step)
    draw = torch.multinomial(1 / torch.arange(1, v + 1), b * (t + 1), replacement=True, generator=rng).view(b, t + 1)
    return draw[:, :-1].contiguous(), draw[:, 1:].contiguous()


def touch_memory(shape: dict[str, int]) -> int:
    """Write once to as much memory as a contestant will need, at most half of what is free; returns the bytes.

    A virtual machine gets a page from its host when it is first written to, several times slower than later, and many
    give it back seconds after it is free again: each contestant does this just before its clock starts, in a process of
    its own, so that its peak of memory is its own.
    """
    parameters = shape["d_model"] * (12 * shape["n_layers"] * shape["d_model"] + shape["vocab_size"])
    free = next((int(x.split()[1]) * 1024 for x in _lines("/proc/meminfo") if x.startswith("MemAvailable")), 0)
    size = min(32 * parameters, free // 2)  # weights, gradients, two moments, copies and activations
    subprocess.run([sys.executable, "-c", f"bytearray(b'1') * {size}"], check=True)
    return size


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text().splitlines()
    except OSError:
        return []


def _rss_mb() -> float | None:
    """The peak of resident memory since the last reset, in MB (1e6 bytes); None where there is no /proc."""
    found = (line for line in _lines("/proc/self/status") if line.startswith("VmHWM"))
    return next((int(line.split()[1]) * 1024 / 1e6 for line in found), None)


def _reset_rss() -> bool:
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:  # no /proc, or a container that forbids it: the whole-life peak is all there is
        return False
    return True


class Session:
    """What one worker knows between requests; each public method answers one request."""

    def __init__(self) -> None:
        self.done, self.waited, self.waited_cpu = 0, 0.0, 0.0
        self.life_mb: float | None = None
        self.reset = False

    def build(self, job: Job) -> Reply:
        start = time.perf_counter()
        import torch

        torch.set_num_threads(job["threads"])
        import_s = time.perf_counter() - start
        self.job: Job = job
        self.cuda: Any = torch.cuda if job["device"] == "cuda" else None
        weights = None
        if job.get("weights"):  # the file is the benchmark's own doing: not on the clock
            from safetensors.torch import load_file

            weights = load_file(job["weights"])
        start = time.perf_counter()
        if not self.cuda:
            touch_memory(job["shape"])
        self.touched_s = time.perf_counter() - start
        start = time.perf_counter()
        self.recipe = Recipe(*function_at(job["run"])(job, weights))
        self.settle()
        self.build_s = time.perf_counter() - start
        versions = {"python": platform.python_version(), "torch": torch.__version__}
        versions |= {"gpu": self.cuda.get_device_name()} if self.cuda else {}
        return {"import_s": import_s, "build_s": self.build_s, "versions": versions}

    def settle(self) -> None:
        if self.cuda:
            self.cuda.synchronize()

    def steps(self, n: int) -> Reply:
        start = time.process_time()
        draws = [tokens_at(self.done + i, self.job["shape"]) for i in range(n)]
        batches = [self.recipe.batch(*(t.to(self.job["device"]) for t in pair)) for pair in draws]
        reply: Reply = {"seconds": [], "cpu": [], "losses": []}
        for batch in batches:
            self.settle()
            wall, cpu = time.perf_counter(), time.process_time()
            loss = float(self.recipe.step(batch))
            self.settle()
            reply["seconds"].append(time.perf_counter() - wall)
            reply["cpu"].append(time.process_time() - cpu)
            reply["losses"].append(loss)
            self._mark(reply)
        return reply | {"cpu_s": time.process_time() - start}

    def _mark(self, reply: Reply) -> None:
        self.done += 1
        if self.done == 1:
            reply["first_step_s"] = self.build_s + reply["seconds"][0]
            reply["first_loss_s"] = time.time() - self.job["spawned"] - self.touched_s
        if self.done == 2:  # from here on nothing is compiled or allocated for the first time
            self.life_mb, self.reset = self._peak(), True if self.cuda else _reset_rss()
            if self.cuda:
                self.cuda.reset_peak_memory_stats()

    def _peak(self) -> float | None:
        return self.cuda.max_memory_allocated() / 1e6 if self.cuda else _rss_mb()

    def memory(self, _: None) -> Reply:
        peak = self._peak()
        life = max((mb for mb in (peak, self.life_mb) if mb is not None), default=None)
        idle = self.waited_cpu / self.waited if self.waited else 0.0
        return {"peak_mb": peak if self.reset else None, "life_mb": life, "idle_cpu": idle}

    def norm(self, _: None) -> Reply:
        squares = {1: 0.0, 2: 0.0}
        for p in self.recipe.params():
            flat = p.detach().flatten()
            for i in range(0, flat.numel(), 1 << 16):  # a float64 copy of the whole would be the peak of memory
                squares[p.ndim] += float(flat[i : i + (1 << 16)].double().square().sum())
        return {"matrix_norm": squares[2] ** 0.5, "vector_norm": squares[1] ** 0.5}

    def call(self, job: Job) -> Reply:
        return {"value": function_at(job["run"])(job)}


def serve(requests: TextIO, replies: TextIO) -> None:
    """Answer requests until the end of the input; an exception ends the process, its traceback is in the log."""
    session = Session()
    while True:
        wall, cpu = time.perf_counter(), time.process_time()
        line = requests.readline()
        session.waited += time.perf_counter() - wall
        session.waited_cpu += time.process_time() - cpu
        if not line:
            return
        ((name, argument),) = json.loads(line).items()
        replies.write(json.dumps(getattr(session, name)(argument)) + "\n")
        replies.flush()


if __name__ == "__main__":
    # what a library prints goes to the log: descriptor 1 is the protocol's alone
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    serve(sys.stdin, answers)
