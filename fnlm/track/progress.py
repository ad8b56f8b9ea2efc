"""What a run tells the person at the terminal: a bar where there is one, plain lines elsewhere; all on stderr."""

from __future__ import annotations

import logging
import math
import os
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping
from statistics import median
from typing import Any, TextIO

INTERVALS = 31  # whose median is the pace: an evaluation or a save lengthens few of them
SMOOTHING = 0.9  # of the loss beside the bar
REDRAWS_S = 2.0


class Progress:
    """A tracker that shows step, loss, pace and time left: a bar on a terminal, else a line for each training row.

    Used with `with`, it also shows what is logged below `fnlm`, and neither tears the bar. `advance(step)` moves the
    bar between rows at the cost of one assignment. `quiet` leaves out all but warnings and `say`.
    """

    def __init__(
        self,
        total: int,
        *,
        start: int = 0,
        quiet: bool = False,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.total, self.step, self.quiet = total, start, quiet
        self._stream = Steady(sys.stderr if stream is None else stream)
        self._clock, self._mark = clock, (start, clock())
        self._paces: deque[float] = deque(maxlen=INTERVALS)
        self._row: Mapping[str, Any] = {}
        self._val: float | None = None
        self._smooth = (0.0, 0.0)  # the sums of weighted losses and of weights
        self._live: Any = None
        self._handler = _Handler(self)

    def __enter__(self) -> Progress:
        logging.getLogger("fnlm").addHandler(self._handler)
        if not self.quiet and self._stream.isatty() and os.environ.get("TERM") not in ("dumb", "unknown"):
            from fnlm.track.bar import live  # rich takes a while to import

            self._live = live(self, self._stream, REDRAWS_S)
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Leave the bar as it stands; may be called twice."""
        logging.getLogger("fnlm").removeHandler(self._handler)
        bar, self._live = self._live, None
        if bar is not None:
            bar.stop()

    def advance(self, step: int) -> None:
        """The step that is done; the bar shows it when it next redraws."""
        self.step = step

    def log(self, row: Mapping[str, Any]) -> None:
        """A row of metrics.jsonl: training rows move the pace, evaluations and events are said, others are ignored."""
        self.step = row.get("step", self.step)
        if "train/loss" in row:
            self._learn(row)
            if self._live is None and not self.quiet:
                self.say(self.line())
        if row.get("val/loss") is not None:
            self._val = row["val/loss"]
            self._murmur(" | ".join([self._count(), *_evaluation(row)]))
        if row.get("message"):
            self._murmur(f"{self._count()} | {row['message']}")

    def _learn(self, row: Mapping[str, Any]) -> None:
        (before, then), now = self._mark, self._clock()
        self._mark = (self.step, now)
        if self.step > before and self._row:  # the first interval has the start in it
            self._paces.append((now - then) / (self.step - before))
        self._row, loss = row, row["train/loss"]
        if loss is not None and math.isfinite(loss):
            losses, weights = self._smooth
            self._smooth = (SMOOTHING * losses + loss, SMOOTHING * weights + 1)

    def _murmur(self, line: str) -> None:
        if not self.quiet:
            self.say(line)

    def say(self, line: str) -> None:
        """Print a line, above the bar where there is one."""
        if self._live is not None:
            self._live.console.print(line, markup=False, highlight=False, soft_wrap=True)
        else:
            self._stream.write(line + "\n")
            self._stream.flush()

    def seconds_left(self) -> float | None:
        """The steps to come at the median pace of the last rows; None before there is one."""
        if self._paces:
            return median(self._paces) * max(0, self.total - self.step)
        ms = self._row.get("perf/step_ms")
        return None if ms is None else ms / 1e3 * max(0, self.total - self.step)

    def line(self) -> str:
        """`step 00010/01000 | loss 2.3103 | lr 1.0e-03 | gnorm 0.91 | 52.1k tok/s | mem 0.80 GB | eta 1:20`."""
        row = self._row
        parts = [self._count(), f"loss {_number(row.get('train/loss'), '.4f')}"]
        parts += [f"lr {row['train/lr']:.1e}"] if row.get("train/lr") is not None else []
        parts += [f"gnorm {_number(row['train/grad_norm'], '.2f')}"] if "train/grad_norm" in row else []
        parts += [f"skipped {row['train/skipped']:g}"] if row.get("train/skipped") else []
        parts += self.speed()
        parts += [f"mem {row['mem/peak_bytes'] / 1e9:.2f} GB"] if row.get("mem/peak_bytes") is not None else []
        return " | ".join([*parts, f"eta {duration(self.seconds_left())}"])

    def _count(self) -> str:
        width = max(5, len(str(self.total)))
        return f"step {self.step:0{width}d}/{self.total:0{width}d}"

    def speed(self) -> list[str]:
        """Tokens a second, where known."""
        rate = self._row.get("perf/tok_per_sec")
        return [] if rate is None else [f"{short(rate)} tok/s"]

    def state(self) -> list[str]:
        """What stands beside the bar."""
        losses, weights = self._smooth
        parts = [f"loss {losses / weights:.3f}"] if weights else []
        parts += [] if self._val is None else [f"val {_number(self._val, '.3f')}"]
        return [*parts, *self.speed(), f"eta {duration(self.seconds_left())}"]


class Steady:
    """A text stream that falls silent where its terminal or pipe is gone: nobody reads, and training goes on."""

    def __init__(self, stream: TextIO) -> None:
        self._stream, self._gone = stream, False
        self.encoding = getattr(stream, "encoding", None) or "utf-8"

    def _attempt(self, do: Callable[[], Any]) -> Any:
        if not self._gone:
            try:
                return do()
            except (OSError, ValueError):  # hung up, closed
                self._gone = True
        return None

    def write(self, text: str) -> int:
        self._attempt(lambda: self._stream.write(text))
        return len(text)

    def flush(self) -> None:
        self._attempt(self._stream.flush)

    def isatty(self) -> bool:
        return bool(self._attempt(self._stream.isatty))

    def fileno(self) -> int:
        return self._stream.fileno()


class _Handler(logging.Handler):
    """Says what fnlm logs as a warning, above the bar."""

    def __init__(self, progress: Progress) -> None:
        super().__init__(logging.WARNING)
        self._progress = progress

    def emit(self, record: logging.LogRecord) -> None:
        self._progress.say(self.format(record))


def _evaluation(row: Mapping[str, Any]) -> list[str]:
    """An evaluation's numbers, named as in metrics.jsonl without the group."""
    names = {"val/loss": "val loss", "val/ppl": "ppl", "val/bpb": "bpb"}
    digits = {"val/ppl": ".2f"}
    known = [k for k in names if row.get(k) is not None]
    return [f"{names[k]} {_number(row[k], digits.get(k, '.4f'))}" for k in known]


def _number(value: float | None, form: str) -> str:
    return "nan" if value is None else format(value, form)


def short(n: float) -> str:
    """52_100 -> "52.1k"; three digits."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if n >= size * 0.9995:
            return f"{n / size:.3g}{letter}"
    return f"{n:.3g}"


def duration(seconds: float | None) -> str:
    """80 -> "1:20", 3723 -> "1:02:03", 180_000 -> "2d 02:00"; "-" where unknown."""
    if seconds is None or not math.isfinite(seconds):
        return "-"
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    if hours >= 24:
        return f"{hours // 24}d {hours % 24:02d}:{m:02d}"
    return f"{hours}:{m:02d}:{s:02d}" if hours else f"{m}:{s:02d}"
