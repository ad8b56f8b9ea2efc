"""Preparation: what comes out of every kind of file, splits, all or nothing, and what is refused."""

from __future__ import annotations

import hashlib
import json
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from fnlm import data, tokenizers
from fnlm.data import DataError, Dataset, Preparation, encode, sources

EOT = "<|endoftext|>"


def prepared(path: Path | list[Path], out: Path, **settings) -> Dataset:
    paths = path if isinstance(path, list) else [path]
    said: list[str] = []
    data.prepare(Preparation(tuple(map(str, paths)), out, **{"tokenizer": "byte", **settings}), said.append)
    assert all("\n" not in line for line in said)
    list(data.verify(out))
    return data.open(out)


def texts_of(dataset: Dataset) -> list[str]:
    """The documents of both splits."""
    text = "".join(dataset.tokenizer.decode(split.tokens) for split in (dataset.train, dataset.val))
    return text.removesuffix(EOT).split(EOT)


def write(path: Path, content: str) -> Path:
    path.write_text(content, encoding="utf-8", newline="")
    return path


def jsonl(path: Path, rows: list[dict]) -> Path:
    return write(path, "".join(json.dumps(row) + "\n" for row in rows))


WORDS = ["one fish", "two fish\n", "né fish 🐟", "blue", "a\n\nb", "tail  "]


def test_documents_in_text_files(tmp_path: Path) -> None:
    file = write(tmp_path / "a.txt", f"\n{EOT}\n".join(WORDS))
    dataset = prepared(file, tmp_path / "out", val_fraction=0.3)
    assert sorted(texts_of(dataset)) == sorted(w.rstrip("\n") for w in WORDS)
    assert dataset.train.documents + dataset.val.documents == len(WORDS)
    assert min(dataset.train.documents, dataset.val.documents) >= 1
    size = sum(len(w.rstrip("\n").encode()) for w in WORDS)
    assert dataset.train.bytes + dataset.val.bytes == size
    assert dataset.train.vocab_size == dataset.manifest["vocab_size"] == 259


@pytest.mark.parametrize("suffix", ["jsonl", "json"])
def test_documents_in_records(suffix: str, tmp_path: Path) -> None:
    rows = [{"text": w, "id": i} for i, w in enumerate(WORDS)]
    file = tmp_path / f"a.{suffix}"
    jsonl(file, rows) if suffix == "jsonl" else write(file, json.dumps(rows))
    assert sorted(texts_of(prepared(file, tmp_path / "out"))) == sorted(WORDS)


def test_documents_in_parquet(tmp_path: Path) -> None:
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    parquet.write_table(arrow.table({"text": WORDS, "id": list(range(len(WORDS)))}), tmp_path / "a.parquet")
    assert sorted(texts_of(prepared(tmp_path / "a.parquet", tmp_path / "out"))) == sorted(WORDS)


def test_folders_and_patterns_in_order_and_each_file_once(tmp_path: Path) -> None:
    (tmp_path / "in" / "deep").mkdir(parents=True)
    (tmp_path / "in" / ".hidden").mkdir()
    for i, name in enumerate(["b.txt", "deep/a.md", "c.jsonl", "skipped.py", ".hidden/x.txt"]):
        write(tmp_path / "in" / name, json.dumps({"text": str(i)}) if name.endswith("jsonl") else f"{i}")
    both = [tmp_path / "in", tmp_path / "in" / "*.txt"]
    assert sorted(texts_of(prepared(both, tmp_path / "out"))) == ["0", "1", "2"]
    assert [Path(s["path"]).name for s in data.open(tmp_path / "out").manifest["source"]] == [
        "b.txt",
        "c.jsonl",
        "a.md",
    ]


