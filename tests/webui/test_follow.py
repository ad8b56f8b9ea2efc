"""What is told of a run while it trains: rows also torn or cut back, checkpoints by name, nothing from outside."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from flask.testing import FlaskClient

from fnlm.report.chart import Chart, figure
from fnlm.report.run import read_run
from fnlm.track import JsonLines
from tests.webui.running import begin, learn, tell, write
from tests.webui.tiny import save
from webui.app import create_app
from webui.engine import Engine
from webui.follow import Runs, chosen
from webui.models import Models
from webui.tail import Tail

ASKED = {"model": "run@50", "prompt": "abc", "max_tokens": 2, "seed": 3}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    begin(tmp_path / "served" / "run")
    return tmp_path / "served"


@pytest.fixture
def client(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FlaskClient]:
    monkeypatch.setattr("webui.follow.RESTS", 0)
    engine = Engine(Models([folder]), streams=2).start()
    yield create_app(engine).test_client()
    engine.stop()


def told(client: FlaskClient, seen: str = "", name: str = "run") -> dict[str, Any]:
    found: dict[str, Any] = client.get("/v1/run", query_string={"name": name, "seen": seen}).get_json()
    return found


def test_a_file_is_read_once_and_anew_where_it_was_cut(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    tail = Tail(file)
    before = tail.read()
    assert tail.rows == []
    file.write_text('{"step": 1}\n{"step": 2}\nnonsense\n[3]\n\n{"st')
    first = tail.read()
    assert first > before
    assert ([r["step"] for r in tail.rows], tail.unreadable) == ([1, 2], 2)
    assert tail.read() == first
    with file.open("a") as more:
        more.write('ep": 3}\n')
    assert tail.read() > first
    assert [r["step"] for r in tail.rows] == [1, 2, 3]
    rows = tail.rows
    JsonLines.truncate(file, 2)  # a rollback
    learn(tmp_path, range(3, 9))
    assert tail.read() > first
    assert tail.rows is not rows
    assert [r["step"] for r in tail.rows] == [1, 2, 3, 4, 5, 6, 7, 8]
    size = file.stat().st_size
    with file.open("r+b") as same:  # cut in its place, and as long as before
        same.seek(size - 40)
        same.truncate()
        same.write(b"\n" + b'{"step": 7}\n{"step": 10}\n'.rjust(39))
    assert file.stat().st_size == size
    tail.read()
    assert tail.rows[-1]["step"] == 10
    file.unlink()
    tail.read()
    assert tail.rows == []


def test_a_run_as_it_is(client: FlaskClient, folder: Path) -> None:
    run = told(client)
    assert (run["state"], run["step"], run["steps"]) == ("running", 100, 200)
    assert run["left"] is not None
    assert [c["name"] for c in run["checkpoints"]] == ["run@50", "run@100"]
    assert [c["loss"] for c in run["checkpoints"]] == [2.5, 2.0]  # measured after the save
    assert run["samples"] == ["00000050", "00000100"]
    assert [e["event"] for e in run["events"]] == ["saved", "saved"]
    assert ["Training loss", "1.6667"] in run["figures"]
    titles = [part.partition("</b>")[0] for part in run["charts"].split("<figcaption><b>")[1:]]
    assert titles == ["Loss", "Learning rate", "Gradient norm", "Throughput"]
    assert "charts" not in told(client, run["version"])
    tell(folder / "run", step=110, event="spike", message="loss 9 is above 5")
    with (folder / "run" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 120, "torn')
    after = told(client, run["version"])
    assert after["charts"] != run["charts"]
    assert after["events"][-1] == {**after["events"][-1], "step": 110, "event": "spike", "message": "loss 9 is above 5"}
    assert (after["step"], after["unreadable"]) == (110, 0)


def test_curves_that_grow_are_those_of_the_whole_run(client: FlaskClient, folder: Path) -> None:
    def same() -> bool:
        run = read_run(folder / "run", "run")
        return told(client)["charts"] == "".join(figure(chart) for chart in chosen(run))

    for steps in (range(110, 150, 10), range(130, 400, 10), range(20, 30), range(400, 2000)):
        learn(folder / "run", steps, **{"health/param_norm/blocks.0": 2.0, "health/param_norm/root": None})
        tell(folder / "run", step=steps.stop, event="resumed", message="again")
        assert same()
    JsonLines.truncate(folder / "run" / "metrics.jsonl", 300)
    assert same()


def test_drawing_rests_ten_times_as_long_as_it_takes(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr("webui.follow.time.monotonic", lambda: now[0])

    def slow(chart: Chart) -> str:
        now[0] += 1
        return "x"

    monkeypatch.setattr("webui.follow.figure", slow)
    runs = Runs(Models([folder]))
    first = runs.drawn("run", folder / "run")
    assert (first.took, first.charts) == (5, "xxxxx")
    for after, is_drawn in ((1, False), (48, False), (2, True)):
        learn(folder / "run", range(110, 120))
        now[0] += after
        assert (runs.drawn("run", folder / "run") is not first) == is_drawn


def test_a_run_before_its_first_line_and_checkpoint(tmp_path: Path) -> None:
    run = tmp_path / "runs" / "new"
    (run / "checkpoints").mkdir(parents=True)
    (run / "config.json").write_text("[]")
    engine = Engine(Models([run]), streams=2)
    client = create_app(engine, runs=Runs(engine.models, run)).test_client()
    assert client.get("/v1/runs").get_json()["data"] == [{"id": "new"}]
    found = told(client, name="new")
    assert (found["state"], found["charts"], found["checkpoints"], found["step"]) == ("not begun", "", [], None)
    begin(run)
    engine.models._found = (0.0, {})
    assert [c["step"] for c in told(client, name="new")["checkpoints"]] == [50, 100]
    assert client.get("/v1/runs").get_json()["data"] == [{"id": "new"}]


def test_checkpoints_are_models(client: FlaskClient, folder: Path) -> None:
    models = client.get("/v1/models").get_json()["data"]
    assert [(m["id"], m["fnlm"]["step"], m["fnlm"]["loss"]) for m in models] == [("run", 100, 2.0)]
    assert models[0]["fnlm"]["run"]
    assert [c["step"] for c in models[0]["fnlm"]["checkpoints"]] == [50, 100]
    assert client.get("/v1/models/run@50").get_json()["fnlm"]["loss"] == 2.5

    def step(name: str) -> int:
        answer = client.post("/v1/completions", json={**ASKED, "model": name})
        assert answer.status_code == 200, answer.get_json()
        assert answer.get_json()["model"] == name
        found: int = answer.get_json()["fnlm"]["step"]
        return found

    assert [step(name) for name in ("run@50", "run@newest", "run", "run@best")] == [50, 100, 100, 100]
    save(folder / "run", "text", step=150, seed=150)
    assert step("run@newest") == 150
    shutil.rmtree(folder / "run" / "checkpoints" / "00000050.params")  # as retention does
    gone = client.post("/v1/completions", json=ASKED)
    assert (gone.status_code, gone.get_json()["error"]["code"]) == (404, "model_not_found")
    assert [c["step"] for c in told(client)["checkpoints"]] == [100, 150]


@pytest.mark.parametrize("at", ["", "x", "-1", "1e2", "50 ", "../100", "9" * 30, "٥٠", "newest@50", "51", "50/../100"])
def test_what_is_no_checkpoint(client: FlaskClient, at: str) -> None:
    assert client.post("/v1/completions", json={**ASKED, "model": f"run@{at}"}).status_code == 404


def test_only_what_a_run_holds_is_told(client: FlaskClient, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, secret = folder / "run", folder.parent / "secret.txt"
    secret.write_text("secret")
    (run / "samples" / "00000060.txt").symlink_to(secret)
    (run / "samples" / "evil.txt").write_text("x")
    assert told(client)["samples"] == ["00000050", "00000100"]
    for at in ("00000060", "evil", "../../../secret", "../config", "", "50", "00000050/../00000100"):
        assert client.get("/v1/run/sample", query_string={"name": "run", "at": at}).status_code == 404
    for name in ("", "nothing", "..", "../served/run", "run/", "run/checkpoints", str(run)):
        assert client.get("/v1/run", query_string={"name": name}).status_code == 404
    text = client.get("/v1/run/sample", query_string={"name": "run", "at": "00000100"}).get_json()["text"]
    assert text.startswith("Once⏵ upon step 100")
    write(run, 100, "x" * 100_000)
    cut = client.get("/v1/run/sample", query_string={"name": "run", "at": "00000100"}).get_json()["text"]
    assert len(cut) == 20_000
    (folder / "linked").mkdir()
    shutil.copytree(run / "checkpoints", folder / "linked" / "checkpoints")
    (folder / "linked" / "metrics.jsonl").symlink_to(run / "metrics.jsonl")
    monkeypatch.setattr("webui.models.FRESH", 0.0)
    assert [m["id"] for m in client.get("/v1/models").get_json()["data"]] == ["linked", "run"]
    assert client.get("/v1/runs").get_json()["data"] == [{"id": "run"}]


def test_a_key_is_asked_for(folder: Path) -> None:
    app = create_app(Engine(Models([folder])), api_key="sesame").test_client()
    assert app.get("/run").status_code == 200
    for path in ("/v1/runs", "/v1/run?name=run", "/v1/run/sample?name=run&at=00000050"):
        assert app.get(path).status_code == 401
        answer = app.get(path, headers={"Authorization": "Bearer sesame"})
        assert answer.status_code == 200
        assert "script-src 'self'" in answer.headers["Content-Security-Policy"]


NUMBERS = [
    "1e999",
    "-1e999",
    "NaN",
    "1" + "0" * 400,
    "-5",
    "0",
    "1e308",
    "-1e308",
    "5e-324",
    "null",
    "true",
    '"x"',
    "[]",
]


def test_whatever_a_line_holds_is_told_in_strict_json(client: FlaskClient, folder: Path) -> None:
    with (folder / "run" / "metrics.jsonl").open("a") as file:
        for value in NUMBERS:
            for other in ("1", value):
                file.write(f'{{"step": {other}, "train/loss": {value}, "val/loss": {value}, "time": {value}, ')
                file.write(f'"event": {value}, "message": {value}, "health/param_norm/a": {value}}}\n')
                file.flush()
                answer = client.get("/v1/run?name=run")
                assert answer.status_code == 200, (value, other)
                json.loads(answer.get_data(), parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))
    os.truncate(folder / "run" / "metrics.jsonl", 5)
    assert told(client)["state"] == "not begun"
