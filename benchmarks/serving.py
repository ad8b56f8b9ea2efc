"""`fnlm serve` as its clients see it: from the command to the first token, gaps in a stream, eight requests at once.

    python benchmarks/serving.py MODEL [--rounds 5] [--threads 2] [--long 1500] [--tokens 64] [serve's options ...]

MODEL is what `fnlm serve` takes; of several the first is asked. Each round starts a server and stops it:

    start    seconds from the command to the first token of a reply
    gap      longest silence in a running stream while a prompt of --long tokens joins, and the median between tokens
    eight    tokens a second, all told, of eight ragged requests at once
    turns    the same eight, one after another
    memory   the server's peak and present resident memory

Medians over rounds after one that is not counted. The last line is JSON.
"""

from __future__ import annotations

import argparse
import http.client
import itertools
import json
import os
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

JSON = {"Content-Type": "application/json"}
STORY = "Once upon a time, in a small town by the sea, there was"  # goes on in whole words, so each token shows
LENGTHS = (7, 23, 40, 56, 72, 88, 104, 120)


class Server:
    """A server process and how to ask it."""

    def __init__(self, model: str, threads: int, options: list[str]):
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        command = [sys.executable, "-m", "cli", "serve", model, "--no-open", "--port", str(self.port), *options]
        env = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        self.began = time.perf_counter()
        self.process = subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        self.model = ""

    def request(self, method: str, path: str, body: Any = None) -> http.client.HTTPResponse:
        """An answer, as soon as there is one at all."""
        while self.process.poll() is None:
            try:
                connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=120)
                connection.request(
                    method, path, json.dumps(body) if body else None, {"Content-Type": "application/json"}
                )
                return connection.getresponse()
            except ConnectionRefusedError:
                time.sleep(0.005)
        raise SystemExit(f"the server ended with {self.process.returncode}")

    def stream(self, prompt: list[int] | str, tokens: int) -> Iterator[float]:
        """When each piece of a reply comes."""
        if not self.model:
            self.model = json.load(self.request("GET", "/v1/models"))["data"][0]["id"]
        asked = {"model": self.model, "prompt": prompt, "max_tokens": tokens, "min_tokens": tokens, "temperature": 0,
                 "stream": True}  # fmt: skip
        answer = self.request("POST", "/v1/completions", asked)
        if answer.status != 200:
            raise SystemExit(answer.read().decode())
        for line in answer:
            if line.startswith(b"data: {"):
                yield time.perf_counter()

    def memory(self) -> tuple[int, int]:
        """Peak and present resident bytes; zeros where /proc does not tell."""
        path = Path(f"/proc/{self.process.pid}/status")
        lines = dict(line.split(":", 1) for line in path.read_text().splitlines()) if path.exists() else {}
        peak, now = (int(lines.get(name, "0 kB").split()[0]) * 1024 for name in ("VmHWM", "VmRSS"))
        return peak, now

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait()


def prompt(seed: int, n: int) -> list[int]:
    return [(seed * 31 + i * 7) % 200 + 20 for i in range(n)]


def one_round(model: str, threads: int, long: int, tokens: int, options: list[str]) -> dict[str, float]:
    server = Server(model, threads, options)
    try:
        found = {"start": next(iter(server.stream(prompt(0, 16), 4))) - server.began}
        found["gap"], found["median"] = gaps(server, long)
        ragged = [prompt(i + 1, n) for i, n in enumerate(LENGTHS)]
        found["turns"] = 8 * tokens / timed(lambda: [list(server.stream(p, tokens)) for p in ragged])
        ragged = [prompt(i + 11, n) for i, n in enumerate(LENGTHS)]  # others: what was read is kept
        found["eight"] = 8 * tokens / timed(lambda: together(server, ragged, tokens))
        found["peak"], found["now"] = server.memory()
    finally:
        server.stop()
    return found


def gaps(server: Server, long: int) -> tuple[float, float]:
    """The longest silence of a stream that a long prompt joins after a fifth of it, and the median without."""
    times: list[float] = []
    joined = threading.Thread(target=lambda: list(server.stream(prompt(9, long), 2)))
    for at in server.stream(STORY, 200):
        times.append(at)
        if len(times) == 40:
            joined.start()
    joined.join()
    between = [b - a for a, b in itertools.pairwise(times)]
    return max(between[40:]), statistics.median(between[:39])


def together(server: Server, prompts: list[list[int]], tokens: int) -> None:
    threads = [threading.Thread(target=lambda p=p: list(server.stream(p, tokens))) for p in prompts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def timed(run: Any) -> float:
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--long", type=int, default=1500)
    parser.add_argument("--tokens", type=int, default=64)
    args, options = parser.parse_known_args()
    rounds = [one_round(args.model, args.threads, args.long, args.tokens, options) for _ in range(args.rounds + 1)]
    row = {what: statistics.median(r[what] for r in rounds[1:]) for what in rounds[0]}
    print(f"start to the first token {row['start']:.2f} s", end="; ")
    print(f"longest gap {1000 * row['gap']:.0f} ms (median {1000 * row['median']:.1f})", end="; ")
    print(
        f"eight {row['eight']:.0f} tokens/s, in turn {row['turns']:.0f}: {row['eight'] / row['turns']:.2f} x", end="; "
    )
    print(f"memory {row['now'] / 2**20:.0f} MiB, peak {row['peak'] / 2**20:.0f}")
    print(json.dumps({what: round(value, 4) for what, value in row.items()}))


if __name__ == "__main__":
    main()
