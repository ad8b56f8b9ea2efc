"""A checkpoint that several ranks write is one checkpoint: read whole or in any boxes, committed whole or not there."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from fnlm import checkpoint, tree
from fnlm.checkpoint import CheckpointError, SaveFailed
from fnlm.checkpoint.files import Mapped
from fnlm.checkpoint.packing import flat
from fnlm.checkpoint.parts import part_of, write_part
from tests.checkpoint.by_ranks import WORLD, cut, save_by_ranks
from tests.checkpoint.test_faults import state_at

PART = "params-00001-of-00003.safetensors"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """One whole checkpoint, and one by three ranks."""
    monkeypatch.setattr(os, "fsync", lambda fd: None)
    checkpoint.save(tmp_path, state_at(1), config={})
    save_by_ranks(tmp_path, state_at(2), config={})
    return tmp_path


def test_it_comes_back_whole(folder: Path) -> None:
    path = checkpoint.newest_good(folder)
    assert path == folder / "00000002"
    assert tree.equal(checkpoint.restore(path, state_at(0))[0], state_at(2))
    assert not [p.name for p in folder.iterdir() if p.name.startswith(".")]
    assert json.loads((path / "MANIFEST.json").read_text())["format"] == 2


def test_every_element_is_written_once(folder: Path) -> None:
    path, wanted = folder / "00000002", flat(state_at(2))
    seen = {name: torch.zeros(t.shape, dtype=torch.int64) for name, t in wanted.items()}
    for name, pieces in checkpoint.describe(path)["pieces"].items():
        for file, at, shape in pieces:
            box = tuple(slice(a, a + n) for a, n in zip(at, shape, strict=True))
            seen[name][box] += 1
            with safe_open(str(path / file), "pt") as opened:
                assert torch.equal(opened.get_tensor(name.removeprefix("params/")), wanted[name][box])
    assert all(bool((count == 1).all()) for count in seen.values())


@pytest.mark.parametrize("ranks", [1, 2, 5])
def test_any_other_number_of_ranks_reads_its_boxes(folder: Path, ranks: int) -> None:
    """By rows, where three ranks have written columns; of parameters alone, too."""

    def box(shape: tuple[int, ...], rank: int) -> tuple[slice, ...]:
        rows = -(-shape[0] // ranks) if shape else 0
        return tuple(slice(rank * rows, (rank + 1) * rows) if i == 0 else slice(0, n) for i, n in enumerate(shape))

    def clipped(shape: tuple[int, ...], rank: int) -> tuple[slice, ...]:
        return tuple(slice(min(s.start, n), min(s.stop, n)) for s, n in zip(box(shape, rank), shape, strict=True))

    for rank in range(ranks):
        like = tree.map(lambda t: t.to("meta"), state_at(0))
        got, _ = checkpoint.restore(folder / "00000002", like, part=lambda _, shape, r=rank: clipped(shape, r))
        want = {k: v[clipped(tuple(v.shape), rank)] for k, v in flat(state_at(2)).items()}
        assert all(torch.equal(v, want[k]) and v.dtype == want[k].dtype for k, v in flat(got).items())


def test_only_files_with_something_of_it_are_opened(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened, init = [], Mapped.__init__
    monkeypatch.setattr(Mapped, "__init__", lambda self, path: (opened.append(path.name), init(self, path))[1])
    tensors, owned = cut(state_at(2), 2)

    def box(path: str, shape: tuple[int, ...]) -> tuple[slice, ...]:
        at = owned[path][1]
        return tuple(slice(a, a + n) for a, n in zip(at or shape, tensors[path].shape, strict=True))

    checkpoint.restore(folder / "00000002", state_at(0), part=box)
    assert sorted(opened) == [  # of the others' only what is whole on each: the counts and the scale
        "opt_state-00001-of-00003.safetensors", "opt_state-00002-of-00003.safetensors", PART,
        "params-00002-of-00003.safetensors",
    ]  # fmt: skip


@pytest.mark.parametrize("writing", [(0, 2), (1, 2), (0,)])
@pytest.mark.parametrize("given_up", [True, False])
def test_a_rank_that_dies_in_a_save_costs_that_save(folder: Path, writing: tuple[int, ...], given_up: bool) -> None:
    missing = min(set(range(WORLD)) - set(writing))
    with pytest.raises(SaveFailed, match=rf"cannot save 00000003: rank {missing} has written no part"):
        save_by_ranks(folder, state_at(3), writing, given_up, config={})
    assert checkpoint.newest_good(folder) == folder / "00000002"
    assert sorted(p.name for p in folder.iterdir()) == ["00000001", "00000002", "latest"]
    save_by_ranks(folder, state_at(3), config={})
    assert tree.equal(checkpoint.restore(folder, state_at(0))[0], state_at(3))


def test_a_rank_that_dies_amid_its_part(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its files are there, in part, and its note is not."""
    real = os.replace

    def killed(source: Path, target: Path) -> None:
        if Path(target).name == "00001.json":
            raise KeyboardInterrupt
        real(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            save_by_ranks(folder, state_at(3), config={})
    assert checkpoint.newest_good(folder) == folder / "00000002"
    save_by_ranks(folder, state_at(4), config={})
    assert sorted(p.name for p in folder.iterdir()) == ["00000001", "00000002", "00000004", "latest"]


def test_a_tensor_that_nobody_wrote_is_seen(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import tests.checkpoint.by_ranks as by_ranks

    def forgetful(state: object, rank: int) -> object:
        tensors, owned = cut(state, rank)  # type: ignore[arg-type]
        return tensors, {**owned, "params/base": (owned["params/base"][0], None)} if rank == 1 else owned

    monkeypatch.setattr(by_ranks, "cut", forgetful)
    with pytest.raises(CheckpointError, match=r"did not write all of 1 tensors, first params/base"):
        save_by_ranks(folder, state_at(3), config={})
    assert checkpoint.newest_good(folder) == folder / "00000002"


@pytest.mark.parametrize("kind", ["gone", "cut", "flipped", "longer"])
def test_a_damaged_part_is_no_checkpoint(folder: Path, kind: str) -> None:
    file = folder / "00000002" / PART
    data = file.read_bytes()
    flipped = bytearray(data)
    flipped[-1] ^= 4
    changed = {"gone": None, "cut": data[:-1], "flipped": bytes(flipped), "longer": data + b"\0"}[kind]
    file.unlink() if changed is None else file.write_bytes(changed)
    assert checkpoint.newest_good(folder) == folder / "00000001"
    with pytest.raises(CheckpointError, match=rf"damaged: {PART} (is missing|has)"):
        checkpoint.verify(file.parent)
    with pytest.raises(CheckpointError, match=r"damaged|has no"):
        checkpoint.restore(file.parent, state_at(0))
    assert checkpoint.older(file.parent) == folder / "00000001"


def test_ranks_share_the_reading_of_all_bytes(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each file is hashed by one of them, and what is wrong is found by that one."""
    path, read = folder / "00000002", []
    real = checkpoint.layout.file_sha256
    monkeypatch.setattr(checkpoint.layout, "file_sha256", lambda p: (read.append(p.name), real(p))[1])
    for rank in range(4):
        checkpoint.verify(path, (rank, 4))
    names = {p.name for p in path.iterdir()} - {"COMMITTED", "MANIFEST.json"}
    assert sorted(n for n in read if n != "MANIFEST.json") == sorted(names)
    data = bytearray((path / PART).read_bytes())
    data[-1] ^= 1
    (path / PART).write_bytes(data)
    wrong = 0
    for rank in range(4):
        try:
            checkpoint.verify(path, (rank, 4))
        except CheckpointError:
            wrong += 1
    assert wrong == 1


def test_a_folder_that_not_all_see(tmp_path: Path) -> None:
    part = part_of(*cut(state_at(1), 2), 2, WORLD)
    with pytest.raises(SaveFailed, match=r"rank 2 does not see .*must be on a file system that all ranks share"):
        write_part(tmp_path / "elsewhere", part)


def test_a_rank_without_anything_writes_no_file(tmp_path: Path) -> None:
    state = state_at(1)
    tensors, owned = cut(state, 0)
    part = part_of(tensors, {path: (whole, None) for path, (whole, _) in owned.items()}, 0, WORLD)
    assert part.files == {}


def test_a_full_disk_is_a_failure_and_no_bad_checkpoint(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10 << 30, 0, 1000 << 10))
    for save in (save_by_ranks, checkpoint.save):
        with pytest.raises(SaveFailed, match="free some space") as error:
            save(folder, state_at(3), config={})
        assert error.value.exit_code == 1
