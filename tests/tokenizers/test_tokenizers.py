"""Every tokenizer: round trips, files, special tokens, streams, and what it refuses."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import tiktoken
import tokenizers as library
from hypothesis import given
from hypothesis import strategies as st

from fnlm import tokenizers
from fnlm.tokenizers import Tokenizer
from fnlm.tokenizers import bpe as bpe_module
from fnlm.tokenizers.byte_level import merges_of, to_text

TEXTS = ["the cat sat on the mat.\nthe end", "naïve café — 東京 🙂👩‍👩‍👧 don't  stop\n\n\tnow 1234", "", " x"]


@pytest.fixture(scope="module")
def bpe() -> Tokenizer:
    return tokenizers.train("bpe", ["the cat sat on the mat. " * 20, "the end"], 270)


@pytest.fixture(scope="module")
def every(bpe: Tokenizer) -> list[Tokenizer]:
    char = tokenizers.train("char", TEXTS, special=["<|endoftext|>"])
    return [char, tokenizers.named("byte"), bpe]


def test_texts_come_back_whole_also_in_a_batch(every: list[Tokenizer]) -> None:
    for t in every:
        assert [t.decode(ids) for ids in t.encode_batch(TEXTS)] == TEXTS
        assert [t.encode(text) for text in TEXTS] == t.encode_batch(TEXTS)
        assert [a.tolist() for a in t.encode_arrays(TEXTS)] == t.encode_batch(TEXTS)
        assert max(i for ids in t.encode_batch(TEXTS) for i in ids) < t.vocab_size


def test_a_special_token_in_a_text_is_text(every: list[Tokenizer]) -> None:
    for t in every[1:]:
        ids = t.encode("a<|endoftext|>b")
        assert t.eot_id is not None
        assert t.eot_id not in ids
        assert t.decode(ids) == "a<|endoftext|>b" == t.decode([*t.encode("a"), t.eot_id, *t.encode("b")])


def test_saved_and_loaded_is_the_same(every: list[Tokenizer], tmp_path: Path) -> None:
    for t in every:
        folder = tmp_path / t.kind
        folder.mkdir()
        file = t.save(folder)
        assert file == folder / "tokenizer.json"
        for again in (tokenizers.load(folder), tokenizers.load(file)):
            assert (again.kind, again.table, again.special) == (t.kind, t.table, t.special)
            assert again.sha256 == t.sha256 == hashlib.sha256(file.read_bytes()).hexdigest()
            assert again.encode_batch(TEXTS) == t.encode_batch(TEXTS)


def test_different_tokenizers_have_different_hashes() -> None:
    hashes = {t.sha256 for t in (tokenizers.named("byte"), tokenizers.named("byte", special=[]))}
    assert len(hashes | {tokenizers.train("char", ["ab"]).sha256, tokenizers.train("char", ["abc"]).sha256}) == 4


def test_characters_are_sorted_and_unknown_ones_named() -> None:
    t = tokenizers.train("char", ["hello", "world"])
    assert t.encode("dehlorw") == list(range(7))
    assert (t.vocab_size, t.eot_id, t.special) == (7, None, {})
    with pytest.raises(ValueError, match=r"'é' \(U\+00E9\) at position 1 is not among the 7"):
        t.encode("hé")


def test_bytes_are_themselves() -> None:
    t = tokenizers.named("byte")
    assert t.encode("Aé") == [65, 0xC3, 0xA9]
    assert (t.vocab_size, t.eot_id) == (259, 256)
    assert t.special == {"<|endoftext|>": 256, "<|im_start|>": 257, "<|im_end|>": 258}
    assert t.decode_bytes([0xC3]) == b"\xc3"
    assert t.decode([0xC3, 65]) == "\ufffdA"


def test_bpe_learns_as_many_tokens_as_asked_and_others_read_its_file(bpe: Tokenizer, tmp_path: Path) -> None:
    assert bpe.vocab_size == 270
    assert bpe.special == {"<|endoftext|>": 0, "<|im_start|>": 1, "<|im_end|>": 2}
    assert len(bpe.encode("the cat")) < 7
    theirs = library.Tokenizer.from_file(str(bpe.save(tmp_path)))
    assert theirs.encode(TEXTS[0]).ids == bpe.encode(TEXTS[0])
    assert theirs.decode(bpe.encode(TEXTS[1])) == TEXTS[1]


def test_long_texts_are_learnt_from_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [" ".join(f"{word}{i % 7}" for i in range(40)) for word in ("one", "two", "three", "vier")]
    whole = tokenizers.train("bpe", texts, 300)
    monkeypatch.setattr("fnlm.tokenizers.bpe.PART", 16)
    for text in (*texts, "a" * 100, "", "a b", " " * 50):
        parts = list(bpe_module._parts(text))
        assert "".join(parts) == text
        assert max(map(len, parts)) <= 16
    assert tokenizers.train("bpe", texts, 300).json == whole.json


def test_training_twice_gives_the_same_bits() -> None:
    texts = [f"some words {i} again and again {i % 7}" for i in range(600)]
    assert tokenizers.train("bpe", texts, 300).sha256 == tokenizers.train("bpe", iter(texts), 300).sha256


def test_special_tokens_can_be_added(every: list[Tokenizer]) -> None:
    for t in every:
        more = tokenizers.extended(t, ["<|endoftext|>", "<|tool|>"])
        assert more.special["<|tool|>"] == t.vocab_size == more.vocab_size - 1
        assert more.encode(TEXTS[0]) == t.encode(TEXTS[0])
        assert more.decode([t.vocab_size]) == "<|tool|>"
        assert tokenizers.extended(t, list(t.special)) is t
        assert tokenizers.loads(more.json).sha256 == more.sha256


@given(st.text(), st.lists(st.integers(0, 258), max_size=30))
def test_a_stream_is_the_decoded_text(text: str, noise: list[int]) -> None:
    t = tokenizers.named("byte")
    for ids in (t.encode(text), noise):
        stream = tokenizers.StreamDecoder(t)
        parts = [stream.push(i) for i in ids]
        assert "".join([*parts, stream.flush()]) == t.decode(ids)
        assert stream.flush() == ""


def test_an_emoji_split_over_tokens_streams_whole(bpe: Tokenizer) -> None:
    stream = tokenizers.StreamDecoder(bpe)
    assert [stream.push(i) for i in bpe.encode("é🙂!")] == ["", "é", "", "", "", "🙂", "!"]
    assert stream.push(bpe.encode("🙂")[0]) == ""
    assert stream.flush() == "\ufffd"
    assert stream.push(bpe.encode("a")[0]) == "a"


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: tokenizers.named("gtp2"), "no tokenizer 'gtp2'; did you mean 'gpt2'"),
        (lambda: tokenizers.named("char"), "made from texts"),
        (lambda: tokenizers.train("bpe", ["x"]), "vocab_size"),
        (lambda: tokenizers.train("bpe", ["x"], 258), "no room for 256 bytes and 3 special"),
        (lambda: tokenizers.train("gpt2", ["x"]), "not trained"),
        (lambda: tokenizers.train("char", [""]), "no text"),
        (lambda: tokenizers.named("byte", special=["a", "a"]), "must be different"),
        (lambda: tokenizers.named("byte").decode([259]), "id 259 is not in the vocabulary of 259"),
        (lambda: tokenizers.named("gpt2", "no/such/folder"), "needs vocab.bpe"),
        (lambda: tokenizers.loads('{"fnlm": 1, "kind": "word"}'), "'word' is neither"),
        (lambda: tokenizers.loads('{"model": {"type": "WordLevel"}}'), "not byte-level"),
        (lambda: tokenizers.loads("{}"), "not the JSON of a tokenizer"),
    ],
)
def test_what_is_refused(call, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        call()


@pytest.mark.parametrize(
    "content", [b"no json", b"\xff", b"[1]", b'{"model": {"type": "BPE"}, "decoder": "ByteLevel"}']
)
def test_a_broken_file_is_named(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"tokenizer\.json"):
        tokenizers.load(tmp_path)
    with pytest.raises(FileNotFoundError):
        tokenizers.load(tmp_path / "missing")


def test_offline_says_what_to_give(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(name: str) -> None:
        raise ConnectionError(name)

    monkeypatch.setattr(tiktoken, "get_encoding", unreachable)
    with pytest.raises(ValueError, match=r"gpt2 needs vocab.bpe .* failed \(ConnectionError\); .* gpt2:FOLDER"):
        tokenizers.named("gpt2")


def test_gpt2_from_its_files(test_data: Path, tmp_path: Path) -> None:
    t = tokenizers.named("gpt2", test_data / "vocab")
    assert (t.kind, t.vocab_size, t.eot_id) == ("gpt2", 50257, 50256)
    assert t.encode("Hello, I'm a language model,") == [15496, 11, 314, 1101, 257, 3303, 2746, 11]
    theirs = library.Tokenizer.from_file(str(t.save(tmp_path)))
    again = tokenizers.load(tmp_path)
    assert (again.kind, again.table, again.sha256) == (t.kind, t.table, t.sha256)
    text = (test_data / "text" / "wikitext2-raw-validation.txt").read_text(encoding="utf-8")[:100_000] + TEXTS[1]
    assert again.encode(text) == t.encode(text) == theirs.encode(text).ids
    assert t.decode(t.encode(text)) == text
    parts = [text[i : i + 700] for i in range(0, len(text), 700)]
    assert t.encode_batch(parts) == [t.encode(part) for part in parts]  # by several threads
    lines = (test_data / "vocab" / "vocab.bpe").read_text(encoding="utf-8").splitlines()[1:]
    ranks = {token: i for i, token in enumerate(t.table[:50256])}
    assert [f"{to_text(a)} {to_text(b)}" for a, b in merges_of(ranks)] == [line for line in lines if line]


def test_gpt2_with_chat_tokens(test_data: Path) -> None:
    t = tokenizers.named("gpt2", test_data / "vocab" / "vocab.bpe", tokenizers.CHAT_SPECIAL)
    assert t.special == {"<|endoftext|>": 50256, "<|im_start|>": 50257, "<|im_end|>": 50258}
    plain = tokenizers.extended(tokenizers.named("gpt2", test_data / "vocab"), tokenizers.CHAT_SPECIAL)
    assert (plain.kind, plain.table, plain.special) == ("gpt2", t.table, t.special)


def test_cl100k_from_its_file(test_data: Path, tmp_path: Path) -> None:
    t = tokenizers.load(test_data / "vocab" / "cl100k_base.tiktoken")
    assert (t.kind, t.vocab_size, t.eot_id) == ("cl100k", 100277, 100257)
    assert t.encode("hello world") == [15339, 1917]
    theirs = library.Tokenizer.from_file(str(t.save(tmp_path)))
    rows = (test_data / "text" / "c4-sample.jsonl").read_text(encoding="utf-8").splitlines()[:40]
    text = "\n\n".join(json.loads(row)["text"] for row in rows) + TEXTS[1]
    assert tokenizers.load(tmp_path).kind == "cl100k"
    assert tokenizers.load(tmp_path).encode(text) == t.encode(text) == theirs.encode(text).ids


def test_incomplete_files_are_refused(test_data: Path, tmp_path: Path) -> None:
    lines = (test_data / "vocab" / "cl100k_base.tiktoken").read_bytes().splitlines(keepends=True)
    (tmp_path / "cl100k_base.tiktoken").write_bytes(b"".join(lines[:-1]))
    (tmp_path / "vocab.bpe").write_bytes((test_data / "vocab" / "vocab.bpe").read_bytes()[:10_000])
    for name in ("cl100k", "gpt2"):
        with pytest.raises(ValueError, match=r"get it anew|is not vocab"):
            tokenizers.named(name, tmp_path)
    (tmp_path / "cl100k_base.tiktoken").write_bytes(b"!!! 0\n")
    with pytest.raises(ValueError, match=r"is not cl100k_base\.tiktoken"):
        tokenizers.named("cl100k", tmp_path)
