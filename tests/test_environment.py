"""environment.json tells what ran and no secret; memory in bytes on each system; the peak of a GPU by its name."""

from __future__ import annotations

import json
import os
import platform
import resource
import subprocess
import sys
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import fnlm
from fnlm import environment as env

GIT = ("git", "-c", "user.name=A", "-c", "user.email=a@b.c", "-c", "commit.gpgsign=false")


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with one commit."""
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path))
    folder = tmp_path / "repository"
    folder.mkdir()
    monkeypatch.chdir(folder)
    (folder / "file").write_text("1")
    for words in (["init", "-q"], ["add", "file"], ["commit", "-q", "-m", "first"]):
        subprocess.run([*GIT, *words], check=True)
    return folder


def test_what_a_run_notes_of_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (
        "OMP_NUM_THREADS",
        "FNLM_TEST_DATA",
        "FNLM_API_KEY",
        "FNLM_hub_token",
        "MY_PASSWORD",
        "OMP_NUM_THREADS_",
    ):
        monkeypatch.setenv(name, "7")
    found = env.environment(["fnlm", "train", "demo", "lr=1e-3"])
    assert json.loads(json.dumps(found)) == found
    assert found["command"] == ["fnlm", "train", "demo", "lr=1e-3"]
    assert found["versions"] == {
        "python": platform.python_version(),
        "fnlm": fnlm.__version__,
        "torch": torch.__version__,
        "numpy": np.__version__,
        "cuda": torch.version.cuda,
    }
    assert abs((datetime.now(timezone.utc) - datetime.fromisoformat(found["started"])).total_seconds()) < 60
    assert found["threads"] == torch.get_num_threads()
    assert 1 <= found["cores"] <= (os.cpu_count() or 1)
    assert found["memory_bytes"] > 1 << 28
    assert len(found["gpus"]) == torch.cuda.device_count()
    assert found["cpu"]
    kept = set(found["variables"]) - {"CUDA_VISIBLE_DEVICES"}
    assert {"OMP_NUM_THREADS", "FNLM_TEST_DATA"} <= kept
    assert not [
        name for name in kept if "KEY" in name or "token" in name or name.startswith(("MY_", "OMP_NUM_THREADS_"))
    ]


def test_the_commit_and_whether_files_differ(repository: Path) -> None:
    head = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
    assert env.git() == {"commit": head, "dirty": False}
    (repository / "other").write_text("not ours")
    assert env.git() == {"commit": head, "dirty": False}
    (repository / "file").write_text("2")
    assert env.git() == {"commit": head, "dirty": True}


def test_no_commit_no_repository_no_git(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, repository: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    monkeypatch.chdir(empty)
    assert env.git() is None
    subprocess.run([*GIT, "init", "-q"], check=True)
    assert env.git() is None
    monkeypatch.chdir(repository)
    assert env.git() is not None
    monkeypatch.setenv("PATH", str(empty))
    assert env.git() is None


def test_a_git_that_hangs_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(env, "GIT_S", 0.05)
    assert env._output(sys.executable, "-c", "import time; time.sleep(9)") is None


# Memory


def test_memory_here() -> None:
    installed = env.memory_installed()
    assert installed is not None
    assert 1 << 26 < env.memory_available() <= installed


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="no /proc")
def test_the_peak_rises_and_stays() -> None:
    mib = 1 << 20  # the kernel counts in batches for each core, so that a few pages come and go
    before = env.peak_bytes()
    assert before is not None
    now = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    held = np.ones(before - now + 64 * mib, dtype=np.uint8)
    after = env.peak_bytes()
    del held
    later = env.peak_bytes()
    assert after is not None
    assert later is not None
    assert before + 48 * mib < after < before + 80 * mib
    assert abs(later - after) < 2 * mib


def test_the_peak_is_of_this_process_alone() -> None:
    held = np.ones(3 << 26, dtype=np.uint8)  # in this one, which starts the other
    code = "import re; print(re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1])"
    if not Path("/proc/self/status").exists():
        pytest.skip("no /proc")
    small = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(small.stdout) * 1024 < held.nbytes


def files(root: Path, **texts: str) -> Path:
    for name, text in texts.items():
        path = root / name.replace("__", "/").replace("_DOT_", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


@pytest.mark.parametrize(
    ("texts", "available"),
    [
        ({"proc__meminfo": "MemFree: 5 kB\nMemAvailable:    8000 kB\n"}, 8_192_000),
        ({"proc__meminfo": "MemAvailable: 8000 kB\n", "group__memory_DOT_max": "max\n"}, 8_192_000),
        (
            {
                "proc__meminfo": "MemAvailable: 8000 kB\n",
                "group__memory_DOT_max": "1000000\n",
                "group__memory_DOT_current": "700000\n",
                "group__memory_DOT_stat": "anon 1\ninactive_file 200000\nactive_file 3\n",
            },
            500_000,
        ),
        (
            {
                "proc__meminfo": "MemAvailable: 8000 kB\n",
                "group__memory__memory_DOT_limit_in_bytes": "1000000\n",
                "group__memory__memory_DOT_usage_in_bytes": "1200000\n",
            },
            0,
        ),
    ],
)
def test_a_container_has_less(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, texts: dict[str, str], available: int
) -> None:
    files(tmp_path, **texts)
    monkeypatch.setattr(env, "KNOWN", (tmp_path / "proc", tmp_path / "group"))
    assert env.memory_available() == available


@pytest.mark.parametrize(("system", "unit"), [("linux", 1024), ("darwin", 1)])
def test_units_without_proc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, system: str, unit: int) -> None:
    monkeypatch.setattr(env, "KNOWN", (tmp_path, tmp_path))
    monkeypatch.setattr(sys, "platform", system)
    usage: Any = type("Usage", (), {"ru_maxrss": 5000})
    monkeypatch.setattr(resource, "getrusage", lambda who: usage)
    assert env.peak_bytes() == 5000 * unit
    assert env.memory_available() == env.memory_installed()
    monkeypatch.setitem(sys.modules, "resource", None)
    assert env.peak_bytes() is None


def test_a_gpu_tells_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (123, 456))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 789)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    assert env.memory_available("cuda") == 123
    assert env.peak_bytes(torch.device("cuda:0")) == 789
    assert env.peak_flops("cuda", "bf16") == 989e12


# Speed


@pytest.mark.parametrize(
    ("name", "bf16", "fp16", "fp32"),
    [
        ("Tesla V100-SXM2-16GB", None, 125, 15.7),
        ("Tesla V100S-PCIE-32GB", None, 130, 16.4),
        ("Tesla T4", None, 65, 8.1),
        ("NVIDIA A100-SXM4-80GB", 312, 312, 19.5),
        ("NVIDIA A100 80GB PCIe", 312, 312, 19.5),
        ("NVIDIA A10", 125, 125, 31.2),
        ("NVIDIA L4", 121, 121, 30.3),
        ("NVIDIA L40S", 362, 362, 91.6),
        ("NVIDIA GeForce RTX 3090", 71, 71, 35.6),
        ("NVIDIA GeForce RTX 4090", 165.2, 165.2, 82.6),
        ("NVIDIA H100 PCIe", 756, 756, 51),
        ("NVIDIA H100 80GB HBM3", 989, 989, 67),
        ("NVIDIA H100 NVL", 835, 835, 60),
        ("NVIDIA H200", 989, 989, 67),
        ("NVIDIA GH200 480GB", 989, 989, 67),
        ("NVIDIA B200", 2250, 2250, 75),
        ("NVIDIA A10G", None, None, None),
        ("NVIDIA A1000", None, None, None),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", None, None, None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None, None, None),
        ("NVIDIA GeForce RTX 4090 D", None, None, None),
        ("NVIDIA H20", None, None, None),
    ],
)
def test_the_peak_of_a_gpu_by_its_name(name: str, bf16: float | None, fp16: float | None, fp32: float | None) -> None:
    found = [env.peak_of(name, precision) for precision in ("bf16", "fp16", "fp32", "fp8", "count")]
    assert found == [None if x is None else x * 1e12 for x in (bf16, fp16, fp32)] + [None, None]


def test_one_row_for_a_name_and_no_peak_of_a_cpu() -> None:
    assert env.peak_flops("cpu", "fp32") is None
    assert env.peak_flops(torch.device("cpu"), "bf16") is None
    for peak in env.PEAKS.values():
        assert peak.fp32 < min(x for x in (peak.bf16, peak.fp16) if x is not None)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_product_stays_below_the_peak() -> None:
    peak = env.peak_flops("cuda", "bf16")
    if peak is None:
        pytest.skip(f"{torch.cuda.get_device_name()} is not known")
    a = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    best = 0.0
    for _ in range(20):
        begin.record()
        a @ a
        end.record()
        end.synchronize()
        best = max(best, 2 * 8192**3 / begin.elapsed_time(end) * 1e3)
    assert 0.4 * peak < best < peak
