"""Whatever happens to a save, the newest complete checkpoint is found, and no wrong byte is ever read."""

from __future__ import annotations

import functools
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fnlm import checkpoint, optim, random, tree
from fnlm.checkpoint import write
from fnlm.types import TrainState
from tests.checkpoint.by_ranks import save_by_ranks
from tests.checkpoint.disk import FAULTS, Disk, Fault, Killed

CONFIG = {"model": {"vocab_size": 5}}
BEFORE = 2  # checkpoints that lie there already


@functools.cache
def state_at(step: int, version: int = 0) -> TrainState:
    """A small state, different at every step; the parameter `base` never changes."""
    params = {
        name: random.normal(random.fold_in(random.key(step if name != "base" else 99), version), shape)
        for name, shape in (("embed", (5, 3)), ("base", (40,)), ("scale", ()))
    }
    opt_state = optim.adamw(1e-3, clip=1.0, moments_dtype=torch.bfloat16).init(params)
    opt_state["adam"] = opt_state["adam"]._replace(mu={k: p.bfloat16() for k, p in params.items()})
    return TrainState(torch.tensor(step), params, opt_state, random.key(step))


def save(folder: Path, state: TrainState) -> Path:
    return checkpoint.save(folder, state, config=CONFIG, tokenizer=folder.parent / "tokenizer.json")


def save_replacing(folder: Path) -> None:
    """The last step again, with other values, as after a rollback."""
    save(folder, state_at(BEFORE, version=1))


def save_linking(folder: Path) -> None:
    tokenizer = folder.parent / "tokenizer.json"
    state = state_at(BEFORE + 1)
    checkpoint.save(folder, state, config=CONFIG, tokenizer=tokenizer, frozen=lambda name: name == "base")


def save_keeping_one(folder: Path) -> None:
    saver = checkpoint.Saver(folder, keep=1, background=False)
    saver.save(state_at(BEFORE + 1), config=CONFIG, tokenizer=folder.parent / "tokenizer.json")
    saver.mark_best(folder / f"{BEFORE + 1:08d}")


