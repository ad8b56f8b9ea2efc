"""A run that was interrupted goes on as if it had not been: the same bits in every parameter and moment."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from fnlm import checkpoint, tree
from fnlm.types import TrainState
from tests.checkpoint.train import OPTIMIZERS, start, train

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> dict[str, TrainState]:
    """40 steps in one go."""
    return {name: train(tmp_path_factory.mktemp("none"), name, 40) for name in OPTIMIZERS}


def process(folder: Path, *args: str) -> int:
    command = [sys.executable, "-W", "error", "-m", "tests.checkpoint.train", str(folder), *args]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode in (0, -signal.SIGKILL), done.stderr
    return done.returncode


def test_the_runs_learn_and_drop_out(straight: dict[str, TrainState], tmp_path: Path) -> None:
    for name, state in straight.items():
        assert int(state.step) == 40
        other = start(name)._replace(key=state.key + 1)  # only dropout reads the key
        checkpoint.save(tmp_path / name, other, config={})
        assert not tree.equal(train(tmp_path / name, name, 40).params, state.params)


def test_20_and_20_in_another_process(straight: dict[str, TrainState], tmp_path: Path) -> None:
    for name in OPTIMIZERS:
        checkpoint.save(tmp_path / name, train(tmp_path / name, name, 20), config={})
    assert process(tmp_path, "40") == 0
    for name, state in straight.items():
        assert checkpoint.newest_good(tmp_path / name) == tmp_path / name / "00000040"
        back, _ = checkpoint.restore(tmp_path / name, start(name))
        assert tree.equal(back, state), name


def test_kill_9_loses_an_interval_at_most(straight: dict[str, TrainState], tmp_path: Path) -> None:
    assert process(tmp_path, "25", "kill") == -signal.SIGKILL  # as it writes step 25
    for name in OPTIMIZERS:
        newest = checkpoint.newest_good(tmp_path / name)
        assert newest is not None and newest.name in ("00000020", "00000025")
    assert process(tmp_path, "40") == 0
    for name, state in straight.items():
        assert tree.equal(checkpoint.restore(tmp_path / name, start(name))[0], state), name
        assert not list((tmp_path / name).glob(".*"))