def test_the_split_does_not_depend_on_the_order_or_the_files(tmp_path: Path) -> None:
    words = [f"document {i}" for i in range(200)]
    one = prepared(jsonl(tmp_path / "a.jsonl", [{"text": w} for w in words]), tmp_path / "one")
    random.Random(0).shuffle(words)
    parts = [jsonl(tmp_path / f"{i}.jsonl", [{"text": w} for w in words[i::3]]) for i in range(3)]
    other = prepared(parts, tmp_path / "other")
    kept = [set(d.tokenizer.decode(d.val.tokens).split(EOT)) for d in (one, other)]
    assert kept[0] == kept[1]
    assert 5 < one.val.documents < 40


def test_a_single_document_is_cut_near_its_end(tmp_path: Path) -> None:
    text = "0123456789" * 9 + "é" * 5
    dataset = prepared(write(tmp_path / "a.txt", text), tmp_path / "out", tokenizer="char", val_fraction=0.05)
    assert dataset.tokenizer.decode(dataset.train.tokens) + dataset.tokenizer.decode(dataset.val.tokens) == text
    assert dataset.tokenizer.decode(dataset.val.tokens) == "ééé"


def test_long_documents_are_encoded_in_pieces_as_if_whole(test_data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (test_data / "text" / "wikitext2-raw-validation.txt").read_text(encoding="utf-8")[:200_000]
    monkeypatch.setattr(sources, "PIECE", 4096)
    for name in ("gpt2", "cl100k"):
        t = tokenizers.named(name, test_data / "vocab")
        for content in (text, text.replace(" \n \n ", "\n"), text.replace("\n", "\n\n\t")):
            parts = list(sources.cut(iter([content[:70_000], content[70_000:]])))
            assert len(parts) > 40
            assert [p.first for p in parts] == [True] + [False] * (len(parts) - 1)
            assert [p.last for p in parts] == [False] * (len(parts) - 1) + [True]
            assert "".join(p.text for p in parts) == content
            assert [i for p in parts for i in t.encode(p.text)] == t.encode(content)


def test_long_records_come_in_pieces_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"text": f"{w} {EOT} {i} " * 9} for i, w in enumerate(WORDS)]
    file = jsonl(tmp_path / "a.jsonl", rows)
    monkeypatch.setattr(sources, "PIECE", 16)
    parts = list(sources.pieces([file]))
    assert max(len(p.text) for p in parts) <= 32
    assert (sum(p.first for p in parts), sum(p.last for p in parts)) == (len(rows), len(rows))
    assert "".join(p.text for p in parts) == "".join(row["text"] for row in rows)
    dataset = prepared(file, tmp_path / "out")
    assert [s.documents for s in (dataset.train, dataset.val)] == [len(rows) - 1, 1]


def test_small_blocks_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write(tmp_path / "a.txt", f"\n{EOT}\n".join(f"{w} {i}é" * 30 for i, w in enumerate(WORDS * 9)))
    whole = prepared(file, tmp_path / "whole")
    for name, value in (("PIECE", 64), ("BLOCK", 7)):
        monkeypatch.setattr(sources, name, value)
    for name, value in (("CHARACTERS", 100), ("DOCUMENTS", 3)):
        monkeypatch.setattr(encode, name, value)
    cut = prepared(file, tmp_path / "cut")
    # A split is decided by a document's first piece, so that long documents may change sides.
    assert sorted(texts_of(cut)) == sorted(texts_of(whole))
    assert cut.train.documents + cut.val.documents == whole.train.documents + whole.val.documents


def test_the_same_files_give_the_same_bits_in_any_format(tmp_path: Path) -> None:
    file = jsonl(tmp_path / "a.jsonl", [{"text": f"{w} {i}"} for i, w in enumerate(WORDS * 20)])
    one, two = (prepared(file, tmp_path / name, tokenizer="bpe:300") for name in ("one", "two"))
    assert one.manifest["splits"] == two.manifest["splits"]
    npy = prepared(file, tmp_path / "npy", tokenizer="bpe:300", npy=True, dtype="uint32")
    assert npy.manifest["splits"]["train"]["file"] == "train.npy"
    assert npy.train.tokens.dtype == np.uint32
    assert np.load(tmp_path / "npy" / "train.npy").tolist() == one.train.tokens.tolist()


