"""Corpora by name: references, the hub's library on local folders, files of a local server, cleaning, going on."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from fnlm import cleaning, data
from fnlm.data import CORPORA, DataError, Preparation, Wanted, corpora, staging, streams
from fnlm.data.corpora import Hub, Web
from fnlm.data.streams import SourceLost
from fnlm.held import Busy

sys.path.append(str(Path(__file__).parent))
from hub_server import hub

ROOT = Path(__file__).parents[2]
EOT = "<|endoftext|>"
needs_datasets = pytest.mark.skipif(find_spec("datasets") is None, reason="needs datasets")


def texts_of(out: Path) -> list[str]:
    """The documents of both splits, in order."""
    made = data.open(out)
    list(data.verify(out))
    text = "".join(made.tokenizer.decode(split.tokens) for split in (made.train, made.val))
    return text.removesuffix(EOT).split(EOT)


def jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def todo(path: Path | str, out: Path, **settings: Any) -> Preparation:
    return Preparation((str(path),), out, **{"tokenizer": "byte", "val_fraction": 0.2, **settings})


# References


@pytest.mark.parametrize(
    ("text", "source"),
    [
        ("tinystories", CORPORA["tinystories"]),
        ("wikipedia:20231101.de", Hub("wikimedia/wikipedia", "20231101.de", column="text")),
        ("c4:de:validation", Hub("allenai/c4", "de", "validation", "text")),
        ("hub:a/b", Hub("a/b")),
        ("hub:a/b@v2:x:test#body", Hub("a/b", "x", "test", "body", revision="v2")),
        ("hub:a/b::validation", Hub("a/b", None, "validation")),
        ("alpaca@v2", Hub("tatsu-lab/alpaca", revision="v2")),
        ("c4@v2:de", Hub("allenai/c4", "de", column="text", revision="v2", val="validation")),
        ("dailydialog:other", Hub("li2017dailydialog/daily_dialog", "other", val="validation")),
        ("https://example.org/x.txt?y=1", Web("https://example.org/x.txt?y=1")),
        ("data/x.txt", None),
    ],
)
def test_references(text: str, source: Hub | Web | None) -> None:
    assert corpora.reference(text) == source
    if isinstance(source, Hub):
        assert corpora.reference(corpora.label(source)) == source._replace(val=None)


@pytest.mark.parametrize(
    "text", ["hub:", "hub:a/b:c:d:e", "hub:a/b:c:", "shakespeare:x", "shakespeare#y", "shakespeare@z"]
)
def test_what_is_no_reference(text: str) -> None:
    with pytest.raises(ValueError, match="is no dataset; write hub:org/name"):
        corpora.reference(text)


def test_every_corpus_has_a_name_and_a_file_of_that_name_goes_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = "shakespeare tinystories openwebtext wikipedia c4 c4-news fineweb-edu dailydialog alpaca"
    assert list(CORPORA) == names.split()
    assert [corpora.name_of(n) for n in ("c4", "hub:a/b@v:c", "https://x.org/y.txt?z", "a.txt")] == [
        "c4",
        "b",
        "y",
        None,
    ]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "alpaca").mkdir()
    assert corpora.reference("alpaca") is None
    assert "bbc.com" in corpora.domains_of("news")
    with pytest.raises(ValueError, match="'nws' is no host; did you mean 'news'"):
        corpora.domains_of("nws")


# The hub


def hub_folder(folder: Path, n: int = 40) -> Path:
    """A dataset as the hub lays it out, in two files a split."""
    folder.mkdir(parents=True)
    for split in ("train", "validation"):
        for part in range(2):
            rows = [{"id": i, "body": f"{split} {part} document {i}", "url": f"https://x{i % 4}.org"} for i in range(n)]
            jsonl(folder / f"{split}-{part}.jsonl", rows)
    return folder


@needs_datasets
@pytest.mark.slow
def test_a_dataset_of_the_hub(tmp_path: Path) -> None:
    folder = hub_folder(tmp_path / "hub")
    data.prepare(todo(f"hub:{folder}#body", tmp_path / "out", val=(f"hub:{folder}::validation#body",)))
    assert texts_of(tmp_path / "out") == [
        f"{s} {p} document {i}" for s in ("train", "validation") for p in (0, 1) for i in range(40)
    ]
    assert data.open(tmp_path / "out").manifest["source"][0] == {"path": f"hub:{folder}::train#body"}
    wanted = Wanted(domains=("x1.org",), documents=3)
    data.prepare(todo(f"hub:{folder}#body", tmp_path / "few", wanted=wanted, val_fraction=0.4))
    assert sorted(texts_of(tmp_path / "few")) == [f"train 0 document {i}" for i in (1, 5, 9)]
    with pytest.raises(DataError, match=r"row 1 has no 'text' that is a string; it has id, body, url; .* with #body"):
        data.prepare(todo(f"hub:{folder}", tmp_path / "none"))
    with pytest.raises(SourceLost, match=r"hub:.*:nosplit.*; once it can be read, the same command goes on$") as lost:
        data.prepare(todo(f"hub:{folder}::nosplit", tmp_path / "none"))
    assert (lost.value.exit_code, str(lost.value).count("\n")) == (1, 0)


@needs_datasets
@pytest.mark.slow
def test_a_corpus_by_name_from_a_hub(tmp_path: Path) -> None:
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    (tmp_path / "www").mkdir()
    for split in ("train", "validation"):
        for part in range(2):
            table = arrow.table({"text": [f"{split} {part} story {i}" for i in range(50)]})
            name = f"{split}-0000{part}-of-00002.parquet"
            parquet.write_table(table, tmp_path / "www" / name, row_group_size=10)
    words = ["prepare", "tinystories", "--documents", "70", "--tokenizer", "byte", "--clean", "pii"]
    with hub(tmp_path / "www") as (address, asked):
        environment = {**os.environ, "HF_ENDPOINT": address, "HF_HOME": str(tmp_path / "cache")}
        run = [sys.executable, "-m", "cli", *words, "--out", str(tmp_path / "out")]
        done = subprocess.run(run, env=environment, capture_output=True, text=True, timeout=120, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    want = [f"train {i // 50} story {i % 50}" for i in range(70)]
    assert texts_of(tmp_path / "out") == want + [f"validation {i // 50} story {i % 50}" for i in range(100)]
    assert "train: pii saw 70 documents" in done.stdout
    assert {path.split("/resolve")[0] for path in asked if "resolve" in path} == {"/datasets/roneneldan/TinyStories"}


KILLED = """
import os, signal
from pathlib import Path
from fnlm import data
from fnlm.data import encode, gather
encode.DOCUMENTS = 7
write, calls = gather.Journal.write, []
def dies(self, at):
    write(self, at)
    calls.append(1)
    if len(calls) == 6:
        os.kill(os.getpid(), signal.SIGKILL)
