"""`fnlm serve`: the chat page and the OpenAI-compatible API over every model below some folders."""

from __future__ import annotations

import _thread
import difflib
import errno
import ipaddress
import logging
import os
import signal
import socket
import sys
import threading
import time
import webbrowser
from datetime import datetime, timezone
from pathlib import Path
from types import FrameType
from typing import Any
from urllib.parse import quote

import click
import waitress

from cli import bits, speculation
from cli.sample import device_of
from cli.tables import columns, in_si
from fnlm import trained
from fnlm.checkpoint import CheckpointError
from fnlm.report.run import read_run
from webui.app import BODY_LIMIT, create_app
from webui.checkpoints import NEWEST
from webui.engine import Engine
from webui.follow import Runs
from webui.models import About, Models, Precision, dtype_of
from webui.openai import MOST_TOKENS

PATIENCE = 15.0  # seconds for a run that is being started beside this
FLUSH = 2.0  # seconds for clients to take the end of their replies
SPARE_THREADS = 8  # for the page and the lists while every stream is taken


@click.command(cls=bits.Command)
@click.argument("folders", nargs=-1, type=click.Path(path_type=Path), metavar="[RUN|FOLDER]...")
@click.option("--follow", metavar="RUN", type=click.Path(path_type=Path), help="Open the page of this run first.")
@click.option("--host", default="127.0.0.1", show_default=True, help="The address to listen on; 0.0.0.0 for all.")
@click.option("--port", default=8000, show_default=True, type=click.IntRange(0, 65535), help="0: a free one.")
@click.option("--api-key", metavar="KEY", envvar="FNLM_API_KEY", help="Ask for this key. [env: FNLM_API_KEY]")
@click.option("--open/--no-open", "open_", default=None, help="Open the page in a browser. [default: on a desktop]")
@click.option("--max-streams", default=32, show_default=True, type=click.IntRange(1, 512), help="Replies at once.")
@click.option(
    "--max-tokens", default=16384, show_default=True, type=click.IntRange(1, MOST_TOKENS), help="Of a text that slides."
)
@click.option("--precision", default="auto", type=click.Choice(["auto", "fp32", "bf16"]), help="Of the parameters.")
@bits.option("Matrices in int8 (or int4): a half (a quarter) of bf16, for speed and large models on a CPU.")
@speculation.option
@click.option("--device", metavar="D", help="cpu, cuda or cuda:1. [default: a GPU if there is one]")
@click.option("--memory", type=click.FloatRange(0, min_open=True), metavar="GB", help="Of loaded models' parameters.")
@click.option(
    "--grace", default=5.0, show_default=True, type=click.FloatRange(0), metavar="S", help="Seconds to end in."
)
def command(
    folders: tuple[Path, ...],
    follow: Path | None,
    host: str,
    port: int,
    api_key: str | None,
    open_: bool | None,
    max_streams: int,
    max_tokens: int,
    precision: Precision,
    quantize: bits.Quantized | None,
    speculate: str | None,
    device: str | None,
    memory: float | None,
    grace: float,
) -> None:
    """Open a chat page and an OpenAI-compatible API.

    Every model of a run, or of the runs below a folder, can be chosen; without a name, those below ./runs. A run that
    commits a better checkpoint is served with it from the next request on. --follow shows a run while it trains: its
    curves, samples and checkpoints, and what it answers by now. Ctrl-C ends it.
    """
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S", stream=sys.stderr)
    logging.getLogger("waitress.queue").setLevel(logging.ERROR)  # a queue of streams is nothing to warn of
    if api_key and not (api_key.isascii() and api_key.isprintable() and " " not in api_key):
        raise ValueError("--api-key must be letters, digits and signs of ASCII without spaces: it travels in a header")
    bytes_ = None if memory is None else int(memory * 1e9)
    models = Models(named(folders, follow), bytes_, device_of(device), precision, quantize and bits.BITS[quantize])
    about = list(models.about().values())
    if not about and follow is None:
        raise CheckpointError(f"{' '.join(map(str, models.folders))} holds no model; train one with 'fnlm train' first")
    draft = speculation.drafting(speculate, models.device, lambda n: dtype_of(precision, models.device, n))
    engine = Engine(models, streams=max_streams, draft=draft, most_tokens=max_tokens)
    place = bound(host, port)
    runs = Runs(models, follow)
    app = create_app(engine, api_key or None, is_loopback(host), runs)
    server = server_of(app, place, 2 * max_streams + SPARE_THREADS)
    engine.start()
    if first := first_of(about, runs):
        engine.warm(first)
    page = "" if runs.name is None else f"run?name={quote(runs.name, safe='')}"
    url = f"http://{shown(host)}:{place.getsockname()[1]}/{page}"
    click.echo("\n".join([*table(about), "", f"{url}   Ctrl-C ends it"] if about else [f"{url}   Ctrl-C ends it"]))
    sys.stdout.flush()
    if not is_loopback(host) and not api_key:
        click.echo(f"warning: {host} lets everyone who reaches this machine use it; --api-key asks for a key", err=True)
    if has_desktop() if open_ is None else open_:
        key = f"#key={quote(api_key, safe='')}" if api_key else ""
        threading.Thread(target=webbrowser.open, args=(url + key,), daemon=True).start()
    run(server, engine, grace)


