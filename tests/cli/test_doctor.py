"""`fnlm doctor`: what it finds is true here, and what it would say elsewhere."""

from __future__ import annotations

import copy
import json
import platform
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

import fnlm
from cli import doctor, examination
from cli.main import cli
from fnlm import machine


@pytest.fixture(scope="module")
def found() -> dict:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(examination, "PROBE_S", 0.02)
        return examination.examination()


@pytest.fixture
def elsewhere(found: dict, monkeypatch: pytest.MonkeyPatch) -> dict:
    """A copy of what was found, to change; the command then finds it."""
    report = copy.deepcopy(found)
    monkeypatch.setattr(doctor, "examination", lambda: report)
    return report


def run(*words: str) -> tuple[int, str]:
    result = CliRunner().invoke(cli, ["doctor", *words])
    assert result.stderr == ""
    return result.exit_code, result.stdout


def test_what_is_found_is_true(found: dict) -> None:
    assert found["versions"] == {
        "python": platform.python_version(), "torch": torch.__version__, "fnlm": fnlm.__version__,
    }  # fmt: skip
    assert found["devices"][0]["device"] == "cpu"
    assert len(found["devices"]) == 1 + torch.cuda.device_count()
    assert found["threads"]["torch"] == torch.get_num_threads()
    assert found["disk"]["path"] == str(Path.cwd())
    cpu = found["devices"][0]
    assert cpu["training_step"] == "ok"
    assert all(rate > 0 for rate in cpu["gflops"].values())
    assert cpu["bf16"]["fast"] == machine.has_fast_bf16("cpu")


@pytest.mark.usefixtures("elsewhere")
def test_the_json_is_all_of_it(found: dict) -> None:
    code, out = run("--json")
    report = json.loads(out)
    assert code == 0
    assert report["ok"] is True
    assert report["failures"] == []
    assert report.items() >= json.loads(json.dumps(found)).items()


@pytest.mark.usefixtures("elsewhere")
def test_the_text_names_everything() -> None:
    code, out = run()
    assert code == 0
    for word in (
        "python",
        "torch",
        "fnlm",
        "threads",
        "torch.compile",
        "disk",
        "bf16",
        "fp32 product",
        "GFLOP/s",
        "hub",
    ):
        assert word in out
    assert all(line == line.rstrip() for line in out.splitlines())


def test_packages_are_those_that_fnlm_names(found: dict) -> None:
    assert {"torch", "numpy", "click", "pydantic"} <= set(found["packages"])
    assert {"hub", "wandb", "tensorboard", "plot", "eval"} <= set(found["extras"])
    assert "datasets" in found["extras"]["hub"]
    assert ("tomli" in found["packages"]) == (sys.version_info < (3, 11))
    assert found["packages"]["torch"] is not None


FAILURES = [
    (lambda r: r["packages"].update(einops=None), "not installed: einops; install fnlm with its dependencies again"),
    (lambda r: r["versions"].update(torch="2.10.1+cpu"), "torch 2.10.1+cpu is too old; install 2.11 or later"),
    (lambda r: r["devices"][0].update(training_step="RuntimeError: no"), "cpu cannot train: RuntimeError: no"),
    (
        lambda r: r["devices"][0]["gflops"].update(fp32="RuntimeError: x"),
        "cpu cannot multiply matrices: RuntimeError: x",
    ),
]
WARNINGS = [
    (lambda r: r["threads"].update(torch=64, usable_cores=64, quota_cores=1.5),
     "torch uses 64 threads on 1.5 cores; set OMP_NUM_THREADS=1"),
    (lambda r: r["disk"].update(free_bytes=1 << 29), "512 MiB free in "),
    (lambda r: r["packages"].clear(), "fnlm is not installed, only found in this folder"),
    (lambda r: r["compiler"]["torch_compile"].update(cpu=False), "torch.compile cannot work on the CPU"),
    (lambda r: r["compiler"].update(native={"works": False, "says": "no C compiler (cc)"}),
     "the native decode step is not there: no C compiler (cc); texts are written by torch"),
    (lambda r: r["devices"][0]["gflops"].update(bf16="RuntimeError: x"),
     "cpu cannot multiply in bf16: RuntimeError: x; train with precision=fp32"),
    (lambda r: r["devices"][0].update(bf16={"fast": False, "why": ""}, gflops={"fp32": 9.0, "bf16": 2.0}),
     "cpu: bf16 is slower than fp32 here"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "says"), FAILURES)
def test_what_is_essential_fails_with_3(elsewhere: dict, change, says: str) -> None:
    change(elsewhere)
    code, out = run()
    assert code == 3
    assert f"\nfailure: {says}\n" in out
    code, out = run("--json")
    assert code == 3
    assert json.loads(out)["ok"] is False
    assert json.loads(out)["failures"] == [says]


@pytest.mark.parametrize(("change", "says"), WARNINGS)
def test_what_only_limits_is_a_warning(elsewhere: dict, change, says: str) -> None:
    change(elsewhere)
    code, out = run()
    assert code == 0
    assert f"\nwarning: {says}" in out
    assert any(line.startswith(says) for line in json.loads(run("--json")[1])["warnings"])


def test_an_old_python_is_a_failure(elsewhere: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    elsewhere["versions"]["python"] = "3.9.1"
    monkeypatch.setattr(doctor, "OLDEST_PYTHON", (99,))
    assert run()[0] == 3
    assert "Python 3.9.1 is too old" in run()[1]


def test_a_device_that_fails_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> torch.Tensor:
        raise RuntimeError("no kernel image\nmore lines")

    monkeypatch.setattr(torch, "randn", broken)
    assert examination.rates("cpu") == dict.fromkeys(("fp32", "bf16"), "RuntimeError: no kernel image")


def test_a_product_that_is_not_finite_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "randn", lambda *size, device: torch.full(size, torch.inf, device=device))
    assert examination.rates("cpu")["fp32"] == "ValueError: the product of finite matrices is not finite"


def test_the_probe_leaves_the_process_as_it_was() -> None:
    products = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = products.fp32_precision
    with examination.tuned():
        assert machine.route_fp32_to_onednn() == (products.fp32_precision == "bf16")
    assert products.fp32_precision == before


def test_why_bf16_is_fast(monkeypatch: pytest.MonkeyPatch) -> None:
    for flags, reason in (
        ({"amx_bf16", "avx512_bf16", "sse"}, "the processor has amx_bf16, avx512_bf16"),
        ({"sse"}, "the processor has no avx512_bf16, amx_bf16 or bf16"),
        (set(), "this system does not tell the processor's instructions"),
    ):
        monkeypatch.setattr(machine, "cpu_flags", lambda flags=flags: frozenset(flags))
        assert examination.bf16_reason("cpu", machine.has_fast_bf16("cpu")) == reason
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert examination.bf16_reason("cuda:0", False) == "compute capability 7.5, it begins with 8.0"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert examination.bf16_reason("cuda:0", True) == "compute capability 9.0, 8.0 or later has it"


def test_the_compiler_that_cxx_names(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CXX", str(tmp_path / "none"))
    assert examination.compiler()["cxx"] is None
    assert examination.compiler()["torch_compile"] == {"cpu": False, "cuda": False}
    (tmp_path / "mycc").write_text("")
    (tmp_path / "mycc").chmod(0o755)
    monkeypatch.setenv("CXX", str(tmp_path / "mycc"))
    assert examination.compiler()["cxx"] == str(tmp_path / "mycc")
