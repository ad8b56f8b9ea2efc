"""Where a run takes place: versions, machine and commit for `environment.json`; memory; the peak rate of known GPUs."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

GIT_S = 5.0
VARIABLES = re.compile(r"OMP_NUM_THREADS|CUDA_VISIBLE_DEVICES|FNLM_\w+")
SECRET = re.compile(r"KEY|TOKEN|SECRET|PASS|AUTH|CREDENTIAL", re.IGNORECASE)
CGROUPS = (  # of a container: its limit, what it uses, and what of that are files that can be dropped
    ("memory.max", "memory.current", "memory.stat", "inactive_file"),
    ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat", "total_inactive_file"),
)
KNOWN = Path("/proc"), Path("/sys/fs/cgroup")


def environment(argv: Sequence[str]) -> dict[str, Any]:
    """What `environment.json` says of a run that starts now: fit for JSON, and without secrets.

    Of the environment: OMP_NUM_THREADS, CUDA_VISIBLE_DEVICES, and FNLM_* whose name is not that of a secret.
    """
    here = {k: v for k, v in os.environ.items() if VARIABLES.fullmatch(k) and not SECRET.search(k)}
    return {
        "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": list(argv),
        "versions": versions(),
        "platform": platform.platform(),
        "cpu": cpu_name(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_bytes": memory_installed(),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "git": git(),
        "variables": dict(sorted(here.items())),
    }


def versions() -> dict[str, str | None]:
    """Of Python, fnlm (as it runs, not as it was once installed) and what computes."""
    return {
        "python": platform.python_version(),
        "fnlm": getattr(sys.modules["fnlm"], "__version__", None),
        "torch": str(torch.__version__),
        "numpy": np.__version__,
        "cuda": torch.version.cuda,
    }


def cpu_name() -> str:
    """The processor as /proc/cpuinfo or macOS names it, else its architecture."""
    text = _text(KNOWN[0] / "cpuinfo")
    if found := re.search(r"^model name\s*: (.*)$", text, re.MULTILINE):
        return found[1].strip()
    brand = _output("sysctl", "-n", "machdep.cpu.brand_string") if sys.platform == "darwin" else None
    return brand or platform.processor() or platform.machine()


def git() -> dict[str, Any] | None:
    """The commit of the working directory and whether tracked files differ; None without git, repository or commit."""
    commit = _output("git", "rev-parse", "--verify", "HEAD")
    if commit is None:
        return None
    # a status by default writes the index and may start a program that watches files
    quiet = ("git", "--no-optional-locks", "-c", "core.fsmonitor=false")
    changes = _output(*quiet, "status", "--porcelain", "--untracked-files=no")
    return {"commit": commit, "dirty": None if changes is None else changes != ""}


def _output(*command: str) -> str | None:
    try:
        run = subprocess.run(command, capture_output=True, text=True, timeout=GIT_S, stdin=subprocess.DEVNULL)
    except (OSError, subprocess.TimeoutExpired, UnicodeDecodeError):
        return None
    return run.stdout.strip() if run.returncode == 0 else None


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


# Memory


def memory_installed() -> int | None:
    """The machine's memory in bytes; None where the system does not tell."""
    names = getattr(os, "sysconf_names", {})
    if "SC_PHYS_PAGES" not in names or "SC_PAGE_SIZE" not in names:
        return None
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def memory_available(device: torch.device | str = "cpu") -> int:
    """The bytes that can be allocated before something is swapped or killed, a container's limit included.

    Of a GPU: what is free on it. Where the system does not tell, all that is installed, or no limit at all.
    """
    if torch.device(device).type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    free = re.search(r"^MemAvailable:\s+(\d+) kB", _text(KNOWN[0] / "meminfo"), re.MULTILINE)
    machine = int(free[1]) * 1024 if free else memory_installed() or sys.maxsize
    return min([machine, *_container()])


def _container() -> list[int]:
    """What the control groups of this process leave, for each that has a limit."""
    left = []
    for limit, used, stat, inactive in CGROUPS:
        most, now = _text(KNOWN[1] / limit).strip(), _text(KNOWN[1] / used).strip()
        if most.isdecimal() and now.isdecimal():  # "max" is no limit
            files = re.search(rf"^{inactive} (\d+)$", _text(KNOWN[1] / stat), re.MULTILINE)
            left.append(max(0, int(most) - int(now) + (int(files[1]) if files else 0)))
    return left


def peak_bytes(device: torch.device | str = "cpu") -> int | None:
    """The most memory in use so far: resident, of this process, or allocated by torch on a GPU; None if unknown."""
    if torch.device(device).type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    # ru_maxrss of a process begins with that of the one which started it; the kernel's own mark does not.
    if mark := re.search(r"^VmHWM:\s+(\d+) kB", _text(KNOWN[0] / "self/status"), re.MULTILINE):
        return int(mark[1]) * 1024
    try:
        import resource
    except ImportError:  # Windows
        return None
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


# Speed


class Peak(NamedTuple):
    """TFLOP/s of dense products without sparsity, summed in float32: bfloat16 and float16 on tensor cores, float32."""

    bf16: float | None
    fp16: float | None
    fp32: float


# The manufacturers' data sheets and architecture white papers; the name is all that torch tells of a GPU.
PEAKS = {
    r"(Tesla )?V100-SXM2.*": Peak(None, 125, 15.7),
    r"(Tesla )?V100-PCIE.*": Peak(None, 112, 14),
    r"(Tesla )?V100S-PCIE.*": Peak(None, 130, 16.4),
    r"(Tesla )?T4": Peak(None, 65, 8.1),
    r"A[18]00\b.*": Peak(312, 312, 19.5),
    r"A10": Peak(125, 125, 31.2),
    r"A30": Peak(165, 165, 10.3),
    r"A40": Peak(149.7, 149.7, 37.4),
    r"RTX A6000": Peak(154.8, 154.8, 38.7),
    r"GeForce RTX 3090": Peak(71, 71, 35.6),
    r"GeForce RTX 3090 Ti": Peak(80, 80, 40),
    r"GeForce RTX 4080": Peak(97.5, 97.5, 48.7),
    r"GeForce RTX 4090": Peak(165.2, 165.2, 82.6),
    r"GeForce RTX 5090": Peak(209.5, 209.5, 104.8),
    r"L4": Peak(121, 121, 30.3),
    r"L40": Peak(181, 181, 90.5),
    r"L40S": Peak(362, 362, 91.6),
    r"H100 PCIe": Peak(756, 756, 51),
    r"H[12]00 NVL": Peak(835, 835, 60),
    r"H100 80GB HBM3|H200|GH200 .*": Peak(989, 989, 67),
    r"B200": Peak(2250, 2250, 75),
    r"AMD Instinct MI300X.*": Peak(1307.4, 1307.4, 163.4),
}


def peak_flops(device: torch.device | str, precision: str) -> float | None:
    """The most FLOP/s of a device in "fp32", "bf16" or "fp16"; None for a CPU, or a GPU that is not known."""
    if torch.device(device).type != "cuda":
        return None
    return peak_of(torch.cuda.get_device_name(device), precision)


def peak_of(name: str, precision: str) -> float | None:
    """`peak_flops` of a GPU's name. A part of a GPU, or one of a laptop, is another GPU, and unknown."""
    name = name.removeprefix("NVIDIA ").strip()
    if re.search(r"\bMIG\b|Laptop|Mobile|Max-Q", name):
        return None
    found = next((peak for pattern, peak in PEAKS.items() if re.fullmatch(pattern, name)), None)
    rate = getattr(found, precision, None) if precision in Peak._fields else None
    return None if rate is None else rate * 1e12
