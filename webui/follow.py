"""A run as it trains: its curves, figures, events, samples and checkpoints, read from its folder as they come."""

from __future__ import annotations

import json
import math
import threading
import time
from collections import OrderedDict
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from flask import Blueprint, Response, jsonify, request

from fnlm.report.chart import Chart, figure
from fnlm.report.page import by_layer, charts
from fnlm.report.run import Facts, Row, Run, facts, number
from fnlm.report.scale import duration, large, said
from webui.curves import Curves, Growing
from webui.models import About, Models, plain
from webui.openai import ApiError
from webui.tail import Tail

METRICS, CONFIG, SAMPLES = "metrics.jsonl", "config.json", "samples"
SHOWN = ("Loss", "Learning rate", "Gradient norm", "Throughput")  # of the report's charts
LAYERED = ("Parameter norm by layer",)
MOST_EVENTS = 200
MOST_LETTERS = 20_000  # of a sample
INTERVALS = 31  # whose median is the pace: an evaluation or a save lengthens few of them
RESTS = 10  # as long as drawing took, before it is done again
MOST_KEPT = 8  # runs whose rows stay in memory

Json = dict[str, Any]


class Drawn(NamedTuple):
    """What was made of the rows of one version, at `made` and in `took` seconds (monotonic)."""

    version: str
    charts: str
    run: Run
    made: float
    took: float


class Runs:
    """The runs among the served models, and one that is `followed` before it has a checkpoint; for any thread."""

    def __init__(self, models: Models, followed: Path | None = None):
        self.models, self.followed = models, followed
        self._lock = threading.Lock()
        self._kept: OrderedDict[Path, _Kept] = OrderedDict()

    def paths(self) -> dict[str, Path]:
        """The folder of each run by its name."""
        found = {name: path for name, path in self.models.paths().items() if is_run(path)}
        return found if self.followed is None or self.name in found else {str(self.name): self.followed, **found}

    @property
    def name(self) -> str | None:
        """What the run that is followed is called: as among the models, or as it will be there."""
        if self.followed is None:
            return None
        at = self.followed.resolve()
        known = [name for name, path in self.models.paths().items() if path.resolve() == at]
        return known[0] if known else _name(at, [folder.resolve() for folder in self.models.folders])

    def drawn(self, name: str, path: Path) -> Drawn:
        """The run as it is; it is drawn anew where lines were added or taken away, and not much of the time."""
        with self._lock:
            kept = self._kept.pop(path, None) or _Kept(path)
            self._kept[path] = kept
            while len(self._kept) > MOST_KEPT:
                self._kept.popitem(last=False)
            return kept.drawn(name)


class _Kept:
    """What is known of one run."""

    def __init__(self, path: Path):
        self.path, self.tail = path, Tail(path / METRICS)
        self.rows, self.curves = self.tail.rows, Curves()
        self.last: Drawn | None = None

    def drawn(self, name: str) -> Drawn:
        began, last = time.monotonic(), self.last
        if last is not None and began - last.made < RESTS * last.took:
            return last
        version = str(self.tail.read())
        if last is None or last.version != version:
            last = self._draw(name, version, began)
            self.last = last
        return last

    def _draw(self, name: str, version: str, began: float) -> Drawn:
        if self.tail.rows is not self.rows:  # the file was cut back
            self.rows, self.curves = self.tail.rows, Curves()
        self.curves.take(self.rows)
        run = Growing(name, self.path, config_of(self.path), {}, list(self.rows), [], self.tail.unreadable)
        run.curves = self.curves
        charts = "".join(figure(chart) for chart in chosen(run))
        return Drawn(version, charts, run, time.monotonic(), time.monotonic() - began)


def is_run(path: Path) -> bool:
    """Whether training has left its numbers there; a link may lead outside the served folders."""
    return (path / METRICS).is_file() and not (path / METRICS).is_symlink()


def _name(run: Path, folders: list[Path]) -> str:
    """A run's name as it will be among the models: its path below the folder that holds it."""
    below = [folder for folder in folders if folder in run.parents]
    return plain(run.relative_to(below[0]).as_posix() if below else run.name)


