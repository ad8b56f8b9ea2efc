"""`fnlm bench step`: one training step of ours beside nanoGPT's own, same weights, data, mathematics; turn by turn."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from types import MappingProxyType
from typing import IO, Any, NamedTuple

from fnlm.benchmark_report import (
    CHECKED_STEP,
    Report,
    Shape,
    Turn,
    add_speed,
    compare,
    model_flops,
    table,
    unequal_work,
)

__all__ = ["SHAPES", "Contestant", "Shape", "Worker", "contestants", "step_benchmark", "table"]

WORKER = Path(__file__).with_name("benchmark_worker.py")
CONTESTANTS = Path(__file__).with_name("benchmark_contestants.py")
REST_S = 0.25  # an OpenMP pool spins for a while after its last region: let it fall asleep before the next one's turn
TIMEOUT_S = 1800.0


class Contestant(NamedTuple):
    """Who runs; `run` is `nanogpt`, `ours`, or `FILE.py:FUNCTION` called as those in `benchmark_contestants` are."""

    name: str
    run: str
    precision: str
    options: Mapping[str, Any] = MappingProxyType({})


SHAPES = {
    "shakespeare-char-cpu": Shape(4, 4, 128, 64, 12, 65, rounds=12, steps=20),
    "ryan-12m": Shape(6, 5, 320, 512, 4, 16000, rounds=8, steps=3),
    "gpt2": Shape(12, 12, 768, 1024, 1, 50304, rounds=5, steps=2),
}
QUICK = ("shakespeare-char-cpu", 3, 5)


def contestants(against: str | None, precision: str = "bf16", compiled: bool = False) -> list[Contestant]:
    """The usual field: nanoGPT as its readme runs it on a CPU, nanoGPT at its best, and ours."""
    yardsticks = [
        Contestant("nanogpt-default", "nanogpt", "fp32"),
        Contestant("nanogpt-best", "nanogpt", "bf16", {"compile": True, "fused": True}),
    ]
    ours = [Contestant("fnlm", "ours", precision)]
    if compiled:
        ours.append(Contestant("fnlm-compiled", "ours", precision, {"compile": "block"}))
    return (yardsticks if against else []) + ours


class Worker:
    """A contestant's process and the requests it answers; a context manager, which ends the process."""

    def __init__(self, name: str, threads: int, folder: Path) -> None:
        self.name, self.log = name, folder / "log"
        folder.mkdir()
        cache = {"TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor"), "TRITON_CACHE_DIR": str(folder / "triton")}
        pools = {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
        # by path and from an empty folder: no import of fnlm, and none of its file names shadows the standard library's
        command = f"import runpy; runpy.run_path({str(WORKER)!r}, run_name='__main__')"
        with open(self.log, "w") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-c", command],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                cwd=folder,
                env=os.environ | pools | cache,
            )

    def ask(self, request: str, argument: Any = None) -> dict[str, Any]:
        """One request and its reply. Raises RuntimeError with the end of the log when the process died or hangs."""
        watch = threading.Timer(TIMEOUT_S, self.process.kill)
        watch.start()
        try:
            line = self._exchange(json.dumps({request: argument}) + "\n")
        finally:
            watch.cancel()
        if not line:
            tail = "\n".join(self.log.read_text(errors="replace").splitlines()[-25:])
            raise RuntimeError(f"{self.name} ended during {request!r}:\n{tail}")
        reply: dict[str, Any] = json.loads(line)
        return reply

    def _exchange(self, line: str) -> str:
        source, sink = self._pipes()
        try:
            sink.write(line)
            sink.flush()
            return source.readline()
        except BrokenPipeError:
            return ""

    def _pipes(self) -> tuple[IO[str], IO[str]]:
        assert self.process.stdout is not None
        assert self.process.stdin is not None
        return self.process.stdout, self.process.stdin

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        source, sink = self._pipes()
        with contextlib.suppress(BrokenPipeError):
            sink.close()
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        source.close()


def _place(run: str) -> str:
    return run if ":" in run else f"{CONTESTANTS}:{run}"


def _started(field: Iterable[Contestant], job: Report, folder: Path, stack: contextlib.ExitStack) -> Iterator[Any]:
    """Start, build and run the first four steps, one process after the other; yields the worker and what is known."""
    for i, c in enumerate(field):
        _wait_for_calm()
        spawned = time.time()
        worker = stack.enter_context(Worker(c.name, job["threads"], folder / f"{i}-{c.name}"))
        mine = job | {"run": _place(c.run), "precision": c.precision, "options": dict(c.options), "spawned": spawned}
        ready = worker.ask("build", mine)
        first = worker.ask("steps", 1)
        rest = worker.ask("steps", CHECKED_STEP - 1)
        losses = first["losses"] + rest["losses"]
        times = {"first_step_s": first["first_step_s"], "first_loss_s": first["first_loss_s"]}
        known = {"precision": c.precision, **ready, **times, "losses": losses, "loss": losses[-1]}
        yield worker, known | worker.ask("norm")


def _wait_for_calm(most_s: float = 60.0) -> None:
    """Until the machine is at rest: a compiler's helpers go on for a while after the first step that needed them."""
    deadline, calm = time.monotonic() + most_s, 0
    while calm < 3 and time.monotonic() < deadline:
        before = _busy_s()
        time.sleep(REST_S)
        calm = calm + 1 if _busy_s() - before < 0.1 * REST_S else 0


