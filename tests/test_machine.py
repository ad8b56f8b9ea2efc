"""The process-wide settings: what they refuse, and that they change no numbers."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from fnlm import machine


@pytest.fixture
def precision() -> Iterator[None]:
    before = torch.backends.mkldnn.matmul.fp32_precision  # type: ignore[attr-defined]
    yield
    torch.backends.mkldnn.matmul.fp32_precision = before  # type: ignore[attr-defined]


def flags(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    monkeypatch.setattr(machine, "cpu_flags", lambda: frozenset(names))


@pytest.mark.parametrize("names", [("avx2",), ("avx512f", "amx_bf16"), ()])
def test_products_are_not_rerouted_where_digits_would_be_lost(
    monkeypatch: pytest.MonkeyPatch, names: tuple[str, ...], precision: None
) -> None:
    before = torch.backends.mkldnn.matmul.fp32_precision  # type: ignore[attr-defined]
    flags(monkeypatch, *names)
    assert not machine.route_fp32_to_onednn()
    assert torch.backends.mkldnn.matmul.fp32_precision == before  # type: ignore[attr-defined]


@pytest.mark.skipif("avx512f" not in machine.cpu_flags(), reason="this processor has no AVX-512")
@pytest.mark.skipif("amx_bf16" in machine.cpu_flags(), reason="with AMX the switch computes in bfloat16")
def test_rerouted_products_keep_float32s_digits(precision: None) -> None:
    x, y = (torch.randn(64, 512, generator=torch.Generator().manual_seed(i)) for i in (0, 1))
    exact = x.double() @ y.double().T
    assert machine.route_fp32_to_onednn()
    assert float((x @ y.T - exact).norm() / exact.norm()) < 1e-6


@pytest.mark.parametrize(
    ("names", "fast"), [(("avx512f", "avx512_bf16"), True), (("avx512f",), False), (("bf16",), True)]
)
def test_bfloat16_is_fast_where_an_instruction_says_so(
    monkeypatch: pytest.MonkeyPatch, names: tuple[str, ...], fast: bool
) -> None:
    flags(monkeypatch, *names)
    assert machine.has_fast_bf16() is fast


def test_memory_is_kept_on_glibc_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine.platform, "libc_ver", lambda: ("musl", "1.2"))
    assert not machine.keep_freed_memory()
    monkeypatch.undo()
    monkeypatch.setattr(machine.sys, "platform", "darwin")
    assert not machine.keep_freed_memory()
