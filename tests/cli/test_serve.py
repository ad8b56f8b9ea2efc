"""`fnlm serve`: its errors as one line, and one real server, started, streamed from, hung up on and ended."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from cli import serve
from cli.main import cli
from fnlm import trained
from fnlm.report import RunError
from tests.webui.tiny import save
from webui.follow import Runs
from webui.models import About, Models

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("served")
    save(folder / "plain", "text", seq_len=4096)
    return folder


def fnlm(*words: str) -> Result:
    return CliRunner().invoke(cli, ["serve", *words])


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        (["empty"], 4, "empty holds no model; train one with 'fnlm train' first"),
        (["emty"], 4, "there is no emty; did you mean 'empty'?"),
        (["file.txt"], 4, "file.txt is not a folder; name a run, or a folder with runs"),
        ([], 2, "name a run, or a folder with runs; there is no ./runs; see 'fnlm serve --help'"),
        (["--follow", "empty"], 4, "empty is no run: it has no metrics.jsonl; name a folder such as runs/demo"),
        (["--follow", "file.txt"], 4, "file.txt is not a folder; name a run, or a folder with runs"),
        (["--follow", "emty"], 4, "there is no emty; did you mean 'empty'?"),
        (["empty", "--port", "70000"], 2, "Invalid value for '--port': 70000 is not in the range 0<=x<=65535"),
        (["empty", "--api-key", "ä b"], 2, "--api-key must be letters, digits and signs of ASCII without spaces"),
    ],
)
def test_errors_are_one_line(
    words: list[str], code: int, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "file.txt").touch()
    result = fnlm(*words)
    assert (result.exit_code, result.stdout) == (code, "")
    assert result.stderr.startswith("error: " + says)
    assert result.stderr.count("\n") == 1


def test_a_run_that_is_just_being_started_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cli.serve.PATIENCE", 20)
    run = tmp_path / "soon"

    def begin() -> None:
        run.mkdir()
        (run / "config.json").write_text("{}")

    timer = threading.Timer(0.3, begin)
    timer.start()
    assert serve.named((), run) == [run]
    timer.join()
    monkeypatch.setattr("cli.serve.PATIENCE", 0.01)
    with pytest.raises(RunError, match=r"there is no .*never"):
        serve.named((), tmp_path / "never")


def test_a_port_in_use(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trained, "load", lambda *_, **__: pytest.fail("a model was loaded first"))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        result = fnlm(str(runs), "--port", str(port))
    assert result.exit_code == 1
    assert result.stderr == f"error: port {port} is in use; choose another with --port {port + 1}\n"


def test_a_run_is_followed_before_it_has_a_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "runs" / "a b&c"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    opened: list[str] = []
    monkeypatch.setattr(serve.webbrowser, "open", opened.append)
    monkeypatch.setattr(serve, "run", lambda server, engine, grace: (server.close(), engine.stop()))
    for words, name in (([], "a%20b%26c"), ([str(tmp_path / "runs")], "a%20b%26c")):
        result = fnlm(*words, "--follow", str(folder), "--port", "0", "--open", "--api-key", "k&")
        assert result.exit_code == 0, result.stderr
        (line,) = result.stdout.splitlines()
        found = re.fullmatch(r"(http://127\.0\.0\.1:\d+/run\?name=" + name + r")   Ctrl-C ends it", line)
        assert found, line
        assert opened.pop() == f"{found[1]}#key=k%26"


def test_the_newest_of_the_run_that_is_followed_is_loaded_first(tmp_path: Path) -> None:
    for name in ("a", "b"):
        save(tmp_path / name, "text")
        (tmp_path / name / "metrics.jsonl").touch()
    models = Models([tmp_path])
    about = list(models.about().values())
    assert serve.first_of(about, Runs(models)) == "a"
    assert serve.first_of(about, Runs(models, tmp_path / "b")) == "b@newest"
    assert serve.first_of([], Runs(Models([tmp_path / "none"]), tmp_path / "b")) is None
    assert serve.named((tmp_path,), tmp_path / "b") == [tmp_path]


def test_an_address_of_another_machine(runs: Path) -> None:
    result = fnlm(str(runs), "--host", "192.0.2.1", "--port", "0")
    assert result.exit_code == 1
    assert result.stderr.startswith("error: cannot listen on 192.0.2.1: ")


def test_who_reaches_an_address() -> None:
    assert [h for h in ("127.0.0.1", "::1", "localhost", "127.1.2.3") if not serve.is_loopback(h)] == []
    assert [h for h in ("0.0.0.0", "::", "192.168.1.5", "example.org") if serve.is_loopback(h)] == []
    assert [serve.shown(h) for h in ("0.0.0.0", "::1", "127.0.0.1")] == ["localhost", "[::1]", "127.0.0.1"]


def test_a_name_cannot_steer_the_terminal() -> None:
    lines = serve.table([About("a\x1b[2J", "chat", 12_496_960, 1000, None, 512, 0)])
    assert lines[1].split()[:6] == ["a\ufffd[2J", "chat", "12.5", "M", "1,000", "-"]


@contextlib.contextmanager
def running(*words: str) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """A server of its own process, and its port."""
    command = [sys.executable, "-m", "cli", "serve", *words, "--port", "0", "--no-open"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    pipe = subprocess.PIPE
    with subprocess.Popen(command, cwd=ROOT, env=environment, stdout=pipe, stderr=pipe, text=True) as process:
        try:
            assert process.stdout is not None
            for line in process.stdout:
                if found := re.match(r"http://\S+:(\d+)/ ", line):
                    yield process, int(found[1])
                    break
            else:
                pytest.fail(process.stderr.read() if process.stderr else "no output")
        finally:
            process.kill()


def asked(port: int, method: str, path: str, body: Any = None) -> tuple[http.client.HTTPConnection, Any]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    headers = {"Content-Type": "application/json"} if body else {}
    connection.request(method, path, json.dumps(body) if body else None, headers)
    return connection, connection.getresponse()


def test_a_real_server(runs: Path) -> None:
    with running(str(runs), "--max-streams", "2") as (process, port):
        body = {"prompt": "abc", "seed": 1, "max_tokens": 20, "stream": True}
        connection, response = asked(port, "POST", "/v1/completions", body)
        assert response.headers["Server"] is None
        streamed = [json.loads(b[6:]) for b in response.read().decode().split("\n\n")[:-2]]
        connection.close()
        connection, response = asked(port, "POST", "/v1/completions", {**body, "stream": False})
        whole = json.loads(response.read())
        connection.close()
        assert response.status == 200, whole
        assert "".join(p["choices"][0]["text"] for p in streamed) == whole["choices"][0]["text"]

        endless = {**body, "max_tokens": 4000, "min_tokens": 4000}
        connection, response = asked(port, "POST", "/v1/completions", endless)
        began = response.read1()
        assert began.startswith(b"data: ")  # it comes as it is written
        assert active(port) == 1
        response.close()  # the client hangs up
        connection.close()
        until_idle(port)

        connection, response = asked(port, "POST", "/v1/completions", endless)
        short, other = asked(port, "POST", "/v1/completions", {**body, "max_tokens": 200, "min_tokens": 200})
        response.read1()
        other.read1()
        process.send_signal(signal.SIGINT)
        assert b'"finish_reason":"length"' in other.read()  # it is given time to end
        short.close()
        process.send_signal(signal.SIGINT)
        ending = response.read()
        assert b"the server is stopping" in ending
        connection.close()
        assert process.wait(10) == 0
        assert process.stderr is not None
        said = process.stderr.read()
        assert "Traceback" not in said
        assert said.splitlines()[-1] == "ended"


def active(port: int) -> int:
    connection, response = asked(port, "GET", "/health")
    with contextlib.closing(connection):
        count: int = json.loads(response.read())["active"]
        return count


def until_idle(port: int) -> None:
    deadline = time.monotonic() + 10
    while active(port):
        assert time.monotonic() < deadline, "the reply to a client that left is still written"
        time.sleep(0.01)