def first_of(about: list[About], runs: Runs) -> str | None:
    """The model to load before anyone asks: the newest of the run that is followed, else the first there is."""
    if runs.name in [a.name for a in about]:
        return f"{runs.name}@{NEWEST}"
    return about[0].name if about else None


def named(folders: tuple[Path, ...], follow: Path | None = None) -> list[Path]:
    """The folders, or ./runs; and a run to follow, unless it is below one.

    Raises CheckpointError for a folder that is not there, with the nearest name, RunError where there is no such run.
    """
    if follow is not None:
        if not follow.exists() and not is_misspelt(follow):
            wait_for(follow)
        if not follow.is_file():
            read_run(follow, follow.name)
        inside = any(follow.resolve().is_relative_to(folder.resolve()) for folder in folders)
        folders = folders if inside else (*folders, follow)
    elif not folders:
        if not Path("runs").is_dir():
            raise click.UsageError("name a run, or a folder with runs; there is no ./runs", click.get_current_context())
        return [Path("runs")]
    for folder in folders:
        if not folder.exists():
            trained.locate(folder)
        if not folder.is_dir():
            raise CheckpointError(f"{folder} is not a folder; name a run, or a folder with runs")
    return list(folders)


def is_misspelt(run: Path) -> bool:
    """Whether there is one of nearly this name, or no folder that it could be in."""
    there = [p.name for p in run.parent.iterdir()] if run.parent.is_dir() else []
    return not run.parent.is_dir() or bool(difflib.get_close_matches(run.name, there))


def wait_for(run: Path) -> None:
    """Until a run that is just being started has its first file, or PATIENCE seconds."""
    click.echo(f"waiting for {run}", err=True)
    until = time.monotonic() + PATIENCE
    while not (run / "config.json").is_file() and time.monotonic() < until:
        time.sleep(0.05)


def bound(host: str, port: int) -> socket.socket:
    """A socket at this address. ClickException where it cannot be had."""
    try:
        found = socket.getaddrinfo(host.strip("[]") or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        return socket.create_server(found[0][4][:2], family=found[0][0])
    except OSError as error:
        raise click.ClickException(why_not(error, host, port)) from error


def server_of(app: Any, place: socket.socket, threads: int) -> Any:
    """A waitress server, not yet running, with a thread for each stream that it promises."""
    return waitress.create_server(
        app,
        sockets=[place],
        threads=threads,
        channel_request_lookahead=1,  # without it a client that left is not noticed
        max_request_body_size=2 * BODY_LIMIT,
        connection_limit=2 * threads,
        ident=None,
        clear_untrusted_proxy_headers=True,
    )


def why_not(error: OSError, host: str, port: int) -> str:
    """Why nothing can listen there, and what to try."""
    if error.errno == errno.EADDRINUSE:
        return f"port {port} is in use; choose another with --port {port + 1 if port < 65535 else 8000}"
    if error.errno == errno.EACCES:
        return f"port {port} is not allowed to you; choose one above 1023 with --port 8000"
    return f"cannot listen on {host}: {error.strerror or error}; this machine's own address is 127.0.0.1"


def run(server: Any, engine: Engine, grace: float) -> None:
    """Serve until SIGINT or SIGTERM; then let replies be written for `grace` seconds, end the rest, and leave.

    A second signal ends them at once.
    """
    signals: list[int] = []

    def leave(number: int, _: FrameType | None) -> None:
        if ended.is_set():
            raise KeyboardInterrupt
        signals.append(number)
        if len(signals) == 1 and engine.load()["active"] and grace:
            click.echo("ending; once more ends the replies as well", err=True)
        threading.Thread(target=finish, args=(grace if len(signals) == 1 else 0.0,), daemon=True).start()

    def finish(seconds: float) -> None:
        engine.stop(grace=seconds)
        until = time.monotonic() + FLUSH
        while server.task_dispatcher.active_count and time.monotonic() < until:
            time.sleep(0.01)  # the last words are on their way
        ended.set()
        _thread.interrupt_main()
        server.pull_trigger()

    ended = threading.Event()
    before = {number: signal.signal(number, leave) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        server.run()
    except KeyboardInterrupt:
        pass  # it came between two of waitress's steps
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        server.close()
        engine.stop()
    click.echo("ended", err=True)


def table(about: list[About]) -> list[str]:
    """The models, a line each."""
    rows = [["model", "kind", "parameters", "step", "loss", "saved"]]
    for a in about:
        saved = datetime.fromtimestamp(a.saved, timezone.utc).astimezone().strftime("%Y-%m-%d %H:%M")
        loss = "-" if a.loss is None else f"{a.loss:.3f}"
        kind = "chat" if a.chat else "text"
        rows.append([printable(a.name), kind, in_si(a.parameters), f"{a.step:,}", loss, saved])
    return columns(rows, left=(0, 1, 5), indent="")


def printable(name: str) -> str:
    """A name without what could steer a terminal."""
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in name)


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches a server at this address."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


def shown(host: str) -> str:
    """The address to open: one that listens everywhere is reached as localhost; IPv6 in brackets."""
    if host in ("0.0.0.0", "::", ""):
        return "localhost"
    return f"[{host}]" if ":" in host and not host.startswith("[") else host


def has_desktop() -> bool:
    """Whether a person with a browser sits at this terminal."""
    if not sys.stdout.isatty() or "SSH_CONNECTION" in os.environ:
        return False
    return sys.platform in ("win32", "darwin") or any(os.environ.get(v) for v in ("DISPLAY", "WAYLAND_DISPLAY"))