def config_of(path: Path) -> Row:
    """A run's config.json; empty where there is none that can be read."""
    try:
        found = json.loads((path / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def chosen(run: Run) -> Iterator[Chart]:
    """The loss first, then rates, norms and pace."""
    for chart in (*charts([run], ["c0"]), *by_layer(run)):
        if chart.title in SHOWN or chart.title in LAYERED or chart.title.startswith("Loss from"):
            yield chart


def seconds_left(run: Run, fact: Facts) -> float | None:
    """The steps to come at the median pace of the last rows."""
    rows = [(number(r.get("step")), number(r.get("time"))) for r in run.rows if "train/loss" in r][-INTERVALS - 1 :]
    paces = [(b[1] - a[1]) / (b[0] - a[0]) for a, b in pairwise(rows) if b[0] > a[0] and b[1] >= a[1]]
    if not paces or fact.steps is None or fact.step is None:
        return None
    return float(median(paces) * max(0.0, fact.steps - fact.step))


def samples(path: Path) -> dict[str, Path]:
    """The files of samples by step, the oldest first."""
    folder = path / SAMPLES
    if folder.is_symlink() or not folder.is_dir():
        return {}
    files = [f for f in folder.glob("*.txt") if f.stem.isascii() and f.stem.isdigit() and not f.is_symlink()]
    return {f.stem: f for f in sorted(files, key=lambda f: int(f.stem[:18]))}


def events(run: Run, kept: list[About]) -> list[Json]:
    """What happened, in order, with the checkpoints that are still there."""
    found = [
        {"step": finite(row.get("step")), "event": str(row["event"])[:100], "time": finite(row.get("time")),
         "message": str(row.get("message") or "")[:1000]}
        for row in run.events
    ]  # fmt: skip
    found += [{"step": a.step, "event": "saved", "time": a.saved, "message": ""} for a in kept]
    return sorted(found, key=lambda e: e["time"] or 0)[-MOST_EVENTS:]


def finite(value: Any) -> float | None:
    """A number that JSON can say."""
    found = number(value)
    return found if math.isfinite(found) else None


def told(runs: Runs, name: str, path: Path, seen: str, now: float) -> Json:
    """What the page shows of a run; the charts are left out where it has `seen` them."""
    drawn = runs.drawn(name, path)
    run, fact = drawn.run, facts(drawn.run, now)
    try:
        kept = sorted(runs.models.saved(name), key=lambda a: a.step)
        answers = runs.models.about(name).get(name)
    except KeyError:  # there is no checkpoint yet
        kept, answers = [], None
    last = finite(run.rows[-1].get("time")) if run.rows else None
    left = seconds_left(run, fact) if fact.state == "running" else None
    return {
        "name": name,
        "version": drawn.version,
        **({} if seen == drawn.version else {"charts": drawn.charts}),
        "state": fact.state,
        "step": finite(fact.step),
        "steps": finite(fact.steps),
        "left": None if left is None else duration(left),
        "silent": None if last is None else max(0.0, round(now - last, 1)),
        "unreadable": run.unreadable,
        "figures": figures(fact),
        "events": events(run, kept),
        "samples": list(samples(path)),
        "chat": run.config.get("kind") == "chat" if answers is None else answers.chat,
        "served": None if answers is None else answers.step,
        "checkpoints": [{"name": a.name, "step": a.step, "loss": a.loss, "saved": a.saved} for a in kept],
    }


def figures(fact: Facts) -> list[tuple[str, str]]:
    """Names and figures, as texts."""
    at = "" if fact.best_step is None else f", at step {said(fact.best_step)}"
    return [
        ("Training loss", _loss(fact.train_loss)),
        ("Validation loss", _loss(fact.val_loss)),
        (f"The best{at}", _loss(fact.best_loss)),
        ("Tokens", large(fact.tokens)),
        ("Tokens per second", large(fact.tokens_per_second)),
        ("Time", duration(fact.seconds)),
        ("Parameters", large(fact.parameters)),
    ]


def _loss(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"


def routes(runs: Runs) -> Blueprint:
    """/v1/runs, /v1/run and /v1/run/sample; runs and samples are looked up by name, never by path."""
    blueprint = Blueprint("follow", __name__)

    def asked() -> tuple[str, Path]:
        name, found = request.args.get("name", ""), runs.paths()
        if name not in found:
            raise ApiError(404, f"there is no run {name[:200]!r}; see /v1/runs", "name", "run_not_found")
        return name, found[name]

    @blueprint.get("/v1/runs")
    def names() -> Response:
        return jsonify({"object": "list", "data": [{"id": name} for name in runs.paths()]})

    @blueprint.get("/v1/run")
    def run() -> Response:
        """The run of ?name=RUN; without its charts where &seen=VERSION is still what they are."""
        return jsonify(told(runs, *asked(), request.args.get("seen", ""), time.time()))

    @blueprint.get("/v1/run/sample")
    def sample() -> Response:
        """The sample of ?name=RUN&at=STEP, the step as /v1/run spells it."""
        name, path = asked()
        found, at = samples(path), request.args.get("at", "")
        try:
            text = found[at].read_bytes()[: 4 * MOST_LETTERS].decode("utf-8", "replace")
        except (KeyError, OSError):
            raise ApiError(404, f"{name[:200]!r} has no sample {at[:20]!r}", "at") from None
        return jsonify({"at": at, "text": text[:MOST_LETTERS]})

    return blueprint
