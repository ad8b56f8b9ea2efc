"""Memory in large pages: the same numbers, places of their own, and gone with the tensors."""

from __future__ import annotations

import gc
import sys
from pathlib import Path

import pytest
import torch

from fnlm import pages
from fnlm.pages import ALIGNED, BLOCK, Pages


def test_what_is_joined_is_what_cat_gives_in_another_type() -> None:
    room = Pages()
    parts = [torch.randn(n, 5) for n in (3, 1, 4)]
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        assert torch.equal(room.joined(parts, dtype), torch.cat(parts).to(dtype))
    assert torch.equal(room.joined([torch.arange(7)], torch.int64), torch.arange(7))


def test_no_two_share_a_byte_and_each_is_aligned() -> None:
    room = Pages()
    made = [room.empty((n, 3), dtype) for n in (1, 50, 0, 7) for dtype in (torch.int8, torch.float32)]
    for i, x in enumerate(made):
        x.fill_(i)
    assert all(torch.equal(x, torch.full_like(x, i)) for i, x in enumerate(made))
    assert all(x.data_ptr() % ALIGNED == 0 for x in made)


def test_what_is_larger_than_a_block_gets_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pages, "BLOCK", 1024)
    room = Pages()
    small, large, last = (room.empty((n,), torch.uint8) for n in (1000, 5000, 1000))
    for i, x in enumerate((small, large, last)):
        x.fill_(i)
    assert [int(x.sum()) for x in (small, large, last)] == [0, 5000, 2000]


def test_other_devices_keep_theirs() -> None:
    out = Pages().joined([torch.empty(2, 3, device="meta"), torch.empty(1, 3, device="meta")], torch.bfloat16)
    assert (out.device.type, out.shape, out.dtype) == ("meta", (3, 3), torch.bfloat16)


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="no /proc")
def test_it_goes_with_its_tensors_and_children_do_not_write_into_it() -> None:
    """The room is forgotten while its tensors live; a shared mapping would be memory of another kind."""

    def mapped() -> int:
        return int(Path("/proc/self/statm").read_text().split()[0]) * 4096

    before = mapped()
    kept = Pages().empty((BLOCK // 4,), torch.float32)
    kept.fill_(1)
    assert float(kept[-1]) == 1
    assert mapped() - before >= BLOCK
    if sys.platform == "linux":
        rows = [line.split() for line in Path("/proc/self/maps").read_text().splitlines()]
        ends = [(*(int(x, 16) for x in row[0].split("-")), row[1]) for row in rows]
        assert next(how for low, high, how in ends if low <= kept.data_ptr() < high) == "rw-p"  # private
    del kept
    gc.collect()
    assert mapped() - before < BLOCK