def test_the_files_are_nanogpts(tmp_path: Path) -> None:
    dataset = prepared(write(tmp_path / "a.txt", "hello world, hello"), tmp_path / "out", tokenizer="char")
    raw = np.fromfile(tmp_path / "out" / "train.bin", dtype=np.uint16)
    assert dataset.tokenizer.decode(raw) == "hello world, hel"
    entry = dataset.manifest["splits"]["train"]
    assert entry["sha256"] == hashlib.sha256((tmp_path / "out" / "train.bin").read_bytes()).hexdigest()
    assert dataset.manifest["dtype"] == "uint16"
    assert dataset.manifest["eot_id"] is None


def test_validation_files_of_their_own(tmp_path: Path) -> None:
    train, val = write(tmp_path / "t.txt", "train ü"), write(tmp_path / "v.txt", "val ö")
    dataset = prepared(train, tmp_path / "out", val=(str(val),), tokenizer="char")
    assert dataset.tokenizer.decode(dataset.train.tokens) == "train ü"
    assert dataset.tokenizer.decode(dataset.val.tokens) == "val ö"


def test_tokens_of_others(tmp_path: Path) -> None:
    ids = np.array([*b"abc", 256, *b"defghij"])
    ids.astype("<u2").tofile(tmp_path / "train.bin")
    ids[:5].astype("<u2").tofile(tmp_path / "val.bin")
    dataset = prepared([tmp_path / "train.bin", tmp_path / "val.bin"], tmp_path / "nano")
    assert dataset.train.tokens.tolist() == ids.tolist()
    assert dataset.val.tokens.tolist() == ids[:5].tolist()
    assert (dataset.train.documents, dataset.train.bytes) == (2, 10)
    np.save(tmp_path / "x.npy", ids)
    dataset = prepared(tmp_path / "x.npy", tmp_path / "npy", val_fraction=0.3)
    assert [dataset.train.tokens.tolist(), dataset.val.tokens.tolist()] == [ids[:7].tolist(), ids[7:].tolist()]


def test_raw_tokens_of_a_large_vocabulary_are_uint32(tmp_path: Path) -> None:
    large = str(tokenizers.named("byte", special=[f"<{i}>" for i in range(100_000)]).save(tmp_path / "large.json"))
    ids = np.array([1, 70000, 5, 99999] * 20)
    ids.astype("<u4").tofile(tmp_path / "a.bin")
    dataset = prepared(tmp_path / "a.bin", tmp_path / "out", tokenizer=large)
    assert np.concatenate([dataset.train.tokens, dataset.val.tokens]).tolist() == ids.tolist()
    again = prepared(tmp_path / "out", tmp_path / "again", tokenizer=large)
    assert again.train.tokens.tolist() == dataset.train.tokens.tolist()
    (ids % 100).astype("<u4").tofile(tmp_path / "b.bin")
    with pytest.raises(DataError, match="looks like uint32, not uint16"):
        prepared(tmp_path / "b.bin", tmp_path / "small")


def test_tokens_of_ours_keep_their_tokenizer(tmp_path: Path) -> None:
    file = jsonl(tmp_path / "a.jsonl", [{"text": w} for w in WORDS])
    prepared(file, tmp_path / "first", tokenizer="char")
    with pytest.raises(DataError, match=r"was made with another tokenizer; give --tokenizer .*first"):
        prepared(tmp_path / "first", tmp_path / "second")
    again = prepared(tmp_path / "first", tmp_path / "second", tokenizer=str(tmp_path / "first"))
    assert sorted(texts_of(again)) == sorted(texts_of(data.open(tmp_path / "first")))
    talk = jsonl(tmp_path / "talk.jsonl", [{"prompt": w, "completion": w} for w in WORDS])
    prepared(talk, tmp_path / "chat")
    with pytest.raises(DataError, match="has a mask of what is learnt"):
        prepared(tmp_path / "chat", tmp_path / "third")
    write(tmp_path / "first" / "manifest.json", '{"of": "another program"}')
    assert prepared(tmp_path / "first", tmp_path / "fourth", tokenizer=str(tmp_path / "first")).train.documents