def _play(workers: Sequence[Worker], rounds: int, steps: int) -> tuple[dict[str, list[Turn]], float | None]:
    """`rounds` turns of every worker, never two at once, backwards every other round against drift of the machine.

    Also how many cores something else kept busy meanwhile; None where the system does not tell.
    """
    turns: dict[str, list[Turn]] = {w.name: [] for w in workers}
    ours, busy, wall = 0.0, 0.0, 0.0
    for r in range(rounds):
        for worker in workers if r % 2 == 0 else reversed(workers):
            time.sleep(REST_S)
            start, before = time.perf_counter(), _busy_s()
            reply = worker.ask("steps", steps + 1)  # the first of a turn finds cold caches and is not recorded
            ours, wall = ours + reply["cpu_s"], wall + time.perf_counter() - start
            busy += _busy_s() - before
            turns[worker.name].append({k: reply[k][1:] for k in ("seconds", "cpu")})
    return turns, max(0.0, busy - ours) / wall if busy else None


def _busy_s() -> float:
    """Seconds all cores together were busy or taken by another guest, since boot; 0 where there is no /proc."""
    try:
        ticks = [int(x) for x in Path("/proc/stat").read_text().split(maxsplit=9)[1:9]]
    except OSError:
        return 0.0
    return (sum(ticks) - ticks[3] - ticks[4]) / os.sysconf("SC_CLK_TCK")  # less idle, iowait


def _one_shape(
    shape: Shape, field: Sequence[Contestant], job: Report, folder: Path, log: Callable[[str], None]
) -> Report:
    """Everything measured at one shape."""
    job = job | {"shape": shape.sizes()}
    gflops: dict[str, float | None] = {}
    with Worker("probe", job["threads"], folder / "probe") as probe:
        asked = job | {"run": _place("matmul_gflops")}
        for precision in sorted({c.precision for c in field}):
            gflops[precision] = probe.ask("call", asked | {"precision": precision})["value"]
    if job["against"]:
        job["weights"] = str(folder / "weights.safetensors")
        with Worker("weights", job["threads"], folder / "weights") as writer:
            writer.ask("call", job | {"run": _place("write_nanogpt_weights")})
    with contextlib.ExitStack() as stack:
        workers, results = [], {}
        for worker, result in _started(field, job, folder, stack):
            log(f"{worker.name}: first step after {result['first_step_s']:.2f} s, loss {result['loss']:.5f}")
            workers.append(worker)
            results[worker.name] = result
        log(f"{shape.rounds} rounds of {shape.steps} steps")
        turns, others = _play(workers, shape.rounds, shape.steps)
        for worker in workers:
            results[worker.name] |= worker.ask("memory")
            add_speed(results[worker.name], turns[worker.name], shape, gflops[results[worker.name]["precision"]])
    compare(results, turns, [c.name for c in field if c.run == "nanogpt"])
    problems = unequal_work(results, job["device"])
    return {
        "shape": shape._asdict(),
        "model_gflop": model_flops(shape) / 1e9,
        "peak_gflops": gflops,
        "others_cores": others,
        "contestants": results,
        "unequal_work": problems,
    }


def _machine(threads: int) -> Report:
    cpu = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), cpu)
    return {"cpu": cpu, "cores": os.cpu_count(), "threads": threads, "system": platform.platform()}


def step_benchmark(
    against: str | None = None,
    *,
    shapes: Sequence[str] | None = None,
    device: str = "cpu",
    precision: str = "bf16",
    threads: int | None = None,
    rounds: int | None = None,
    steps: int | None = None,
    quick: bool = False,
    compiled: bool = False,
    field: Sequence[Contestant] | None = None,
    log: Callable[[str], None] = lambda line: print(line, file=sys.stderr),
) -> Report:
    """Time a training step at each shape; the report is fit for JSON, and `report["ok"]` says all did the same work.

    `against` is a nanoGPT checkout, loaded by path; `field` replaces the usual contestants. Raises ValueError for an
    unknown shape or a folder without nanoGPT's model, RuntimeError when a contestant's process fails.
    """
    if against is not None and not (Path(against) / "model.py").is_file():
        raise ValueError(f"no model.py in {against}; clone https://github.com/karpathy/nanoGPT and name that folder")
    names = list(shapes or ([QUICK[0]] if quick else SHAPES))
    unknown = [name for name in names if name not in SHAPES]
    if unknown:
        raise ValueError(f"unknown shape {unknown[0]!r}; choose from {', '.join(SHAPES)}")
    threads = threads or min(2, os.cpu_count() or 1)
    field = list(field or contestants(against, precision, compiled))
    where = str(Path(against).resolve()) if against else None
    job = {"device": device, "threads": threads, "against": where}
    report: Report = {"benchmark": "step", "date": datetime.now(timezone.utc).isoformat(timespec="seconds")}
    report |= {"device": device, "machine": _machine(threads), "shapes": {}}
    for name in names:
        shape = SHAPES[name]
        few = QUICK[1:] if quick else (shape.rounds, shape.steps)
        shape = shape._replace(rounds=rounds or few[0], steps=steps or few[1])
        log(f"{name}: {', '.join(c.name for c in field)}")
        with tempfile.TemporaryDirectory(prefix="fnlm-bench-", ignore_cleanup_errors=True) as folder:
            report["shapes"][name] = _one_shape(shape, field, job, Path(folder), log)
    results = [r for part in report["shapes"].values() for r in part["contestants"].values()]
    report["versions"] = results[0]["versions"]
    report["ok"] = not any(part["unequal_work"] for part in report["shapes"].values())
    return report
