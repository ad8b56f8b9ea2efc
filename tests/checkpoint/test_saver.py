"""Saving in the background, and which checkpoints are kept."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest
import torch

from fnlm import checkpoint, optim, random, tree
from fnlm.checkpoint import CheckpointError, Saver, write
from fnlm.types import TrainState


def state_at(step: int, rows: int = 4) -> TrainState:
    params = {"w": torch.full((rows, 8), float(step)), "base": torch.ones(300)}
    return TrainState(torch.tensor(step), params, optim.adam(1e-3).init(params), random.key(1))


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.glob("0*"))


class Gate:
    """Holds up the thread that writes, until it is opened."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.event, real = threading.Event(), os.write

        def held(fd: int, data: memoryview) -> int:
            assert self.event.wait(10)
            return real(fd, data)

        monkeypatch.setattr(os, "write", held)


@pytest.mark.parametrize("background", [True, False])
def test_the_last_ones_are_kept(tmp_path: Path, background: bool) -> None:
    with Saver(tmp_path, keep=2, keep_every=4, background=background) as saver:
        for step in range(1, 8):
            path = saver.save(state_at(step), config={}, extra={"step": step})
            if step == 2:
                saver.mark_best(path)
    assert names(tmp_path) == ["00000002", "00000004", "00000006", "00000007"]
    assert checkpoint.best(tmp_path) == tmp_path / "00000002"
    assert (tmp_path / "best").read_text() == "00000002\n"
    assert (tmp_path / "latest").read_text() == "00000007\n"
    for path in tmp_path.glob("0*"):
        back, extra = checkpoint.restore(path, state_at(0))
        assert tree.equal(back, state_at(extra["step"]))


def test_a_better_one_frees_the_last(tmp_path: Path) -> None:
    saver = Saver(tmp_path, keep=1, background=False)
    for step in (1, 2, 3):
        saver.mark_best(saver.save(state_at(step), config={}))
    assert names(tmp_path) == ["00000002", "00000003"]
    saver.save(state_at(4), config={})
    assert names(tmp_path) == ["00000003", "00000004"]


def test_parameters_alone_are_kept_and_replace_nothing(tmp_path: Path) -> None:
    saver = Saver(tmp_path, keep=1)
    for step in (1, 2, 3):
        saver.save(state_at(step), config={}, what="params")
        saver.save(state_at(step), config={})
    saver.wait()
    assert names(tmp_path) == ["00000001.params", "00000002.params", "00000003", "00000003.params"]
    assert torch.equal(checkpoint.restore(tmp_path, state_at(0))[0].params["w"], state_at(3).params["w"])


def test_the_state_may_be_donated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gate, saver, state = Gate(monkeypatch), Saver(tmp_path), state_at(5)
    path = saver.save(state, config={})
    for _, tensor in tree.leaves(state):
        tensor.zero_()
    assert not path.exists()
    gate.event.set()
    saver.wait()
    assert tree.equal(checkpoint.restore(path, state_at(0))[0], state_at(5))
    saver.save(state_at(6, rows=7), config={})  # other shapes get other memory
    saver.save(state_at(8), config={}, what="params")
    saver.wait()
    assert tree.equal(checkpoint.restore(tmp_path / "00000006", state_at(0, rows=7))[0], state_at(6, rows=7))


def test_a_second_save_waits_for_the_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gate, saver = Gate(monkeypatch), Saver(tmp_path)
    saver.save(state_at(1), config={})
    threading.Timer(0.1, gate.event.set).start()
    saver.save(state_at(2), config={})
    assert tree.equal(checkpoint.restore(tmp_path / "00000001", state_at(0))[0], state_at(1))
    saver.wait()
    assert names(tmp_path) == ["00000001", "00000002"]


def test_an_error_surfaces_at_the_next_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saver = Saver(tmp_path)
    saver.save(state_at(1), config={})
    saver.wait()

    def full(fd: int, data: memoryview) -> int:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full)
        saver.save(state_at(2), config={})
        with pytest.raises(CheckpointError, match=r"cannot save .*00000002: No space left on device; free some space"):
            saver.save(state_at(3), config={})
    saver.save(state_at(4), config={})  # said once; the next one works
    with pytest.raises(CheckpointError, match="is not a folder"):
        saver.mark_best(tmp_path / "00000002") or saver.wait()
    assert names(tmp_path) == ["00000001", "00000004"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["00000001", "00000004", "latest"]


def test_an_error_surfaces_at_the_end(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="cannot save"), Saver(tmp_path / "file") as saver:
        saver.save(state_at(1), config={})


def test_after_a_rollback_the_last_commit_is_the_newest(tmp_path: Path) -> None:
    saver = Saver(tmp_path, keep=2, background=False)
    for step in (10, 20, 30, 25):
        saver.save(state_at(step), config={})
    assert checkpoint.newest_good(tmp_path) == tmp_path / "00000025"
    assert checkpoint.newest_good(tmp_path, before=25) is None
    saver.save(state_at(28), config={})
    assert names(tmp_path) == ["00000025", "00000028"]
    assert checkpoint.newest_good(tmp_path, before=28) == tmp_path / "00000025"


def test_what_did_not_change_is_linked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(write, "LINK_ABOVE", 500)
    file = "params.frozen.safetensors"

    def inode(folder: Path, step: int, name: str = file) -> int:
        return (folder / f"{step:08d}" / name).stat().st_ino

    def train(folder: Path, saver: Saver) -> None:
        for step in (1, 2):
            saver.save(state_at(step), config={}, frozen=lambda name: name == "base")
        saver.wait()
        assert inode(folder, 1, "params.safetensors") != inode(folder, 2, "params.safetensors")
        assert inode(folder, 1, "config.json") != inode(folder, 2, "config.json")  # too small
        assert tree.equal(checkpoint.restore(folder, state_at(0))[0], state_at(2))

    train(tmp_path / "a", Saver(tmp_path / "a", keep=2))
    assert inode(tmp_path / "a", 1) == inode(tmp_path / "a", 2)
    train(tmp_path / "b", Saver(tmp_path / "b", link=False))
    assert inode(tmp_path / "b", 1) != inode(tmp_path / "b", 2)
    os.truncate(tmp_path / "a" / "00000002" / file, 10)  # both, as they are one: the next save does not build on it
    path = checkpoint.save(tmp_path / "a", state_at(3), config={}, frozen=lambda name: name == "base")
    assert tree.equal(checkpoint.restore(path, state_at(0))[0], state_at(3))


def test_without_links_it_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(write, "LINK_ABOVE", 500)
    monkeypatch.setattr(os, "link", refuse)
    for step in (1, 2):
        checkpoint.save(tmp_path, state_at(step), config={}, frozen=lambda name: name == "base")
    assert tree.equal(checkpoint.restore(tmp_path, state_at(0))[0], state_at(2))


@pytest.mark.parametrize("wrong", [{"keep": 0}, {"keep_every": 0}])
def test_what_keeps_nothing_is_refused(tmp_path: Path, wrong: dict[str, int]) -> None:
    with pytest.raises(CheckpointError, match="choose at least 1"):
        Saver(tmp_path, **wrong)