@pytest.mark.parametrize(("magic", "version", "dtype"), [(20240520, 1, "<u2"), (20240801, 7, "<u4")])
def test_llm_c_files(magic: int, version: int, dtype: str, tmp_path: Path) -> None:
    header = np.zeros(256, "<i4")
    header[:3] = magic, version, 100
    (tmp_path / "in").mkdir()
    for name in ("text_train_000000.bin", "text_val_000000.bin"):
        (tmp_path / "in" / name).write_bytes(header.tobytes() + np.arange(100).astype(dtype).tobytes())
    dataset = prepared(tmp_path / "in", tmp_path / "out")
    assert dataset.train.tokens.tolist() == dataset.val.tokens.tolist() == list(range(100))
    header[1] = 3
    (tmp_path / "in" / "text_train_000000.bin").write_bytes(header.tobytes() + bytes(400))
    with pytest.raises(DataError, match="version 3"):
        prepared(tmp_path / "in", tmp_path / "other")


def test_shakespeare_is_nanogpts(test_data: Path, tmp_path: Path) -> None:
    file = test_data / "text" / "tinyshakespeare.txt"
    dataset = prepared(file, tmp_path / "out", tokenizer="char")
    assert (len(dataset.train.tokens), len(dataset.val.tokens), dataset.tokenizer.vocab_size) == (1003854, 111540, 65)
    gpt2 = prepared(file, tmp_path / "gpt2", tokenizer=f"gpt2:{test_data / 'vocab'}")
    assert (len(gpt2.train.tokens), len(gpt2.val.tokens)) == (301966, 36059 + 1)  # and <|endoftext|>


def test_real_stories_and_web_pages(test_data: Path, tmp_path: Path) -> None:
    text = test_data / "text"
    stories = prepared(text / "tinystories-sample.txt", tmp_path / "s", tokenizer=f"cl100k:{test_data / 'vocab'}")
    assert (stories.manifest["dtype"], stories.train.documents + stories.val.documents) == ("uint32", 3117)
    pages = prepared(text / "c4-sample.jsonl", tmp_path / "c")
    rows = [json.loads(line)["text"] for line in (text / "c4-sample.jsonl").read_text(encoding="utf-8").splitlines()]
    assert sorted(texts_of(pages)) == sorted(rows)


# All or nothing


def test_a_torn_preparation_is_gone_on_with_and_says_so(tmp_path: Path) -> None:
    file = jsonl(tmp_path / "a.jsonl", [{"text": w} for w in WORDS])
    program = (
        "import os, sys\nfrom fnlm import data\nfrom fnlm.data.sink import Sink\n"
        "Sink.close = lambda self: os._exit(9)\n"
        f"data.prepare(data.Preparation(({str(file)!r},), {tmp_path / 'out'!r}, 'byte'))"
    ).replace("PosixPath", "__import__('pathlib').Path")
    assert subprocess.run([sys.executable, "-c", program], timeout=60).returncode == 9
    assert not (tmp_path / "out").exists()
    assert (tmp_path / ".out.partial" / "train.bin").exists()
    said: list[str] = []
    todo = Preparation((str(file),), tmp_path / "out", "byte")
    data.prepare(todo, said.append)
    assert said[0] == f"an earlier preparation of {tmp_path / 'out'} was interrupted; going on with it"
    assert sorted(texts_of(data.open(tmp_path / "out"))) == sorted(WORDS)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.jsonl", "out"]


