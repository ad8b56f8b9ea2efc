"""What `fnlm doctor` looks at: versions, packages, threads, devices, the compiler; each finding is plain data."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import platform
import re
import shutil
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import fnlm
from fnlm import clib, environment, machine, optim, tree

PROBE_S = 1.0  # for each device
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}


def examination() -> dict[str, Any]:
    """Everything found, fit for JSON."""
    packages = requirements()
    return {
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "fnlm": fnlm.__version__},
        "system": platform.platform(),
        "threads": threads(),
        "devices": [examined(device) for device in devices()],
        "compiler": compiler(),
        "packages": packages[""],
        "extras": {extra: found for extra, found in packages.items() if extra},
        "disk": {"path": str(Path.cwd()), "free_bytes": shutil.disk_usage(Path.cwd()).free},
    }


def requirements() -> dict[str, dict[str, str | None]]:
    """The installed version (None: missing) of each package that fnlm names, by extra; "" holds the necessary ones."""
    found: dict[str, dict[str, str | None]] = {"": {}}
    with contextlib.suppress(metadata.PackageNotFoundError):  # run from a folder: nothing names what it needs
        for line in metadata.requires("fnlm") or ():
            name, extra = re.split(r"[^\w.-]", line, maxsplit=1)[0], re.search(r"extra == ['\"]([\w-]+)", line)
            if "python_version <" in line and sys.version_info >= (3, 11):
                continue
            version = None
            with contextlib.suppress(metadata.PackageNotFoundError):
                version = metadata.version(name)
            found.setdefault(extra[1] if extra else "", {})[name] = version
    return found


def threads() -> dict[str, Any]:
    """What torch uses, what the process may use, and what a container's quota allows (cores; None: no quota)."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    quota = None
    with contextlib.suppress(OSError, ValueError):
        most, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        quota = int(most) / int(period)  # "max" is no number: no quota
    return {"torch": torch.get_num_threads(), "usable_cores": usable, "quota_cores": quota}


def devices() -> list[str]:
    """The CPU, and every GPU that torch sees."""
    return ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]


def examined(device: str) -> dict[str, Any]:
    """Name, memory, bfloat16, the rate of matrix products, and whether a training step works."""
    cuda = device != "cpu"
    known = torch.cuda.get_device_properties(device) if cuda else None
    fast = machine.has_fast_bf16(device)
    return {
        "device": device,
        "name": known.name if known else environment.cpu_name(),
        "memory_bytes": known.total_memory if known else environment.memory_installed(),
        "bf16": {"fast": fast, "why": bf16_reason(device, fast)},
        "gflops": rates(device),
        "training_step": attempt(partial(train_once, device)),
    }


def bf16_reason(device: str, fast: bool) -> str:
    """Why bfloat16 is, or is not, taken to be faster than float32 here."""
    if device != "cpu":
        major, minor = torch.cuda.get_device_capability(device)
        return f"compute capability {major}.{minor}, " + ("8.0 or later has it" if fast else "it begins with 8.0")
    flags = sorted(machine.cpu_flags() & {"avx512_bf16", "amx_bf16", "bf16"})
    if not machine.cpu_flags():
        return "this system does not tell the processor's instructions"
    return f"the processor has {', '.join(flags)}" if flags else "the processor has no avx512_bf16, amx_bf16 or bf16"


@contextlib.contextmanager
def tuned() -> Iterator[None]:
    """float32 products as training routes them; the setting is of the process, so it is put back."""
    products: Any = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = products.fp32_precision
    machine.route_fp32_to_onednn()
    try:
        yield
    finally:
        products.fp32_precision = before


def rates(device: str) -> dict[str, float | str]:
    """The best rate of a square product in GFLOP/s, by precision, or the error it raised.

    In turns, so that another process on the same cores disturbs both alike.
    """
    n = 1024 if device == "cpu" else 8192
    rounds = {name: attempt(partial(product, device, dtype, n)) for name, dtype in PRECISIONS.items()}
    best = {name: run if isinstance(run, str) else float("inf") for name, run in rounds.items()}
    end = time.perf_counter() + PROBE_S
    with tuned():
        while time.perf_counter() < end and not all(isinstance(run, str) for run in rounds.values()):
            for name, run in rounds.items():
                if not isinstance(run, str):
                    best[name] = min(best[name], run())
    return {name: t if isinstance(t, str) else round(2 * n**3 / t / 1e9, 1) for name, t in best.items()}


def product(device: str, dtype: torch.dtype, n: int) -> Callable[[], float]:
    """A function that times one product of (n, n); tried once here. Raises ValueError if the result is not finite."""
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    if not bool((a @ b).isfinite().all()):
        raise ValueError("the product of finite matrices is not finite")

    def seconds() -> float:
        start = time.perf_counter()
        a @ b
        if device != "cpu":
            torch.cuda.synchronize(device)
        return time.perf_counter() - start

    return seconds


def attempt(run: Callable[[], Any]) -> Any:
    """The result, or the first line of the error: what does not work is a finding here."""
    try:
        return run()
    except (RuntimeError, ValueError, OSError, ImportError) as error:
        return f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"


def train_once(device: str) -> str:
    """One step of a tiny model; "ok" if the loss and the new parameters are finite."""
    cfg = fnlm.ModelConfig(vocab_size=16, n_layers=1, n_heads=2, d_model=16, seq_len=8)
    params = {name: p.to(device) for name, p in fnlm.init_params(cfg, fnlm.key(0)).items()}
    tokens = (torch.arange(16, device=device) % cfg.vocab_size).view(2, 8)
    batch = fnlm.Batch(tokens, tokens, torch.ones(2, 8, device=device))
    optimizer = optim.adamw(1e-3)
    step = fnlm.make_step(fnlm.make_lm_loss(cfg), optimizer, fnlm.Plan(precision="fp32"))
    state, metrics = step(fnlm.init_state(params, optimizer), batch)
    finite = [x.isfinite().all() for x in tree.flatten((state.params, metrics)).values()]
    return "ok" if all(finite) else "the loss or the parameters are not finite"


def compiler() -> dict[str, Any]:
    """What torch.compile needs to write code for a CPU: a C++ compiler and Python's headers; for a GPU: triton. And
    whether the native decode step is there."""
    names = [os.environ["CXX"]] if os.environ.get("CXX") else ["g++", "clang++"]
    cxx = next((path for path in map(shutil.which, names) if path), None)
    headers = (Path(sysconfig.get_path("include")) / "Python.h").is_file()
    triton = importlib.util.find_spec("triton") is not None
    found = clib.library("step")
    native = {"works": found.library is not None, "says": found.says}
    usable = {"cpu": bool(cxx) and headers, "cuda": triton and bool(cxx) and headers}
    return {"cxx": cxx, "python_headers": headers, "triton": triton, "torch_compile": usable, "native": native}
