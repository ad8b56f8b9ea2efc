"""A server that answers as the Hugging Face hub does to a reader of datasets, with the files of one folder."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

SHA = "a" * 40


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        path, files = self.path.partition("?")[0], sorted(self.server.folder.iterdir())  # type: ignore[attr-defined]
        self.server.asked.append(path)  # type: ignore[attr-defined]
        if re.fullmatch(r"/api/datasets/[^/]+/[^/]+(/revision/[^/]+)?", path):
            siblings = [{"rfilename": f.name} for f in files]
            self.answer(200, json.dumps({"id": "a/b", "sha": SHA, "siblings": siblings}).encode())
        elif "/tree/" in path:
            self.answer(200, json.dumps([about(f) for f in files]).encode())
        else:
            self.give(re.fullmatch(r"/datasets/[^/]+/[^/]+/resolve/[^/]+/(.+)", path))

    do_HEAD = do_GET

    def give(self, found: re.Match[str] | None) -> None:
        """A file, or the part of it that is asked for."""
        file = self.server.folder / found[1] if found else None  # type: ignore[attr-defined]
        if file is None or not file.is_file():
            self.answer(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": SHA})
            return
        content = file.read_bytes()
        headers = {"ETag": f'"{about(file)["oid"]}"', "X-Repo-Commit": SHA, "Accept-Ranges": "bytes"}
        if wanted := self.headers.get("Range"):
            first, last = re.fullmatch(r"bytes=(\d+)-(\d*)", wanted).groups()  # type: ignore[union-attr]
            stop = min(int(last or len(content)) + 1, len(content))
            headers["Content-Range"] = f"bytes {first}-{stop - 1}/{len(content)}"
            self.answer(206, content[int(first) : stop], headers)
        else:
            self.answer(200, content, headers)

    def answer(self, code: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(code)
        for name, value in (headers or {"Content-Type": "application/json"}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


def about(file: Path) -> dict[str, object]:
    content = file.read_bytes()
    return {"type": "file", "path": file.name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}


@contextmanager
def hub(folder: Path) -> Iterator[tuple[str, list[str]]]:
    """Serves `folder` as any dataset; its address, and the paths that were asked for."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.folder, server.asked = folder, []  # type: ignore[attr-defined]
    thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}", server.asked  # type: ignore[attr-defined]
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