def test_the_same_twice_is_left_alone_and_other_data_are_kept(tmp_path: Path) -> None:
    file = jsonl(tmp_path / "a.jsonl", [{"text": w} for w in WORDS])
    todo, said = Preparation((str(file),), tmp_path / "out", "byte"), []
    first = data.prepare(todo)
    assert data.prepare(todo, said.append) == first
    assert said == [f"{tmp_path / 'out'} is already prepared from these files"]
    other = Preparation((str(file),), tmp_path / "out", "char")
    with pytest.raises(ValueError, match=r"already holds other data; .* --force"):
        data.prepare(other)
    assert data.prepare(other, force=True)["tokenizer"]["kind"] == "char"
    assert [p.name for p in sorted(tmp_path.iterdir())] == ["a.jsonl", "out"]
    (tmp_path / "mine").mkdir()
    write(tmp_path / "mine" / "thesis.txt", "x")
    for force in (False, True):
        with pytest.raises(ValueError, match=r"already holds something else, 'thesis\.txt'; choose another --out$"):
            data.prepare(Preparation((str(file),), tmp_path / "mine", "byte"), force=force)
        with pytest.raises(ValueError, match=r"a\.jsonl is a file; choose another --out$"):
            data.prepare(Preparation((str(file),), file, "byte"), force=force)
    assert file.is_file()
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "x"


def test_a_failure_leaves_nothing_behind(tmp_path: Path) -> None:
    file = jsonl(tmp_path / "a.jsonl", [{"text": w} for w in WORDS])
    with pytest.raises(ValueError, match="not among"):
        prepared(file, tmp_path / "out", tokenizer=str(tokenizers.train("char", ["abc"]).save(tmp_path)))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.jsonl", "tokenizer.json"]


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda f: (f / "train.bin").write_bytes((f / "train.bin").read_bytes()[:-2]), "manifest.json says"),
        (lambda f: (f / "train.bin").write_bytes((f / "train.bin").read_bytes()[:-1]), "manifest.json says"),
        (lambda f: (f / "val.bin").write_bytes(bytes((f / "val.bin").stat().st_size)), "was changed"),
        (lambda f: (f / "val.bin").unlink(), "is missing"),
        (lambda f: tokenizers.named("byte", special=["x"]).save(f), "not the tokenizer of these tokens"),
        (lambda f: (f / "manifest.json").write_text("{"), "is not a manifest"),
        (lambda f: (f / "manifest.json").write_text('{"format": 7}'), "has format 7"),
        (lambda f: (f / "manifest.json").unlink(), "has no manifest.json"),
        (lambda f: (f / "manifest.json").write_text('{"format": 1}'), "is damaged .KeyError"),
        (lambda f: (f / "tokenizer.json").unlink(), "tokenizer.json is missing"),
        (lambda f: (f / "tokenizer.json").write_text("{"), "is not a tokenizer.json"),
    ],
)
def test_damage_is_found(damage, says: str, tmp_path: Path) -> None:
    prepared(jsonl(tmp_path / "a.jsonl", [{"text": w} for w in WORDS]), tmp_path / "out")
    damage(tmp_path / "out")
    with pytest.raises(DataError, match=says):
        list(data.verify(tmp_path / "out"))


def test_data_of_another_tokenizer_are_refused(tmp_path: Path) -> None:
    file = jsonl(tmp_path / "a.jsonl", [{"text": w} for w in WORDS])
    base, other = prepared(file, tmp_path / "base"), prepared(file, tmp_path / "other", tokenizer="char")
    same = prepared(file, tmp_path / "same", tokenizer=str(tmp_path / "base"))
    data.require_same_tokenizer(same, base.tokenizer.sha256, "runs/base")
    with pytest.raises(DataError, match=r"other was made with another tokenizer than runs/base \(sha256 .*\); ") as no:
        data.require_same_tokenizer(other, base.tokenizer.sha256, "runs/base")
    assert "\n" not in str(no.value)
    assert no.value.exit_code == 4


# What is refused