SAVES: dict[str, Callable[[Path], object]] = {
    "plain": lambda folder: save(folder, state_at(BEFORE + 1)),
    "keep=1": save_keeping_one,
    "same step": save_replacing,
    "linked": save_linking,
    "by ranks": lambda folder: save_by_ranks(
        folder, state_at(BEFORE + 1), config=CONFIG, tokenizer=folder.parent / "tokenizer.json"
    ),
}


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with two checkpoints."""
    run = tmp_path_factory.mktemp("start") / "run"
    run.mkdir()
    (run / "tokenizer.json").write_text('{"kind": "byte"}')
    for step in range(1, BEFORE + 1):
        checkpoint.save(
            run / "checkpoints",
            state_at(step),
            config=CONFIG,
            tokenizer=run / "tokenizer.json",
            frozen=lambda name: name == "base",
        )
    return run


def loaded(folder: Path) -> TrainState:
    """The state that a run would go on with."""
    path = checkpoint.newest_good(folder)
    assert path is not None
    return checkpoint.restore(path, state_at(0))[0]


def is_good(folder: Path) -> bool:
    """At most the save that failed is lost, and what is loaded is what was saved, bit for bit."""
    versions = [state_at(BEFORE), state_at(BEFORE, version=1), state_at(BEFORE + 1)]
    return any(tree.equal(loaded(folder), version) for version in versions)


def works_again(folder: Path, kind: str) -> bool:
    """The same save, tried again."""
    SAVES[kind](folder)
    wanted = state_at(BEFORE, version=1) if kind == "same step" else state_at(BEFORE + 1)
    return tree.equal(loaded(folder), wanted)


def goes_on(folder: Path) -> bool:
    """The next save works, is what is loaded then, and leaves nothing of the one that failed."""
    last = state_at(BEFORE + 2)
    path = save(folder, last)
    names = {p.name for p in folder.iterdir()} - {"best"}
    tidy = all(name == "latest" or (name.isdigit() and (folder / name / "COMMITTED").exists()) for name in names)
    text = (folder / "latest").read_text()
    return tidy and text == f"{path.name}\n" and tree.equal(loaded(folder), last)


def outcome(start: Path, root: Path, kind: str, at: int | None, fault: Fault) -> tuple[int, bool]:
    """One save with one fault: the calls made, and whether all is well. The folder is gone afterwards."""
    root.mkdir()
    shutil.copytree(start, root / "run")
    folder = root / "run" / "checkpoints"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda fd: None)  # would only take time
        patch.setattr(write, "LINK_ABOVE", 100 if kind == "linked" else 1 << 20)
        disk = Disk(patch, root, at, fault)
        error: type[BaseException] | None = None
        try:
            SAVES[kind](folder)
        except (Killed, checkpoint.CheckpointError, OSError) as raised:
            error = type(raised)
        disk.repair()
        said = at is None or error is not None or fault == "full" or disk.failed == "link"  # written instead
        well = said and is_good(folder)
        if at is not None and at % 2:  # the others go straight to the next step
            well = well and works_again(folder, kind)
        well = well and goes_on(folder)
    shutil.rmtree(root)
    return disk.count, well


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("kind", [k if k == "plain" else pytest.param(k, marks=pytest.mark.slow) for k in SAVES])
def test_a_fault_at_every_call(start: Path, tmp_path: Path, kind: str, fault: Fault) -> None:
    calls, well = outcome(start, tmp_path / "counted", kind, None, fault)
    assert well and calls >= 25
    wrong = [at for at in range(calls) if not outcome(start, tmp_path / f"{at}", kind, at, fault)[1]]
    assert not wrong


@pytest.mark.parametrize("what", ["all", "params"])
def test_what_was_saved_outlives_a_loss_of_power(tmp_path: Path, what: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = Disk(monkeypatch, tmp_path, fault="power, names lost")
    path = checkpoint.save(tmp_path / "run" / "checkpoints", state_at(1), config=CONFIG, what=what)
    os.mkdir(tmp_path / "lost")
    disk.lose_power()
    assert not (tmp_path / "lost").exists()
    checkpoint.verify(path)
    assert checkpoint.newest_good(path.parent, what) == path


FILES = ("params.safetensors", "params.frozen.safetensors", "opt_state.safetensors", "tree.json", "config.json")
FILES += ("tokenizer.json", "MANIFEST.json", "COMMITTED")


def damages(size: int) -> dict[str, Callable[[Path], object]]:
    """Ways to damage a file of this size: gone, cut, longer, zeros, and one bit flipped here and there."""

    def flip(at: int) -> Callable[[Path], object]:
        def damage(file: Path) -> None:
            data = bytearray(file.read_bytes())
            data[at] ^= 1 << at % 8
            file.write_bytes(data)

        return damage

    cuts = {f"cut to {n}": lambda file, n=n: os.truncate(file, n) for n in {0, 1, 8, size // 2, size - 1}}
    flips = {f"flip at {at}": flip(at) for at in {0, 3, 8, 9, *range(11, size, max(1, size // 9)), size - 1}}
    longer = {"longer": lambda file: file.write_bytes(file.read_bytes() + b"\0")}
    zeros = {"zeros": lambda file: file.write_bytes(bytes(size))}
    return {"gone": lambda file: file.unlink(), **cuts, **flips, **longer, **zeros}


@pytest.mark.parametrize("name", FILES)
def test_damage_afterwards(start: Path, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda fd: None)
    size = (start / "checkpoints" / "00000002" / name).stat().st_size
    for kind, damage in damages(size).items():
        folder = tmp_path / kind / "checkpoints"
        shutil.copytree(start, folder.parent)
        damage(folder / "00000002" / name)
        assert tree.equal(loaded(folder), state_at(1)), kind
        with pytest.raises(checkpoint.CheckpointError, match=r"damaged|complete|instead of"):
            checkpoint.verify(folder / "00000002")
        if name not in ("config.json", "tokenizer.json"):  # not read by restore
            with pytest.raises(checkpoint.CheckpointError):
                checkpoint.restore(folder / "00000002", state_at(0))
        last = state_at(3)
        save(folder, last)
        assert tree.equal(loaded(folder), last), kind


def test_there_are_more_than_two_hundred_faults(start: Path, tmp_path: Path) -> None:
    calls = outcome(start, tmp_path / "counted", "plain", None, "kill before")[0]
    damaged = sum(len(damages((start / "checkpoints" / "00000002" / name).stat().st_size)) for name in FILES)
    assert calls * len(FAULTS) + damaged >= 300


def test_all_damaged_is_no_checkpoint(start: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    shutil.copytree(start, tmp_path / "run")
    folder = tmp_path / "run" / "checkpoints"
    for path in folder.glob("0*"):
        os.truncate(path / "params.safetensors", 10)
    assert checkpoint.newest_good(folder) is None
    assert caplog.text.count("params.safetensors has 10 bytes instead of") == 2


def test_a_full_disk_is_seen_before_writing(start: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(start, tmp_path / "run")
    folder = tmp_path / "run" / "checkpoints"
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10 << 30, 0, 1000 << 10))
    with pytest.raises(checkpoint.CheckpointError, match=r"1\.0 MiB of free disk, .* takes 1\.0 MiB; free some space"):
        save(folder, state_at(3))
    assert sorted(p.name for p in folder.iterdir()) == ["00000001", "00000002", "latest"]
