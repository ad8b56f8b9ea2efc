"""Tracking: metrics.jsonl whole, strict and cut back; services that fail, hang or are missing; the bar and lines."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import logging
import os
import pty
import re
import sys
import threading
import time
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fnlm.track import TRACKERS, JsonLines, Many, Progress, open_trackers, require_trackers
from fnlm.track.progress import duration, short


def rows_without_time(path: Path) -> list[dict[str, Any]]:
    return [{k: v for k, v in row.items() if k != "time"} for row in JsonLines.read(path)]


# metrics.jsonl


def test_a_row_is_a_line_of_strict_json_at_once(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    lines = JsonLines(path)
    row = {
        "step": 1,
        "train/loss": float("nan"),
        "val/loss": torch.tensor(2.5),
        "lr": np.float32(0.5),
        "out": Path("runs/a"),
        "deep": {"a": [float("inf"), 1]},
        "message": "fünf\nlines",
        "skipped": torch.tensor(3),
        "ok": True,
    }
    before = time.time()
    lines.log(row)
    (text,) = path.read_text(encoding="utf-8").splitlines()
    found = json.loads(text, parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))
    assert before - 0.01 <= found.pop("time") <= time.time() + 0.01
    assert found == {
        "step": 1,
        "train/loss": None,
        "val/loss": 2.5,
        "lr": 0.5,
        "out": "runs/a",
        "deep": {"a": [None, 1]},
        "message": "fünf\nlines",
        "skipped": 3,
        "ok": True,
    }
    lines.log({"step": 2, "time": 7.0})
    assert JsonLines.read(path)[1] == {"step": 2, "time": 7.0}
    lines.close()


@pytest.mark.parametrize("torn", [b'{"time": 1, "step": 9', b'{"step": 9}', b"\xff\xfe", b"{" + b"x" * 9000, b""])
def test_a_torn_last_line_is_no_row_and_goes_when_writing_begins(tmp_path: Path, torn: bytes) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n\x00\x00\n[1]\n{"step": 2}\n' + torn)
    assert JsonLines.read(path) == [{"step": 1}, {"step": 2}]
    lines = JsonLines(path)
    lines.log({"step": 3})
    lines.close()
    assert [row["step"] for row in JsonLines.read(path)] == [1, 2, 3]
    assert torn == b"" or torn not in path.read_bytes()


def test_a_file_that_is_one_torn_line_becomes_empty(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1')
    JsonLines(path).close()
    assert path.read_bytes() == b""


def test_truncate_leaves_one_curve(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    kept = b'{"step": 10, "event": "saved"}\n{"note": "no step"}\n{"time": 5.0,  "step": 20}\n'
    path.write_bytes(kept + b'{"step": 21}\n{"step": 30, "event": "spike"}\n{"step": 3')
    JsonLines.truncate(path, 20)
    assert path.read_bytes() == kept
    node = path.stat().st_ino
    JsonLines.truncate(path, 20)
    assert path.stat().st_ino == node, "nothing to cut, and it was rewritten"
    JsonLines.truncate(tmp_path / "none.jsonl", 20)
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_truncate_is_all_or_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n{"step": 2}\n')

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    for name in ("fsync", "replace"):
        with monkeypatch.context() as patch:
            patch.setattr(os, name, killed)
            with pytest.raises(KeyboardInterrupt):
                JsonLines.truncate(path, 1)
        assert len(JsonLines.read(path)) == 2
    JsonLines.truncate(path, 1)
    assert path.read_bytes() == b'{"step": 1}\n'


def test_cut_goes_back_and_on_in_the_same_file(tmp_path: Path) -> None:
    lines = JsonLines(tmp_path / "metrics.jsonl")
    for step in (1, 2, 3):
        lines.log({"step": step})
    lines.cut(1)
    lines.log({"step": 2, "again": True})
    lines.close()
    assert rows_without_time(lines.path) == [{"step": 1}, {"step": 2, "again": True}]


def test_a_full_disk_delays_rows_and_tears_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    lines, write, room = JsonLines(tmp_path / "metrics.jsonl"), os.write, [9]

    def full(file: int, data: bytes) -> int:
        if not room:
            raise OSError(28, "No space left on device")
        return write(file, data[: room.pop()])

    lines.log({"step": 1})
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full)
        lines.log({"step": 2})
        lines.log({"step": 3})
    assert rows_without_time(lines.path) == [{"step": 1}]
    lines.log({"step": 4})
    lines.close()
    assert rows_without_time(lines.path) == [{"step": n} for n in (1, 2, 3, 4)]
    (said,) = caplog.messages
    assert said.endswith("cannot be written: No space left on device; training goes on, rows wait")


# Services


class Service:
    """A fake `wandb` or `trackio`: notes what it gets, and does what `fault` says."""

    def __init__(self, fault: str = "") -> None:
        self.fault, self.began, self.rows, self.finished = fault, [], [], 0
        self.hanging = threading.Event()

    def init(self, **settings: Any) -> Service:
        if self.fault == "init":
            raise RuntimeError("no API key\nconfigured")
        self.began.append(settings)
        return self

    def define_metric(self, *_: str, **__: str) -> None: ...

    def log(self, row: dict[str, Any], step: int | None = None) -> None:
        if self.fault == "exit":
            raise SystemExit(1)
        if self.fault == "log":
            raise ConnectionError("the server\nhung up")
        if self.fault == "hang":
            self.hanging.wait(20)
        self.rows.append((step, row))

    def finish(self) -> None:
        if self.fault == "finish":
            raise OSError("cannot upload")
        if self.fault == "hang at close":
            self.hanging.wait(20)
        self.finished += 1


def fake(monkeypatch: pytest.MonkeyPatch, name: str = "wandb", fault: str = "") -> Service:
    service = Service(fault)
    module: Any = types.ModuleType(name)
    module.init = service.init
    monkeypatch.setitem(sys.modules, name, module)
    return service


def test_rows_arrive_at_wandb_and_trackio(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb, trackio = fake(monkeypatch, "wandb"), fake(monkeypatch, "trackio")
    run = tmp_path / "my run"
    run.mkdir()
    trackers = open_trackers(["wandb", "trackio", "wandb"], run, {"model": {"n_layers": 2}})
    row = {"step": 10, "time": 1.0, "train/loss": 2.5, "perf/mfu": None}
    trackers.log(row)
    trackers.close()
    assert row == {"step": 10, "time": 1.0, "train/loss": 2.5, "perf/mfu": None}
    assert wandb.rows == [(None, {"step": 10, "train/loss": 2.5})]
    assert trackio.rows == [(10, {"train/loss": 2.5})]
    assert (wandb.finished, trackio.finished) == (1, 1)
    (began,) = wandb.began
    assert (began["project"], began["name"], began["dir"]) == ("fnlm", "my run", str(run))
    assert began["config"] == {"model": {"n_layers": 2}}
    assert began["resume"] == "allow"
    assert re.fullmatch(r"my-run-[0-9a-f]{8}", began["id"])
    assert trackio.began[0]["name"] == began["id"]


def test_the_id_stays_with_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = fake(monkeypatch)
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        open_trackers(["wandb"], tmp_path / name, {}).close()
    (tmp_path / "a").rename(tmp_path / "c")
    open_trackers(["wandb"], tmp_path / "c", {}, step=20).close()
    first, second, third = (began["id"] for began in wandb.began)
    assert first == third != second


def test_an_unknown_tracker_gets_the_nearest_name(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^there is no tracker 'wandbb'; did you mean 'wandb'\?$"):
        open_trackers(["wandbb"], tmp_path, {})
    assert set(TRACKERS) == {"wandb", "trackio", "tensorboard"}
    open_trackers([], tmp_path, {}).close()


@pytest.mark.parametrize("name", sorted(TRACKERS))
def test_a_missing_package_is_said_with_its_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    for module in (name, "torch.utils.tensorboard"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ValueError, match=rf"^tracker '{name}' needs .* pip install 'fnlm\[{name}\]' \(.*\)$") as caught:
        open_trackers([name], tmp_path, {})
    assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match=re.escape(str(caught.value))):
        require_trackers([name])


def test_what_is_required_is_not_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    service = fake(monkeypatch)
    require_trackers(["wandb"])
    require_trackers([])
    assert service.began == []
    with pytest.raises(ValueError, match="there is no tracker 'trackoi'; did you mean 'trackio'"):
        require_trackers(["trackoi"])


def test_what_does_not_start_is_an_error_and_on_request_a_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    fake(monkeypatch, fault="init")
    other = fake(monkeypatch, "trackio")
    says = "tracker 'wandb' does not start: RuntimeError: no API key configured; mend it, or leave it out"
    with pytest.raises(ValueError, match="no API key") as caught:
        open_trackers(["trackio", "wandb"], tmp_path, {})
    assert str(caught.value) == says
    assert other.finished == 1
    assert caplog.messages == []
    trackers = open_trackers(["wandb", "trackio"], tmp_path, {}, strict=False)
    assert len(trackers.trackers) == 1
    trackers.close()
    assert caplog.messages == [f"{says}; the run goes on without it"]


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        ("log", "failed: ConnectionError: the server hung up"),
        ("exit", "failed: SystemExit: 1"),
        ("finish", "failed: OSError: cannot upload"),
        ("hang", "did not finish in 0.1 s and is left behind"),
        ("hang at close", "did not finish in 0.1 s and is left behind"),
    ],
)
def test_a_failing_service_is_one_line_and_stops_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, fault: str, says: str
) -> None:
    service, healthy = fake(monkeypatch, fault=fault), fake(monkeypatch, "trackio")
    trackers = open_trackers(["wandb", "trackio"], tmp_path, {}, close_s=0.1 if "hang" in fault else 5)
    start = time.perf_counter()
    for step in range(3):
        trackers.log({"step": step})
    trackers.close()
    assert time.perf_counter() - start < 3
    assert caplog.messages == [f"tracker wandb {says}; training goes on, metrics.jsonl has every row"]
    assert [step for step, _ in healthy.rows] == [0, 1, 2]
    assert healthy.finished == 1
    service.hanging.set()


def test_a_stuck_service_neither_blocks_nor_fills_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("fnlm.track.services.WAITING_ROWS", 4)
    service = fake(monkeypatch, fault="hang")
    trackers = open_trackers(["wandb"], tmp_path, {}, close_s=0.05)
    for step in range(20):
        trackers.log({"step": step})
    trackers.close()
    (said,) = caplog.messages
    assert said.startswith("tracker wandb takes no more rows; ")
    service.hanging.set()


def test_what_services_print_leaves_stdout_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    service = fake(monkeypatch)
    begin, end = service.init, service.finish
    monkeypatch.setattr(sys.modules["wandb"], "init", lambda **kw: (print("view it at"), begin(**kw))[1])
    service.finish = lambda: (print("bye"), end())[1]  # type: ignore[method-assign]
    open_trackers(["wandb"], tmp_path, {}).close()
    assert capsys.readouterr() == ("", "view it at\nbye\n")


def test_many_closes_all(tmp_path: Path) -> None:
    class Broken:
        def log(self, row: Any) -> None: ...

        def close(self) -> None:
            raise OSError("broken")

    lines = JsonLines(tmp_path / "metrics.jsonl")
    both = Many([Broken(), lines])
    both.log({"step": 1})
    with pytest.raises(OSError, match="broken"):
        both.close()
    assert rows_without_time(lines.path) == [{"step": 1}]
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(lines._file)


@pytest.mark.skipif(importlib.util.find_spec("tensorboard") is None, reason="tensorboard is not installed")
@pytest.mark.filterwarnings("default")
def test_tensorboard_writes_event_files(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for start, stop in ((0, 30), (20, 40)):
        trackers = open_trackers(["tensorboard"], tmp_path, {"model": {"n_layers": 2}}, step=start)
        for step in range(start + 1, stop + 1):
            trackers.log({"step": step, "train/loss": 1.0 / step, "perf/mfu": None})
        trackers.log({"step": stop, "event": "saved", "message": "saved it"})
        trackers.close()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [e.step for e in events.Scalars("train/loss")] == list(range(1, 41))


# The terminal


def train_row(step: int, loss: float | None = 2.31028, **more: Any) -> dict[str, Any]:
    row = {"step": step, "train/loss": loss, "train/lr": 1e-3, "train/grad_norm": 0.914, "train/skipped": 0}
    return row | {"perf/tok_per_sec": 52_123.0, "perf/step_ms": 80.0, "mem/peak_bytes": 802_000_000} | more


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_plain_lines() -> None:
    out = io.StringIO()
    with Progress(1000, stream=out, clock=Clock()) as progress:
        progress.log(train_row(10))
        progress.log({"step": 10, "health/grad_norm/root": 1.0})
        progress.log({"step": 10, "val/loss": 2.5, "val/ppl": 12.1825, "val/bpb": 1.25})
        progress.log({"step": 11, "event": "spike", "message": "loss 9.1 is far from 2.3; skipped"})
        progress.log(train_row(20, None, **{"train/skipped": 2}))
        progress.log({"step": 21, "train/loss": 2.0})
        progress.say("done")
    assert out.getvalue().splitlines() == [
        "step 00010/01000 | loss 2.3103 | lr 1.0e-03 | gnorm 0.91 | 52.1k tok/s | mem 0.80 GB | eta 1:19",
        "step 00010/01000 | val loss 2.5000 | ppl 12.18 | bpb 1.2500",
        "step 00011/01000 | loss 9.1 is far from 2.3; skipped",
        "step 00020/01000 | loss nan | lr 1.0e-03 | gnorm 0.91 | skipped 2 | 52.1k tok/s | mem 0.80 GB | eta 0:00",
        "step 00021/01000 | loss 2.0000 | eta 0:00",
        "done",
    ]


def test_quiet_says_only_what_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress(1000, quiet=True) as progress:
        progress.log(train_row(10))
        progress.log({"step": 10, "val/loss": 2.5})
        progress.log({"step": 10, "event": "saved", "message": "saved"})
        progress.say("one line")
        logging.getLogger("fnlm.checkpoint").warning("skipped: %s", "torn")
        logging.getLogger("fnlm.checkpoint").info("no")
    assert capsys.readouterr() == ("", "one line\nskipped: torn\n")
    assert not logging.getLogger("fnlm").handlers


def test_the_time_left_is_not_disturbed_by_evaluations_or_the_start() -> None:
    clock = Clock()
    progress = Progress(1000, stream=io.StringIO(), clock=clock)
    clock.now = 60.0  # to compile
    for step in range(10, 510, 10):
        clock.now += 1.0 + (30.0 if step % 50 == 0 else 0.0)
        progress.log(train_row(step))
    assert progress.seconds_left() == pytest.approx(50.0)
    for _ in range(40):  # it becomes slower, and that is noticed
        clock.now += 2.0
        progress.log(train_row(progress.step + 10))
    assert progress.seconds_left() == pytest.approx(0.2 * 100)


def test_going_back_is_no_pace() -> None:
    clock = Clock()
    progress = Progress(100, stream=io.StringIO(), clock=clock)
    for step in (10, 20, 10, 20):
        clock.now += 1.0
        progress.log(train_row(step))
    assert progress.seconds_left() == pytest.approx(8.0)
    assert Progress(100, start=50).seconds_left() is None


def test_a_step_between_rows_costs_next_to_nothing() -> None:
    progress = Progress(10**6)
    best = float("inf")
    for _ in range(20):
        start = time.perf_counter()
        for step in range(1000):
            progress.advance(step)
        best = min(best, time.perf_counter() - start)
    assert best / 1000 < 2e-6


def test_a_terminal_that_is_gone_does_not_stop_training() -> None:
    class Gone(io.StringIO):
        def write(self, _: str) -> int:
            raise BrokenPipeError(32, "Broken pipe")

    progress = Progress(100, stream=Gone())
    progress.log(train_row(10))
    progress.say("still here")
    closed = io.StringIO()
    closed.close()
    Progress(100, stream=closed).log(train_row(10))


@pytest.mark.parametrize(
    ("value", "says"),
    [(None, "-"), (float("inf"), "-"), (0, "0:00"), (79.6, "1:20"), (3723, "1:02:03"), (180_000, "2d 02:00")],
)
def test_durations(value: float | None, says: str) -> None:
    assert duration(value) == says


@pytest.mark.parametrize(
    ("value", "says"),
    [(7.25, "7.25"), (980.4, "980"), (999.8, "1k"), (52_123, "52.1k"), (1_234_567, "1.23M"), (3e9, "3G")],
)
def test_rates(value: float, says: str) -> None:
    assert short(value) == says


def on_a_terminal(patch: pytest.MonkeyPatch, **environment: str) -> str:
    """What a run with warnings, words of others and results leaves on a terminal."""
    for name in ("NO_COLOR", "FORCE_COLOR", "TERM"):
        patch.delenv(name, raising=False)
    for name, value in ({"TERM": "xterm", "COLUMNS": "100"} | environment).items():
        patch.setenv(name, value)
    mine, theirs = pty.openpty()
    said: list[bytes] = []
    with os.fdopen(theirs, "w") as stream:
        reader = threading.Thread(target=lambda: said.extend(iter(lambda: read(mine), b"")))
        reader.start()
        with Progress(1000, stream=stream) as progress:
            for step in (10, 20):
                progress.log({"step": step, "train/loss": 2.0, "perf/tok_per_sec": 52100.0, "perf/step_ms": 100.0})
            progress.log({"step": 20, "val/loss": 1.5})
            progress.advance(500)
            logging.getLogger("fnlm.data").warning("a warning [of ours]")
            print("a word of others", file=sys.stderr)
            print("a result")
            progress.say("x" * 200)
    reader.join()
    os.close(mine)
    return b"".join(said).decode()


def read(terminal: int) -> bytes:
    try:
        return os.read(terminal, 4096)
    except OSError:  # its end
        return b""


def test_a_bar_on_a_terminal_that_nothing_tears(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    said = on_a_terminal(monkeypatch)
    assert capsys.readouterr() == ("a result\n", "")
    assert "\x1b[36m" in said, "no colour"
    plain = [re.sub(r"\x1b\[[\d;?]*[a-zA-Z]", "", line).strip("\r") for line in said.split("\n")]
    for line in ("step 00020/01000 | val loss 1.5000", "a warning [of ours]", "a word of others", "x" * 200):
        assert [part for full in plain for part in full.split("\r") if part.rstrip() == line], (line, plain)
    last = plain[-2].split("\r")[-1]
    assert last.startswith("500/1000")
    assert last.rstrip().endswith("loss 2.000 | val 1.500 | 52.1k tok/s | eta 0:00")
    assert said.rstrip().endswith("\x1b[?25h"), "the cursor is not shown again"


def test_no_colour_where_it_is_not_wanted_and_no_bar_on_a_dumb_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "\x1b[36m" not in on_a_terminal(monkeypatch, NO_COLOR="1")
    assert capsys.readouterr().err == ""
    said = on_a_terminal(monkeypatch, TERM="dumb")
    assert "\x1b" not in said
    assert said.startswith("step 00010/01000 | loss 2.0000 | 52.1k tok/s | eta 1:39")
    assert capsys.readouterr().err == "a word of others\n"


def test_a_terminal_that_hangs_up_does_not_stop_training(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    mine, theirs = pty.openpty()
    stream, before = os.fdopen(theirs, "w", buffering=1), threading.enumerate()
    with Progress(1000, stream=stream) as progress:
        os.close(mine)
        progress.log({"step": 20, "val/loss": 1.5})
        progress.say("still here")
        (redraws,) = [t for t in threading.enumerate() if t not in before]
        time.sleep(0.6)  # a redraw
        assert redraws.is_alive()
    with contextlib.suppress(OSError):
        stream.close()
