"""A real server on a real port: OpenAI's own client unchanged, curl's line, clients that leave, many streams."""

from __future__ import annotations

import json
import selectors
import socket
import struct
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import openai
import pytest
import waitress
from openai import OpenAI

import fnlm
from cli.serve import server_of
from tests.webui.tiny import Script, save
from webui.app import create_app
from webui.engine import Engine
from webui.models import Models

KEY = "sesame"
ASKED = [{"role": "user", "content": "hi"}]


class Server(NamedTuple):
    engine: Engine
    port: int

    @property
    def client(self) -> OpenAI:
        return OpenAI(base_url=f"http://127.0.0.1:{self.port}/v1", api_key=KEY, max_retries=0)


def served(engine: Engine, threads: int = 24) -> Iterator[Server]:
    place = socket.create_server(("127.0.0.1", 0))
    server = server_of(create_app(engine, KEY), place, threads)
    thread = threading.Thread(target=server.run, name="serve")
    thread.start()
    yield Server(engine, place.getsockname()[1])
    engine.stop()
    server.task_dispatcher.shutdown(timeout=5)
    waitress.wasyncore.close_all(server._map)
    thread.join(10)
    assert not thread.is_alive()


@pytest.fixture(scope="module")
def server(runs: Path) -> Iterator[Server]:
    yield from served(Engine(Models([runs]), streams=4).start())


@pytest.fixture
def script() -> Script:
    return Script(pause=0.002)


@pytest.fixture
def echo(tmp_path: Path, script: Script) -> Iterator[Server]:
    save(tmp_path / "plain", "text", seq_len=8192)
    yield from served(Engine(Models([tmp_path]), streams=64, waiting=150, batch=script).start(), threads=230)


def test_openais_client(server: Server) -> None:
    client = server.client
    assert [m.id for m in client.models.list()] == ["plain", "talk"]
    whole = client.chat.completions.create(model="talk", messages=ASKED, max_tokens=12, seed=3)  # type: ignore[call-overload]
    assert whole.usage.completion_tokens == 12
    parts = client.chat.completions.create(  # type: ignore[call-overload]
        model="talk", messages=ASKED, max_tokens=12, seed=3, stream=True, stream_options={"include_usage": True}
    )
    *chunks, last = parts
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == whole.choices[0].message.content
    assert (last.choices, last.usage) == ([], whole.usage)
    text = client.completions.create(model="plain", prompt="abc", max_tokens=6, n=2, seed=1)
    assert [c.index for c in text.choices] == [0, 1]
    assert (
        client.completions.create(model="plain", prompt=[97, 98, 99], max_tokens=6, seed=1).choices[0].text
        == text.choices[0].text
    )


def test_openais_client_reads_log_probabilities(server: Server) -> None:
    client = server.client
    chat = client.chat.completions.create(  # type: ignore[call-overload]
        model="talk", messages=ASKED, max_tokens=9, seed=3, logprobs=True, top_logprobs=3
    ).choices[0]
    content = chat.logprobs.content
    assert bytes(b for t in content for b in t.bytes).decode("utf-8", "replace") == chat.message.content
    for token in content:
        assert len(token.top_logprobs) == 3
        best = [t.logprob for t in token.top_logprobs]
        assert best == sorted(best, reverse=True)
        assert token.logprob <= best[0]
    text = client.completions.create(model="plain", prompt="abc", max_tokens=6, seed=1, logprobs=2).choices[0]
    assert text.logprobs is not None
    assert len(text.logprobs.tokens or []) == len(text.logprobs.token_logprobs or []) == 6
    assert (text.logprobs.text_offset or [])[0] == 0


def test_openais_client_meets_errors(server: Server) -> None:
    client = server.client
    with pytest.raises(openai.NotFoundError, match="there is no model 'none'"):
        client.completions.create(model="none", prompt="a")
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model="plain", prompt="a", temperature=-1)
    assert caught.value.param == "temperature"
    with pytest.raises(openai.AuthenticationError):
        OpenAI(base_url=str(client.base_url), api_key="wrong").models.list()


def connection(port: int, body: dict[str, Any]) -> socket.socket:
    """A request sent by hand, so that the client can leave as rudely as it likes."""
    data = json.dumps(body).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {KEY}\r\n"
    head += f"Content-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
    s = socket.create_connection(("127.0.0.1", port), timeout=120)  # the machine may be busy
    s.sendall(head.encode() + data)
    return s