def test_bytes_that_are_not_utf8_are_placed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "BLOCK", 8)
    (tmp_path / "a.txt").write_bytes("0123456é89".encode() + b"\xff more")
    with pytest.raises(DataError, match=r"a\.txt: byte 11 is not UTF-8 \(invalid start byte\)"):
        prepared(tmp_path / "a.txt", tmp_path / "out")
    (tmp_path / "b.txt").write_bytes(b"0123456" + "é".encode()[:1])
    with pytest.raises(DataError, match=r"b\.txt: byte 7 is not UTF-8 \(unexpected end"):
        prepared(tmp_path / "b.txt", tmp_path / "out")
    (tmp_path / "c.jsonl").write_bytes(b'{"text": "x"}\n{"text": "\xff"}\n')
    with pytest.raises(DataError, match=r"c\.jsonl: byte 24 \(line 2\) is not UTF-8"):
        prepared(tmp_path / "c.jsonl", tmp_path / "out")


@pytest.mark.parametrize(
    ("name", "content", "settings", "says"),
    [
        ("a.txt", "", {}, r"a\.txt is empty"),
        ("a.jsonl", "\n", {}, "no text"),
        ("a.csv", "x", {}, r"cannot read \.csv; known: \.txt"),
        ("a.jsonl", '{"text": 1}', {}, "line 1 has no 'text' that is a string"),
        ("a.jsonl", '{"body": "x"}', {}, "has no 'text' that is a string; it has body"),
        ("a.jsonl", '{"text": "x"}\n{"text"', {}, "line 2 is not JSON"),
        ("a.jsonl", "[1]", {}, "line 1 is not an object but list"),
        ("a.json", "{}", {}, "is not a list of objects"),
        ("a.jsonl", '{"text": "same"}\n' * 3, {}, "all 3 documents are the same"),
        ("a.txt", "x", {}, "the train split is empty"),
        ("a.txt", "xyz", {"tokenizer": "bpe"}, r"bpe: has no size; write bpe:16000"),
        ("a.txt", "xyz", {"tokenizer": "bite"}, "did you mean 'byte'"),
        ("a.txt", "xyz", {"val_fraction": 1.5}, "val_fraction=1.5 must be between 0 and 1"),
        ("a.bin", "xyz", {}, "3 bytes, which is not a whole number"),
        ("a.bin", "\x00\x70", {}, "id 28672 is not in the tokenizer's 259"),
        ("a.npy", "xyz", {}, r"is not a plain \.npy array"),
        ("a.bin", "abcd", {"tokenizer": "char"}, "tokens have a tokenizer already"),
        ("a.parquet", "PAR1", {}, r"pyarrow|[Pp]arquet"),
    ],
)
def test_what_is_refused(name: str, content: str, settings: dict, says: str, tmp_path: Path) -> None:
    write(tmp_path / name, content)
    with pytest.raises(ValueError, match=says) as caught:
        prepared(tmp_path / name, tmp_path / "out", **settings)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / ".out.partial").exists()


def test_a_vocabulary_that_does_not_fit_is_refused(test_data: Path, tmp_path: Path) -> None:
    file, name = write(tmp_path / "a.txt", "some text"), f"cl100k:{test_data / 'vocab'}"
    with pytest.raises(DataError, match="100277 does not fit into uint16"):
        prepared(file, tmp_path / "out", tokenizer=name, dtype="uint16")


def test_missing_files_and_empty_folders(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        prepared(tmp_path / "none.txt", tmp_path / "out")
    with pytest.raises(FileNotFoundError):
        prepared(tmp_path / "*.txt", tmp_path / "out")
    with pytest.raises(DataError, match="has no file that ends in"):
        prepared(tmp_path, tmp_path / "out")
    with pytest.raises(DataError, match="does not exist; make it with 'fnlm prepare"):
        data.open(tmp_path / "none")


def test_half_a_surrogate_pair_is_no_character(tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", '{"text": "a\\ud83d"}\n{"text": "\\ud83d\\ude42"}\n')
    assert sorted(texts_of(prepared(file, tmp_path / "out"))) == ["a\ufffd", "🙂"]
