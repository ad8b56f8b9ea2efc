"""Data by name: the demo's stories and chats, whole words as tokens, the same each time."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from fnlm import data, world
from fnlm.data import Dataset

EOT = "<|endoftext|>"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> list[Dataset]:
    return prepared(tmp_path_factory.mktemp("a") / "demo", 300)


def prepared(out: Path, documents: int, **settings: object) -> list[Dataset]:
    todo = data.named("demo", out, documents, **settings)
    for one in todo:
        done: list[tuple[int, int]] = []
        data.prepare(one, progress=lambda *at, done=done: done.append(at))
        assert done[-1][0] == done[-1][1] > 0
        assert [*data.verify(one.out)]
    return [data.open(one.out) for one in todo]


def test_stories_and_chats_are_those_of_the_world(made: list[Dataset]) -> None:
    stories, chats = made
    assert chats.folder.name == "demo-chat"
    assert [d.manifest["kind"] for d in made] == ["text", "chat"]
    for split, seed, n in ((stories.train, 0, 300), (stories.val, 1, 30)):
        assert stories.tokenizer.decode(split.tokens).split(EOT)[:-1] == list(world.stories(seed, n))
        assert split.documents == n
    for split, seed, n in ((chats.train, 0, 150), (chats.val, 1, 15)):
        ids = [i for part, _ in data.render(chats.tokenizer, list(world.chats(seed, n))) for i in part.tolist()]
        assert split.tokens.tolist() == ids
        assert split.documents == n
    assert stories.manifest["source"][0] == {"path": "fnlm.world stories seed=0 n=300"}
    assert chats.manifest["source"][1] == {"path": "fnlm.world chats seed=1 n=15"}


def test_every_word_is_one_token(made: list[Dataset]) -> None:
    tokenizer = made[0].tokenizer
    assert tokenizer.sha256 == made[1].tokenizer.sha256
    assert tokenizer.vocab_size == 657
    said = (m["content"] for chat in world.chats(5, 3000) for m in chat)
    for text in (*world.stories(5, 1000), *said, "user\n", "assistant\n"):
        words = re.findall(r" ?\w+| ?[^\w\s]|\n", text)
        assert len(tokenizer.encode(text)) <= len(words), text


def test_the_same_bytes_each_time(made: list[Dataset], tmp_path: Path) -> None:
    for one, other in zip(made, prepared(tmp_path / "demo", 300), strict=True):
        assert one.manifest["splits"] == other.manifest["splits"]
        assert one.tokenizer.sha256 == other.tokenizer.sha256


def test_again(made: list[Dataset]) -> None:
    said: list[str] = []
    for one in data.named("demo", made[0].folder, 300):
        data.prepare(one, said.append)
    assert [line.partition(" is already prepared from ")[2] for line in said] == ["this", "this"]
    with pytest.raises(ValueError, match="already holds other data"):
        data.prepare(data.named("demo", made[0].folder, 301)[0])


def test_other_tokenizers(tmp_path: Path) -> None:
    stories, chats = prepared(tmp_path / "demo", 40, tokenizer="byte", npy=True)
    assert stories.tokenizer.kind == chats.tokenizer.kind == "byte"
    assert (tmp_path / "demo-chat" / "train.npy").is_file()


def test_what_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no data called 'dmeo'; known: demo"):
        data.named("dmeo", tmp_path)
    with pytest.raises(ValueError, match="documents=0 must be at least 1"):
        data.named("demo", tmp_path, 0)