def test_clients_that_leave_mid_stream(echo: Server, script: Script) -> None:
    """200 clients, half of them by FIN and half by RST, some before their first token: no place and no thread stays."""
    before = {t.name for t in threading.enumerate()}
    body = {"model": "plain", "prompt": "a", "max_tokens": 8000, "temperature": 0, "stream": True}
    script.pause = 0.02  # none has ended before the last has come
    clients = [connection(echo.port, body) for _ in range(200)]
    deadline = time.monotonic() + 60
    while echo.engine.load() != {"active": 64, "waiting": 136}:
        assert time.monotonic() < deadline, echo.engine.load()
        time.sleep(0.01)
    for i, s in enumerate(clients):
        if i % 2:
            s.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        s.close()
    deadline = time.monotonic() + 60
    while any(echo.engine.load().values()):
        assert time.monotonic() < deadline, echo.engine.load()
        time.sleep(0.01)
    after = {t.name for t in threading.enumerate()}
    assert not {name for name in after - before if not name.startswith("waitress")}
    assert 'fnlm_replies_total{finish="cancelled"} 200' in echo.engine.metrics.text({})


def test_many_streams_at_once(echo: Server) -> None:
    """64 streams are written together, whole and well-formed; none waits for another."""
    body = {"model": "plain", "prompt": "a", "max_tokens": 40, "temperature": 0, "stream": True}
    clients = [connection(echo.port, body) for _ in range(150)]
    for s in clients:
        received = b""
        while not received.endswith(b"\r\n0\r\n\r\n"):
            part = s.recv(65536)
            assert part
            received += part
        s.close()
        assert received.count(b'"text":"x"') == 40
        assert received.count(b"data: [DONE]\n\n") == 1


def arrivals(clients: list[socket.socket]) -> list[list[float]]:
    """When each event of each stream came, all read as they come."""
    times: list[list[float]] = [[] for _ in clients]
    received = [b""] * len(clients)
    with selectors.DefaultSelector() as ready:
        for i, s in enumerate(clients):
            s.setblocking(False)
            ready.register(s, selectors.EVENT_READ, i)
        while ready.get_map():
            events = ready.select(timeout=120)
            assert events, "no stream has anything to say"
            for key, _ in events:
                part = clients[key.data].recv(65536)
                assert part
                received[key.data] += part
                times[key.data] += [time.monotonic()] * part.count(b'"finish_reason":null')
                if received[key.data].endswith(b"\r\n0\r\n\r\n"):
                    ready.unregister(key.fileobj)
    assert not [r[-300:] for r in received if r.count(b"data: [DONE]\n\n") != 1]
    return times


@pytest.mark.slow
def test_two_hundred_streams_are_held(tmp_path: Path) -> None:
    """All have begun before the first has ended, and each gets every token."""
    save(tmp_path / "plain", "text", seq_len=8192)
    engine = Engine(Models([tmp_path]), streams=200, batch=Script(pause=0.05)).start()
    for echo in served(engine, threads=230):
        body = {"model": "plain", "prompt": "a", "max_tokens": 60, "temperature": 0, "stream": True}
        clients = [connection(echo.port, body) for _ in range(200)]
        times = arrivals(clients)
        assert {len(t) for t in times} == {61}  # and one that begins it
        assert max(t[1] for t in times) < min(t[-1] for t in times)
        for s in clients:
            s.close()


@pytest.mark.slow
def test_thirty_two_streams_of_a_real_model_are_fair(tmp_path: Path) -> None:
    """12.5 million parameters: the slowest stream has at least half the mean speed."""
    save(tmp_path / "plain", "text", **asdict(fnlm.PRESETS["ryan-12m"]))
    for server in served(Engine(Models([tmp_path]), streams=32).start(), threads=72):
        clients = []
        for i in range(32):
            body = {"prompt": "Once " * (1 + i), "max_tokens": 40, "min_tokens": 40, "stream": True, "seed": i}
            clients.append(connection(server.port, body))
        times = arrivals(clients)
        speeds = [len(t) / (t[-1] - t[0]) for t in times]
        assert min(speeds) >= 0.5 * sum(speeds) / len(speeds), speeds
        for s in clients:
            s.close()