gather.Journal.write = dies
wanted = data.Wanted(clean=("exact", "pii"))
data.prepare(data.Preparation((SOURCE,), Path(OUT), "byte", val_fraction=0.2, wanted=wanted))
"""


@needs_datasets
@pytest.mark.slow
def test_a_killed_stream_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, wanted = f"hub:{hub_folder(tmp_path / 'hub')}#body", Wanted(clean=("exact", "pii"))
    whole = data.prepare(todo(source, tmp_path / "whole", wanted=wanted))
    program = f"SOURCE, OUT = {source!r}, {str(tmp_path / 'out')!r}" + KILLED
    assert subprocess.run([sys.executable, "-c", program], timeout=120).returncode == -signal.SIGKILL
    kept = json.loads((tmp_path / ".out.partial" / "gathered.train.json").read_text())
    assert kept["taken"] == 42
    with (tmp_path / ".out.partial" / "documents.train.jsonl").open("ab") as torn:
        torn.write(b'{"text": "what was not no')
    read: list[str] = []
    rows = streams.HubStream.rows

    def counted(self: streams.HubStream, state: Any) -> Iterator[streams.Row]:
        return (read.append(row["text"]) or row for row in rows(self, state))

    monkeypatch.setattr(streams.HubStream, "rows", counted)
    said: list[str] = []
    made = data.prepare(todo(source, tmp_path / "out", wanted=wanted), said.append)
    assert said[0].endswith("was interrupted; going on with it")
    assert read == [f"train {i // 40} document {i % 40}" for i in range(42, 80)]  # none twice, none left out
    assert made["splits"] == whole["splits"]
    assert made["cleaned"] == whole["cleaned"] == {"train": {"exact": {"seen": 80}, "pii": {"seen": 80}}}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["hub", "out", "whole"]


def test_without_the_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match=r"^reading from the hub needs datasets: pip install 'fnlm\[hub\]'$"):
        data.prepare(todo("tinystories", tmp_path / "out"))
    monkeypatch.setitem(sys.modules, "datasketch", None)
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(ValueError, match=r"^cleaning with minhash needs datasketch: pip install 'fnlm\[clean\]'$"):
        data.prepare(todo(tmp_path / "a.txt", tmp_path / "out", wanted=Wanted(clean=("minhash",))))


def test_rows_of_every_form_are_normal() -> None:
    talk = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    forms: list[dict[str, Any]] = [
        {"dialog": ["a ", " b"], "act": [1, 2]},
        {"instruction": "a", "input": "", "output": "b", "text": "Below is"},
        {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
        talk,
    ]
    assert [streams.normal("here", row, None) for row in forms] == [talk] * 4
    assert streams.normal("here", forms[1], "text") == {"text": "Below is"}
    with pytest.raises(DataError, match="needs rows with a 'url'"):
        streams.is_from({"text": "x"}, ("bbc.com",))
    assert streams.is_from({"url": "https://news.bbc.com/x"}, ("bbc.com",))
    assert not streams.is_from({"url": "https://abbc.com/x"}, ("bbc.com",))


# A server


class Server(ThreadingHTTPServer):
    """Gives out a folder, with ranges; hangs up after `most` bytes of an answer."""

    most = 1 << 40
    asked: list[tuple[str, str | None]]


class Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        server, file = self.server, Path(self.server.folder) / self.path.lstrip("/")  # type: ignore[attr-defined]
        server.asked.append((self.path, self.headers["Range"]))  # type: ignore[attr-defined]
        if not file.is_file():
            return self.send_error(404)
        content, begin = file.read_bytes(), 0
        if self.headers["Range"] and self.headers["If-Range"] == '"v1"':
            begin = int(re.findall(r"\d+", self.headers["Range"])[0])
            if begin == len(content):
                return self.send_error(416)
        self.send_response(206 if begin else 200)
        self.send_header("ETag", '"v1"')
        self.send_header("Content-Length", str(len(content) - begin))
        self.end_headers()
        self.wfile.write(content[begin:][: server.most])  # type: ignore[attr-defined]
        return None

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    made = Server(("127.0.0.1", 0), Handler)
    made.folder, made.asked = tmp_path / "www", []  # type: ignore[attr-defined]
    (tmp_path / "www").mkdir()
    thread = threading.Thread(target=made.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield made
    made.shutdown()
    thread.join()
    made.server_close()


def test_a_file_of_the_web_that_was_lost_is_read_on(server: Server, tmp_path: Path) -> None:
    text = "".join(f"line {i} of a text\n" for i in range(9000))
    (tmp_path / "www" / "input.txt").write_text(text)
    url, out = f"http://127.0.0.1:{server.server_address[1]}", tmp_path / "out"
    server.most = 50_000
    one = todo(f"{url}/input.txt", out, tokenizer="char")
    with pytest.raises(SourceLost, match=r"input\.txt: the connection was lost after 50,000 of .* bytes; once it can"):
        data.prepare(one)
    server.most = 1 << 40
    data.prepare(one)
    assert [asked[1] for asked in server.asked] == [None, "bytes=50000-"]
    made = data.open(out)
    assert made.tokenizer.decode(made.train.tokens) + made.tokenizer.decode(made.val.tokens) == text
    assert made.manifest["source"] == [{"path": f"{url}/input.txt"}]
    assert sorted(p.name for p in out.iterdir()) == ["manifest.json", "tokenizer.json", "train.bin", "val.bin"]


def test_records_of_the_web_and_what_is_not_there(server: Server, tmp_path: Path) -> None:
    jsonl(tmp_path / "www" / "rows.jsonl", [{"text": f"row {i}"} for i in range(30)])
    url = f"http://127.0.0.1:{server.server_address[1]}"
    data.prepare(todo(f"{url}/rows.jsonl", tmp_path / "out"))
    assert sorted(texts_of(tmp_path / "out")) == sorted(f"row {i}" for i in range(30))
    with pytest.raises(SourceLost, match=r"none\.jsonl: Not Found; once"):
        data.prepare(todo(f"{url}/none.jsonl", tmp_path / "none"))
    with pytest.raises(DataError, match=r"x\.zip: cannot read \.zip; known: \.txt"):
        data.prepare(todo(f"{url}/x.zip", tmp_path / "zip"))


def test_all_of_a_file_was_read_before_the_end(server: Server, tmp_path: Path) -> None:
    file, url = tmp_path / "www" / "x.txt", f"http://127.0.0.1:{server.server_address[1]}/x.txt"
    file.write_text("all of it")
    read = streams.download(url, tmp_path / "in")
    read.rename(read.with_suffix(".txt.part"))
    assert streams.download(url, tmp_path / "in").read_text() == "all of it"
    assert [asked[1] for asked in server.asked] == [None, "bytes=9-", None]


def test_two_addresses_that_end_in_one_name(server: Server, tmp_path: Path) -> None:
    url = f"http://127.0.0.1:{server.server_address[1]}"
    for name in "ab":
        (tmp_path / "www" / name).mkdir()
        jsonl(tmp_path / "www" / name / "rows.jsonl", [{"text": f"{name}{i}"} for i in range(20)])
    data.prepare(Preparation((f"{url}/a/rows.jsonl", f"{url}/b/rows.jsonl"), tmp_path / "out", "byte"))
    assert sorted(texts_of(tmp_path / "out")) == sorted(f"{name}{i}" for name in "ab" for i in range(20))


@pytest.mark.parametrize("address", ["localhost:port/x.txt", "127.0.0.1:9/a b.txt", "127.0.0.1:9/x.txt"])
def test_a_wrong_address_is_one_line_and_leaves_nothing(address: str, tmp_path: Path) -> None:
    with pytest.raises(SourceLost, match=rf"http://{address}: .*; once it can be read"):
        data.prepare(todo(f"http://{address}", tmp_path / "out"))
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match=r"http://\[::1/x.txt is no address: Invalid IPv6 URL"):
        data.prepare(todo("http://[::1/x.txt", tmp_path / "out"))


# Cleaning


def corpus() -> list[str]:
    """Documents with what the steps look for."""
    base = [" ".join(random.Random(i).choices([f"word{j}" for j in range(999)], k=60)) for i in range(60)]
    return [*base, *base[:10], base[3] + " more", base[4] + ", mail a@b.org", "short"]


def test_what_steps_did_is_in_the_manifest(tmp_path: Path) -> None:
    pytest.importorskip("datasketch")
    file = jsonl(tmp_path / "a.jsonl", [{"text": t} for t in corpus()])
    wanted = Wanted(clean=("exact", "pii", "minhash"))
    made = data.prepare(todo(file, tmp_path / "out", wanted=wanted))
    assert made["cleaned"]["train"] == {
        "exact": {"seen": 73, "removed": 10, "reasons": {"seen before": 10}},
        "pii": {"seen": 63, "changed": 1, "masked": 1},
        "minhash": {"seen": 63, "removed": 2, "reasons": {"nearly seen before": 2}},
    }
    assert sum(split["documents"] for split in made["splits"].values()) == 61
    assert made["settings"]["clean"] == ["exact", "pii", "minhash"]
    more = data.prepare(todo(file, tmp_path / "more", wanted=Wanted(documents=10**30)))
    assert sum(split["documents"] for split in more["splits"].values()) == 73


def test_left_in_order(tmp_path: Path) -> None:
    texts = corpus()
    file = jsonl(tmp_path / "a.jsonl", [{"text": t} for t in texts])
    other = jsonl(tmp_path / "b.jsonl", [{"text": "something else"}])
    data.prepare(todo(file, tmp_path / "out", val=(str(other),), wanted=Wanted(clean=("exact", "pii"))))
    kept = [t.replace("a@b.org", "[EMAIL]") for t in dict.fromkeys(texts)]
    assert texts_of(tmp_path / "out") == [*kept, "something else"]
    file = jsonl(
        tmp_path / "c.jsonl", [{"prompt": "Write to a@b.org", "completion": "Yes."}, {"prompt": "x", "completion": "y"}]
    )
    data.prepare(todo(file, tmp_path / "chat", val_fraction=0.5, wanted=Wanted(clean=("pii",))))
    assert any("user\nWrite to [EMAIL]<|im_end|>" in text for text in texts_of(tmp_path / "chat"))


@pytest.mark.slow
def test_the_number_of_workers_changes_nothing(tmp_path: Path) -> None:
    file = jsonl(tmp_path / "a.jsonl", [{"text": t} for t in corpus() * 3])
    pytest.importorskip("datasketch")
    wanted = Wanted(clean=("exact", "minhash=0.7", "pii", "language=en"))
    made = [data.prepare(todo(file, tmp_path / str(n), wanted=wanted._replace(workers=n))) for n in (1, 2)]
    assert made[0]["splits"] == made[1]["splits"]
    assert made[0]["cleaned"] == made[1]["cleaned"]
    assert data.prepare(todo(file, tmp_path / "1", wanted=wanted._replace(workers=3))) == made[0]  # done already


@pytest.mark.slow
def test_a_worker_that_is_killed_is_one_line_and_the_same_command_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fnlm.data.encode.DOCUMENTS", 20)
    file = jsonl(tmp_path / "a.jsonl", [{"text": t} for t in corpus()])
    one = todo(file, tmp_path / "out", wanted=Wanted(clean=("pii",), workers=2))

    def kill(done: int, total: int) -> None:
        for child in multiprocessing.active_children():
            child.kill()

    with pytest.raises(cleaning.WorkerLost, match="was ended from outside; the same command goes on, with fewer"):
        data.prepare(one, progress=kill)
    assert len((tmp_path / ".out.partial" / "documents.train.jsonl").read_text().splitlines()) == 20
    one = replace(one, wanted=one.wanted._replace(workers=1))
    assert data.prepare(one)["splits"] == data.prepare(replace(one, out=tmp_path / "whole"))["splits"]


@pytest.mark.parametrize(
    ("clean", "says"),
    [
        ("exat", "there is no cleaning step 'exat'; did you mean 'exact'"),
        ("language", "which language. write language=en; known: en, de"),
        ("pii=3", "pii takes no value, not '3'"),
        ("exact,exact", "named twice in exact,exact"),
        ("minhash=2", "minhash=2 is no similarity; write minhash=0.8"),
        ("gopher", r"cleaning left none of 3 documents \(removed: gopher 3\)"),
    ],
)
def test_what_is_refused(clean: str, says: str, tmp_path: Path) -> None:
    file = jsonl(tmp_path / "a.jsonl", [{"text": t} for t in "abc"])
    with pytest.raises(ValueError, match=says):
        data.prepare(todo(file, tmp_path / "out", wanted=Wanted(clean=tuple(clean.split(",")))))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.jsonl"]


# Going on, one at a time


def test_an_interrupted_encoding_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = jsonl(tmp_path / "a.jsonl", [{"text": f"{i} " * 40} for i in range(300)])
    talk = jsonl(tmp_path / "b.jsonl", [{"prompt": f"{i}", "completion": f"{i} " * 40} for i in range(300)])
    scope = data.prepare.__globals__
    for number, (path, npy) in enumerate(((file, False), (file, True), (talk, False))):
        one = todo(path, tmp_path / f"out{number}", npy=npy)
        whole = data.prepare(replace(one, out=tmp_path / f"whole{number}"))
        monkeypatch.setattr("fnlm.data.encode.DOCUMENTS", 20)
        monkeypatch.setitem(scope, "SECONDS", 0.0)
        calls: list[int] = []

        def interrupt(done: int, total: int, calls: list[int] = calls) -> None:
            calls.append(done)
            if len(calls) == 7:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            data.prepare(one, progress=interrupt)
        stage = tmp_path / f".out{number}.partial"
        with (stage / f"train.{'npy' if npy else 'bin'}").open("ab") as torn:
            torn.write(b"what was not noted")
        encoded: list[int] = []
        assert data.prepare(one, progress=lambda done, total, e=encoded: e.append(done))["splits"] == whole["splits"]
        assert encoded[0] > calls[4]  # not from the beginning
        monkeypatch.undo()


def test_two_at_once_into_one_folder_are_refused(tmp_path: Path) -> None:
    file = jsonl(tmp_path / "a.jsonl", [{"text": f"text {i}"} for i in range(20)])
    one = todo(file, tmp_path / "out")

    def second(done: int, total: int) -> None:
        with pytest.raises(
            ValueError, match=r"^another process prepares .*out; let it end, or choose another --out$"
        ) as no:
            data.prepare(one)
        assert no.value.exit_code == 1

    data.prepare(one, progress=second)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.jsonl", "out"]


def test_a_lock_that_was_removed_meanwhile_holds_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import fcntl

    lock, flock = tmp_path / ".out.lock", fcntl.flock
    monkeypatch.setattr(fcntl, "flock", lambda *how: (lock.unlink(), flock(*how)))
    with pytest.raises(Busy, match="another process prepares"), staging.held(tmp_path / "out"):
        pass


# Documents and splits


@pytest.mark.parametrize("fraction", [0.1, 0.25])
def test_a_long_document_is_cut(fraction: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fnlm.data.encode.LONG", 1000)
    monkeypatch.setattr("fnlm.data.sources.PIECE", 64)
    long = "".join(f"{i} né " for i in range(2000))
    rows = [{"text": f"short {i}"} for i in range(30)]
    file = jsonl(tmp_path / "a.jsonl", [*rows, {"text": long}, *rows[:1]])
    said: list[str] = []
    data.prepare(todo(file, tmp_path / "out", val_fraction=fraction), said.append)
    size = len(long.encode())
    assert said[-1] == f"document 31 has {size:,} bytes: its last {100 * fraction:g} % are to validate with"
    made = data.open(tmp_path / "out")
    train, val = (made.tokenizer.decode(split.tokens) for split in (made.train, made.val))
    ends = [next(t for t in text.split(EOT) if "né" in t) for text in (train, val)]
    assert "".join(ends) == long  # nothing twice, nothing lost
    assert abs(len(ends[1].encode()) - fraction * size) < 4
    short = [t for text in (train, val) for t in text.split(EOT) if t.startswith("short")]
    assert sorted(short) == sorted([*(f"short {i}" for i in range(30)), "short 0"])
    list(data.verify(tmp_path / "out"))


def test_a_folder_that_lost_a_file_is_not_prepared_already(tmp_path: Path) -> None:
    one = todo(jsonl(tmp_path / "a.jsonl", [{"text": f"a {i}"} for i in range(9)]), tmp_path / "out")
    made = data.prepare(one)
    (tmp_path / "out" / "train.bin").unlink()
    with pytest.raises(ValueError, match=r"already holds other data; .* --force to replace it"):
        data.prepare(one)
    assert data.prepare(one, force=True)["splits"] == made["splits"]


def test_another_tokenizer_by_the_same_path_is_other_data(tmp_path: Path) -> None:
    file, named = jsonl(tmp_path / "a.jsonl", [{"text": f"a {i}"} for i in range(9)]), tmp_path / "named"
    data.prepare(todo(file, named, tokenizer="byte"))
    data.prepare(todo(file, tmp_path / "out", tokenizer=str(named)))
    said: list[str] = []
    data.prepare(todo(file, tmp_path / "out", tokenizer=str(named)), said.append)
    assert said == [f"{tmp_path / 'out'} is already prepared from these files"]
    data.prepare(todo(file, named, tokenizer="char"), force=True)
    with pytest.raises(ValueError, match="already holds other data"):
        data.prepare(todo(file, tmp_path / "out", tokenizer=str(named)))


def test_the_same_files_with_val_are_other_data(tmp_path: Path) -> None:
    a, b = (jsonl(tmp_path / f"{n}.jsonl", [{"text": f"{n}{i}"} for i in range(9)]) for n in "ab")
    data.prepare(Preparation((str(a), str(b)), tmp_path / "out", "byte"))
    apart = todo(a, tmp_path / "out", val=(str(b),), val_fraction=None)
    with pytest.raises(ValueError, match="already holds other data"):
        data.prepare(apart)
    made = data.prepare(apart, force=True)
    assert made["splits"]["val"]["documents"] == 9
    assert [one.get("split") for one in made["source"]] == [None, "val"]


def test_what_is_validated_on_is_left_out_of_train(tmp_path: Path) -> None:
    file = jsonl(tmp_path / "a.jsonl", [{"text": t} for t in ("one", "two", "three", "two", "four")])
    val = jsonl(tmp_path / "b.jsonl", [{"text": t} for t in ("two", "three", "two", "five")])
    said: list[str] = []
    made = data.prepare(todo(file, tmp_path / "out", val=(str(val),)), said.append)
    assert texts_of(tmp_path / "out") == ["one", "four", "two", "three", "two", "five"]
    assert "3 validation documents repeat in train: 3 copies left out there" in said
    assert made["repeated"] == {"validation": 3, "train": 3}


@pytest.mark.slow
def test_dailydialogs_validation_repeats_in_train(test_data: Path, tmp_path: Path) -> None:
    train, val = (str(test_data / "dialog" / f"dailydialog-{name}.txt") for name in ("train", "validation"))
    said: list[str] = []
    made = data.prepare(Preparation((train,), tmp_path / "out", "byte", val=(val,)), said.append)
    assert "69 validation conversations repeat in train: 71 copies left out there" in said
    assert (made["splits"]["train"]["documents"], made["splits"]["val"]["documents"]) == (11118 - 71, 1000)


def test_the_prefix_of_a_tokenizer_begins_each_document(test_data: Path, tmp_path: Path) -> None:
    from fnlm.interop.vocabulary import from_pieces

    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), "\u2581", "a", "b"]
    (tmp_path / "t").mkdir()
    (tmp_path / "t" / "tokenizer.json").write_text(from_pieces(pieces, [0.0] * len(pieces)))
    file = jsonl(tmp_path / "a.jsonl", [{"text": t} for t in ("a", "ab", "b", "ba")])
    made = data.prepare(todo(file, tmp_path / "out", tokenizer=str(tmp_path / "t")))
    assert made["prefix"] == [1]
    opened = data.open(tmp_path / "out")
    ids = [*opened.train.tokens.tolist(), *opened.val.tokens.tolist()]
    assert ids.count(1) == ids.count(2) == 4
    assert all(b == 1 for a, b in pairwise(ids) if a == 2)
    assert data.boundary(opened) == (None, 1)
    assert data.boundary(data.open(_bytes(file, tmp_path / "bytes"))) == (256, None)
    talk = jsonl(tmp_path / "c.jsonl", [{"prompt": t, "completion": "b"} for t in ("a", "ab", "b", "ba")])
    one = todo(talk, tmp_path / "chat", tokenizer=str(tmp_path / "t"), special=("<|im_start|>", "<|im_end|>"))
    with pytest.raises(DataError, match=r"no <\|endoftext\|>"):
        data.prepare(one)
    data.prepare(replace(one, special=data.chat.CHAT_SPECIAL))
    chat = data.open(tmp_path / "chat")
    assert chat.train.tokens[0] == 1 and chat.train.mask is not None and chat.train.mask[0] == 0
    with pytest.raises(DataError, match="nothing stands between documents"):
        data.boundary(data.open(_bytes(file, tmp_path / "char", "char")))


def _bytes(file: Path, out: Path, tokenizer: str = "byte") -> Path:
    data.prepare(todo(file, out, tokenizer=tokenizer))
    return out
