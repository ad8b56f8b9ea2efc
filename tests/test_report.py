"""The report: a page that is whole, safe and true, whatever a run's folder holds; curves that keep what stands out."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import re
from collections.abc import Iterator
from dataclasses import asdict
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import hypothesis
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fnlm import PRESETS, count
from fnlm.report import RunError, report
from fnlm.report.chart import Chart, Line, figure, path
from fnlm.report.curve import SMOOTH_FROM, smoothed, thinned
from fnlm.report.markup import VOID, tag
from fnlm.report.run import Series, facts, read_run
from fnlm.report.scale import Scale, duration, labels, large, linear, logarithmic, nice, said
from fnlm.report.tables import differs

NOW = 1_000_000.0
CFG = PRESETS["shakespeare-char-cpu"]
CONFIG = {
    "model": asdict(CFG),
    "train": {"steps": 100, "lr": 1e-3, "optimizer": "adamw"},
    "data": "data/tale",
    "tokenizer": {"kind": "char", "sha256": "ab"},
}


def rows(steps: int = 100) -> Iterator[dict[str, Any]]:
    for step in range(1, steps + 1):
        yield {
            "time": NOW - 500 + step, "step": step, "tokens": step * 64, "train/loss": 4 - step / 50,
            "train/lr": 1e-3, "train/grad_norm": 1 / step, "perf/tok_per_sec": 52_100, "perf/mfu": None,
        }  # fmt: skip
        if step % 25 == 0:
            yield {"time": NOW - 500 + step, "step": step, "val/loss": 4.5 - step / 50 + (step == 100), "val/bpb": 1.5}


def make(folder: Path, *, lines: str | None = None, config: Any = CONFIG, **samples: str) -> Path:
    (folder / "samples").mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    (folder / "environment.json").write_text(json.dumps({"torch": "2.13.0", "git": {"commit": "abc"}}))
    told = "".join(json.dumps(row) + "\n" for row in rows()) if lines is None else lines
    (folder / "metrics.jsonl").write_text(told, encoding="utf-8")
    for name, text in samples.items():
        (folder / "samples" / f"{name.removeprefix('at')}.txt").write_text(text, encoding="utf-8")
    return folder


class Page(HTMLParser):
    """Elements with their attributes, rows of tables as texts, and whether every element is closed where it must be."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.rows: list[tuple[str, list[str]]] = []
        self.texts: dict[str, list[str]] = {}
        self.feed(source)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self.texts.setdefault(tag, []).append("")
        if tag not in VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append((dict(attrs).get("class") or "", []))
        elif tag in ("td", "th"):
            self.rows[-1][1].append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        for name in {t for t in self.open if t in self.texts}:
            self.texts[name][-1] += data
        if {"td", "th"} & set(self.open):
            self.rows[-1][1][-1] += data

    def named(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


def test_a_page_is_whole_and_needs_nothing_else(tmp_path: Path) -> None:
    page = report([make(tmp_path / "a"), make(tmp_path / "b")], NOW)
    parsed = Page(page)
    assert page.startswith("<!DOCTYPE html>\n")
    assert not re.search(r"https?:|//[a-z]|@import|url\(", page)
    assert not {name for _, a in parsed.elements for name in a} & {"src", "href", "style", "onclick", "onload"}
    assert not {name for name, _ in parsed.elements} & {"link", "iframe", "img", "object", "base", "form"}


def test_the_policy_allows_its_own_style_and_script_and_no_others(tmp_path: Path) -> None:
    parsed = Page(report([make(tmp_path / "a")], NOW))
    policy = next(a["content"] for a in parsed.named("meta") if a.get("http-equiv") == "Content-Security-Policy")
    assert policy is not None
    assert policy.startswith("default-src 'none'; ")
    scripts = [s for s, a in zip(parsed.texts["script"], parsed.named("script"), strict=True) if "type" not in a]
    assert len(scripts) == len(parsed.texts["style"]) == 1
    for kind, source in (("style", parsed.texts["style"][0]), ("script", scripts[0])):
        digest = base64.b64encode(hashlib.sha256(source.encode()).digest()).decode()
        assert f"{kind}-src 'sha256-{digest}'" in policy
    assert "unsafe" not in policy


HOSTILE = "</pre></script><script>alert(1)</script><img src=x onerror=alert(1)>&amp;\x00\ufffe"


def test_what_a_run_says_is_only_text(tmp_path: Path) -> None:
    event = {"time": 1, "step": 5, "event": "spike" + HOSTILE, "message": HOSTILE + "\ud800"}
    lines = (
        json.dumps(event) + "\n" + json.dumps({"step": 1, f"health/grad_norm/{HOSTILE}": 1.0, "train/loss": 1}) + "\n"
    )
    name = "<script>alert(2)<b>&'\""
    config = {"model": {HOSTILE: HOSTILE}, "data": HOSTILE}
    runs = [
        make(tmp_path / name.replace("/", "|"), lines=lines, config=config, at00000005=HOSTILE),
        make(tmp_path / "b"),
    ]
    page = report(runs, NOW)
    parsed = Page(page)
    page.encode("utf-8")
    assert len([a for a in parsed.named("script") if "type" not in a]) == 1
    assert not parsed.named("img")
    assert "alert(1)</script>" not in page
    assert any("<script>alert(1)</script><img src=x" in shown for shown in parsed.texts["pre"])
    assert name in parsed.texts["title"][0]
    legends = [
        json.loads(s) for s, a in zip(parsed.texts["script"], parsed.named("script"), strict=True) if "type" in a
    ]
    assert any(line["name"] == HOSTILE for lines in legends for line in lines)


def test_the_numbers_are_those_of_the_run(tmp_path: Path) -> None:
    page = report([make(tmp_path / "a")], NOW)
    parsed = Page(page)
    tiles = dict(zip(parsed.texts["dt"], parsed.texts["dd"], strict=True))
    assert tiles == {
        "State": "finished", "Steps": "100", "Best validation loss": "3.0000 at step 75",
        "Final validation loss": "3.5000", "Final training loss": "2.0000", "Tokens": "6.40 k", "Time": "1:39 min",
        "Tokens per second": "52.1 k", "Parameters": large(count(CFG)),
    }  # fmt: skip
    cells = [row for _, row in parsed.rows]
    assert ["75", "2.5", "3"] in cells  # the loss by numbers, at the evaluations
    assert ["train.lr", "0.001"] in cells
    assert ["git.commit", "abc"] in cells
    labels = [a["aria-label"] for a in parsed.named("svg") if a.get("role") == "img"]
    assert labels[0] is not None
    assert "validation: from 4 at step 25, to 3.5 at step 100, least 3 at step 75" in labels[0]


def test_settings_that_differ_are_marked_and_no_others(tmp_path: Path) -> None:
    other = json.loads(json.dumps(CONFIG))
    other["train"] |= {"lr": 2e-3, "steps": 100.0}
    other["model"]["tied"] = not other["model"]["tied"]
    other["tokenizer"] = {"kind": "char"}
    other["run"] = {"guard": "off"}
    parsed = Page(report([make(tmp_path / "a"), make(tmp_path / "b", config=other)], NOW))
    marked = [cells for kind, cells in parsed.rows if kind == "differs"]
    assert marked == [
        ["≠ model.tied", "true", "false"],
        ["≠ train.lr", "0.001", "0.002"],
        ["≠ tokenizer.sha256", "ab", "–"],
        ["≠ run.guard", "–", "off"],
    ]
    assert ["train.optimizer", "adamw", "adamw"] in [cells for kind, cells in parsed.rows if not kind]
    assert differs([True, 1])
    assert not differs([1, 1.0])
    assert differs(["1", 2])


def test_runs_are_compared_and_the_best_is_marked(tmp_path: Path) -> None:
    better = "".join(json.dumps(row | ({"val/loss": 1.25} if "val/loss" in row else {})) + "\n" for row in rows(50))
    parsed = Page(report([make(tmp_path / "a"), make(tmp_path / "b", lines=better)], NOW))
    (one,), (two,) = ([cells for _, cells in parsed.rows if cells[0] == f" {name}"] for name in "ab")
    assert one[1:4] == ["finished", "100", "3.0000 at step 75"]
    assert two[1:4] == ["not finished", "50 of 100", "1.2500 at step 25 ★"]
    elsewhere = make(tmp_path / "c", config=CONFIG | {"data": "data/other"})
    page = report([tmp_path / "a", elsewhere], NOW)
    assert "★" not in page
    assert "losses of different data or tokenizers do not compare" in page
    assert Page(report([tmp_path / "a", tmp_path / "a"], NOW)).texts["h1"] == [f"{tmp_path}/a, {tmp_path}/a"]


def test_a_torn_line_is_left_out_and_a_broken_one_said(tmp_path: Path) -> None:
    whole = [json.dumps(row) for row in rows()]
    torn = read_run(make(tmp_path / "torn", lines="\n".join(whole) + '\n{"step": 101, "tra'), "torn")
    assert (len(torn.rows), torn.unreadable) == (len(whole), 0)
    broken = make(
        tmp_path / "broken", lines="\n".join([*whole[:50], '{"step":', "[1, 2]", "", "\x00", *whole[50:]]) + "\n"
    )
    assert len(read_run(broken, "broken").rows) == len(whole)
    assert "3 lines of metrics.jsonl of broken could not be read" in report([broken], NOW)


@pytest.mark.parametrize(
    "missing", [["config.json"], ["metrics.jsonl"], ["config.json", "environment.json"], ["samples"]]
)
def test_missing_files_are_left_out(tmp_path: Path, missing: list[str]) -> None:
    folder = make(tmp_path / "a", lines="" if "samples" in missing else None)
    for name in missing:
        (folder / name).rmdir() if name == "samples" else (folder / name).unlink()
    for odd in ("[]", "{", '{"model": {"n_layers": "many"}, "train": 3}'):
        Page(report([folder, make(tmp_path / f"b{len(odd)}", config=odd)], NOW))
        (tmp_path / f"b{len(odd)}" / "config.json").write_text(odd)
        page = report([folder, tmp_path / f"b{len(odd)}"], NOW)
        Page(page)
    if "metrics.jsonl" in missing:
        assert "No numbers yet." in report([folder], NOW)


def test_what_is_no_run() -> None:
    with pytest.raises(RunError, match=r"there is no .*nothing-here"):
        report([Path("nothing-here")])
    with pytest.raises(RunError, match=r"is no run: it has no metrics\.jsonl"):
        report([Path(__file__).parent])
    with pytest.raises(ValueError, match="name a run"):
        report([])


def test_values_that_are_not_finite_are_gaps(tmp_path: Path) -> None:
    values = ["1", "NaN", "2", "null", '"x"', "Infinity", "3", "-Infinity", "4", "5"]
    lines = "".join(f'{{"step": {i}, "train/loss": {v}}}\n' for i, v in enumerate(values))
    run = read_run(make(tmp_path / "a", lines=lines), "a")
    found = run.series("train/loss").values
    assert np.array_equal(found, [1, np.nan, 2, np.nan, np.nan, np.nan, 3, np.nan, 4, 5], equal_nan=True)
    drawn = path(run.series("train/loss"), linear(0, 9, rounded=False), linear(0, 5))
    assert drawn.count("M") == 4
    assert drawn.count("h0") == 3  # a point between gaps is a dot
    assert drawn.endswith("M888.9 200.0L1000.0 0.0")
    assert "5 values missing or not finite" in report([tmp_path / "a"], NOW)


def test_steps_done_again_count_once(tmp_path: Path) -> None:
    steps = [1, 2, 3, 4, 3, 4, 5]
    lines = "".join(json.dumps({"step": s, "train/loss": i, "time": 10 * i}) + "\n" for i, s in enumerate(steps))
    found = read_run(make(tmp_path / "a", lines=lines), "a").series("train/loss")
    assert found.steps.tolist() == [1, 2, 3, 4, 5]
    assert found.values.tolist() == [0, 1, 4, 5, 6]


def test_the_time_between_two_sittings_does_not_count(tmp_path: Path) -> None:
    lines = [{"time": 0, "step": 1}, {"time": 10, "step": 2}, {"time": 5000, "step": 2, "event": "resumed"}]
    told = "".join(json.dumps(row) + "\n" for row in [*lines, {"time": 5030, "step": 3}])
    assert facts(read_run(make(tmp_path / "a", lines=told), "a"), NOW).seconds == 40


@pytest.mark.parametrize(
    ("last", "state"),
    [
        ({"time": NOW - 9, "step": 7}, "running"),
        ({"time": NOW - 9000, "step": 7}, "not finished"),
        ({"time": NOW - 9000, "step": 100}, "finished"),
        ({"time": NOW - 9, "step": 7, "event": "stopped"}, "stopped"),
    ],
)
def test_how_a_run_stands(tmp_path: Path, last: dict[str, Any], state: str) -> None:
    assert facts(read_run(make(tmp_path / "a", lines=json.dumps(last)), "a"), NOW).state == state


def series(values: Any) -> Series:
    return Series(np.arange(len(values), dtype=float), np.array(values, dtype=float))


@given(st.lists(st.floats(-1e9, 1e9) | st.just(math.nan), min_size=100, max_size=500), st.integers(1, 50))
@hypothesis.settings(max_examples=40)
def test_a_thinned_curve_keeps_its_extremes_ends_and_gaps(values: list[float], buckets: int) -> None:
    whole = series(values)
    kept = thinned(whole, buckets)
    assert len(kept.steps) <= 5 * buckets
    assert (np.diff(kept.steps) > 0).all()
    assert np.array_equal(kept.values, whole.values[kept.steps.astype(int)], equal_nan=True)
    assert (kept.steps[0], kept.steps[-1]) == (0, len(values) - 1) or len(values) <= 5 * buckets
    assert np.isnan(kept.values).any() == np.isnan(whole.values).any()
    if not np.isnan(whole.values).all():
        assert np.nanmin(kept.values) == np.nanmin(whole.values)
        assert np.nanmax(kept.values) == np.nanmax(whole.values)


def test_a_short_curve_stays_whole() -> None:
    assert thinned(series(range(50)), 10).steps.tolist() == list(range(50))


def test_smoothing_is_a_mean_beside_the_raw_curve() -> None:
    values = np.sin(np.arange(400)) + 5
    values[100] = np.nan
    found = smoothed(series(values))
    assert found is not None
    mean, window = found
    assert window == 11
    assert mean.values[200] == pytest.approx(values[195:206].mean())
    assert mean.values[98] == pytest.approx(np.nanmean(values[93:104]))
    assert mean.values[-1] == pytest.approx(values[-6:].mean())
    assert mean.values[0] == values[0]
    assert np.isnan(mean.values[100])
    assert smoothed(series([1.0] * (SMOOTH_FROM - 1))) is None
    drawn = Page(figure(Chart("x", "", [Line("a", "c0", series(values), smooth=True)], (0, 399))))
    assert [a["class"] for a in drawn.named("path")] == ["line raw c0", "line c0"]


def test_a_logarithmic_axis_where_it_helps() -> None:
    def drawn(low: float, high: float) -> str:
        return figure(Chart("x", "", [Line("a", "c0", series([high, low]))], (0, 1), log_from=20))

    assert "log scale" in drawn(1, 20)
    assert "log scale" not in drawn(1, 19)
    assert "log scale" not in drawn(-1, 100)
    mostly = series([0, *range(1, 30)])
    page = figure(Chart("x", "", [Line("a", "c0", mostly)], (0, 29), log_from=20))
    assert "log scale, 1 value missing or not finite, or 0" in page
    assert figure(Chart("x", "", [Line("a", "c0", series([math.nan]))], (0, 1))) == ""


def test_what_is_beyond_a_trimmed_axis_is_counted_and_stays_inside() -> None:
    values = np.linspace(2, 3, 1000)
    values[500] = 1000
    page = figure(Chart("x", "", [Line("a", "c0", series(values), smooth=True)], (0, 999), trimmed=True))
    assert "1 beyond the axis" in page
    heights = [float(y) for d in re.findall(r'd="([^"]*)"', page) for y in re.findall(r"[ML]\S+ (\S+?)(?=[ML]|$)", d)]
    assert 0 <= min(heights) <= max(heights) <= 1000


@given(st.floats(-1e12, 1e12), st.floats(1e-9, 1e12), st.integers(3, 8))
def test_ticks_are_1_2_5_and_hold_the_range(low: float, width: float, wanted: int) -> None:
    high = low + max(width, abs(low) * 1e-6)
    scale = linear(low, high, wanted)
    slack = (high - low) * 1e-6
    assert scale.low <= low + slack
    assert scale.high >= high - slack
    step = scale.ticks[1] - scale.ticks[0]
    assert f"{step:.0e}"[0] in "125"
    assert 2 <= len(scale.ticks) <= wanted + 2
    assert len(set(labels(scale))) == len(scale.ticks) or abs(low) > 1e5 * (high - low)


@given(st.floats(1e-12, 1e6), st.floats(4, 1e9))
def test_logarithmic_ticks_lie_inside(low: float, ratio: float) -> None:
    scale = logarithmic(low, low * ratio)
    assert 1 <= len(scale.ticks) <= 12
    assert all(scale.low <= t <= scale.high for t in scale.ticks)
    ends = scale.at(np.array([scale.low, scale.high]))
    assert ends == pytest.approx([0, 1], abs=1e-9)


def test_numbers_as_people_write_them() -> None:
    assert [nice(x) for x in (0.11, 0.2, 3, 6)] == [pytest.approx(x) for x in (0.2, 0.2, 5, 10)]
    assert labels(linear(0, 20000)) == ["0", "5k", "10k", "15k", "20k"]
    assert labels(linear(0, 1e-3)) == ["0", "2e-4", "4e-4", "6e-4", "8e-4", "1e-3"]
    assert labels(linear(1.9, 2.3)) == ["1.9", "2.0", "2.1", "2.2", "2.3"]
    assert labels(Scale(1e-5, 1e5, True, (1e-4, 1.0, 1e4))) == ["1e-4", "1", "10k"]
    assert [said(x) for x in (2.34567, 3e-4, 52134.4, 1000.0, math.nan, None)] == [
        "2.346", "3e-4", "52,134", "1,000", "–", "–",
    ]  # fmt: skip
    assert [large(x) for x in (0, 999, 1000, 12_496_960, 999_900)] == ["0", "999", "1.00 k", "12.5 M", "1.00 M"]
    assert [duration(x) for x in (4.2, 185, 7801)] == ["4 s", "3:05 min", "2:10:01 h"]


def test_markup() -> None:
    assert tag("a", "<b>", class_="x", hidden=True, off=False, aria_label='"<') == (
        '<a class="x" hidden aria-label="&quot;&lt;"><b></a>'
    )


def test_thousands_of_points_and_many_runs_stay_a_small_page(tmp_path: Path) -> None:
    lines = "".join(json.dumps({"step": i, "train/loss": 2 + math.sin(i)}) + "\n" for i in range(20_000))
    folders = [make(tmp_path / f"r{i}", lines=lines if i == 0 else None) for i in range(12)]
    page = report(folders, NOW)
    assert len(page) < 1_000_000
    assert {f"c{i}" for i in range(8)} <= set(re.findall(r'class="key (c\d)"', page))
