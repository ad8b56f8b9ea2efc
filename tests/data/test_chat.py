"""Conversations: the golden tokens and mask of ChatML, every form of input, splits, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

import fnlm
from fnlm import data, tokenizers
from fnlm.data import DataError, Preparation
from fnlm.data.chat import conversations

TALK = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": "Hi <|im_end|>"},
    {"role": "assistant", "content": "Hello é"},
    {"role": "user", "content": "Bye"},
    {"role": "assistant", "content": ""},
]


def jsonl(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_golden_tokens_and_mask() -> None:
    t = tokenizers.named("byte")
    ((ids, mask),) = data.render(t, [TALK])
    assert t.decode(ids) == (
        "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nHi <|im_end|><|im_end|>\n"
        "<|im_start|>assistant\nHello é<|im_end|>\n<|im_start|>user\nBye<|im_end|>\n"
        "<|im_start|>assistant\n<|im_end|>\n<|endoftext|>"
    )
    learnt = [t.decode([i]) if i > 255 else chr(i) for i, m in zip(ids.tolist(), mask.tolist(), strict=True) if m]
    assert "".join(learnt) == "Hello \u00c3\u00a9<|im_end|><|im_end|>"
    assert [int(i) for i in ids].count(t.special["<|im_end|>"]) == len(TALK)  # what a user types stays text
    first = ids.tolist().index(ord("H"), ids.tolist().index(t.special["<|im_end|>"]) + 30)
    assert mask[first] == 1
    assert mask[first - 1] == 0


def test_a_prompt_is_the_beginning_of_training() -> None:
    t = tokenizers.train("bpe", ["assistant user hello there how are you " * 9], 300)
    ((ids, mask),) = data.render(t, [TALK[:3]])
    prompt = data.prompt(t, TALK[:2])
    assert ids[: len(prompt)].tolist() == prompt
    assert mask[: len(prompt)].sum() == 0
    assert mask[len(prompt)] == 1


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
        {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
        {"instruction": "a", "input": "", "output": "b"},
        {"instruction": "a", "output": "b"},
        {"prompt": "a", "completion": "b"},
    ],
)
def test_every_form_is_the_same_conversation(row: dict, tmp_path: Path) -> None:
    read = list(conversations([jsonl(tmp_path / "a.jsonl", [row])]))
    assert read == [[{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]]


def test_alpacas_input_follows_the_instruction(tmp_path: Path) -> None:
    file = jsonl(tmp_path / "a.jsonl", [{"instruction": "Add.", "input": "1 2", "output": "3"}])
    assert next(conversations([file]))[0]["content"] == "Add.\n\n1 2"


def test_lines_with_turns(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("Hi . __eou__ Ho ! __eou__ Hm __eou__\n\nA __eou__ B __eou__", encoding="utf-8")
    read = list(conversations([tmp_path / "a.txt"]))
    assert [[m["content"] for m in c] for c in read] == [["Hi .", "Ho !", "Hm"], ["A", "B"]]
    assert [m["role"] for m in read[0]] == ["user", "assistant", "user"]


def rows(n: int) -> list[dict]:
    return [{"prompt": f"question {i}", "completion": f"answer {i}"} for i in range(n)]


def test_masks_become_weights(tmp_path: Path) -> None:
    file = jsonl(tmp_path / "a.jsonl", rows(50))
    data.prepare(Preparation((str(file),), tmp_path / "out", "byte"))
    assert len(list(data.verify(tmp_path / "out"))) == 5
    chat = data.open(tmp_path / "out")
    assert chat.manifest["kind"] == "chat"
    assert chat.train.documents + chat.val.documents == 50
    assert chat.train.mask is not None
    assert len(chat.train.mask) == len(chat.train.tokens)
    batch = data.batch_at(chat.train, 64, 8, fnlm.key(0), 0)
    text = "".join(chr(i) for i, w in zip(batch.targets.flatten(), batch.weights.flatten(), strict=True) if w)
    assert set(text) <= {*"answer 0123456789", chr(tokenizers.named("byte").special["<|im_end|>"])}
    assert 0.1 < batch.weights.mean() < 0.5


def test_what_is_held_out_is_not_trained_on(tmp_path: Path) -> None:
    train, val = jsonl(tmp_path / "t.jsonl", rows(30)), jsonl(tmp_path / "v.jsonl", rows(4))
    said: list[str] = []
    data.prepare(Preparation((str(train),), tmp_path / "out", "byte", val=(str(val),)), said.append)
    chat = data.open(tmp_path / "out")
    assert (chat.train.documents, chat.val.documents) == (26, 4)
    assert "4 validation conversations repeat in train: 4 copies left out there" in said


def test_conversations_without_an_answer_are_left_out(tmp_path: Path) -> None:
    silent = {"messages": [{"role": "user", "content": "anybody?"}]}
    said: list[str] = []
    file = jsonl(tmp_path / "a.jsonl", [silent, *rows(20)])
    manifest = data.prepare(Preparation((str(file),), tmp_path / "out", "byte"), said.append)
    assert sum(split["documents"] for split in manifest["splits"].values()) == 20
    assert "1 conversations without an assistant's message were left out" in said


def test_tokenizers_get_the_special_tokens_or_are_refused(tmp_path: Path) -> None:
    file = jsonl(tmp_path / "a.jsonl", rows(20))
    data.prepare(Preparation((str(file),), tmp_path / "char", "char"))
    assert list(data.open(tmp_path / "char").tokenizer.special) == list(tokenizers.CHAT_SPECIAL)
    own = tokenizers.train("char", ["abcdefghijklmnopqrstuvwxyz0123456789 \n"]).save(tmp_path)
    with pytest.raises(DataError, match=r"no <\|endoftext\|> <\|im_start\|> <\|im_end\|>; add them with --special"):
        data.prepare(Preparation((str(file),), tmp_path / "own", str(own)))
    data.prepare(Preparation((str(file),), tmp_path / "own", str(own), special=tokenizers.CHAT_SPECIAL))


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"messages": [{"role": "robot", "content": "x"}]}, "line 2: a message has role 'robot'; known: system"),
        ({"messages": [{"role": "user"}]}, "line 2 is no conversation: KeyError 'content'"),
        ({"messages": [{"role": "user", "content": None}]}, "line 2: the content of a message is no text"),
        ({"conversations": [{"from": "moon", "value": "x"}]}, "line 2 is no conversation: KeyError 'moon'"),
        ({"messages": 3}, "line 2 is no conversation: TypeError"),
        ({"words": "x"}, "line 2 is no conversation: it has words, not messages"),
    ],
)
def test_a_bad_line_is_named(row: dict, says: str, tmp_path: Path) -> None:
    file = jsonl(tmp_path / "a.jsonl", [*rows(1), row])
    with pytest.raises(DataError, match=says):
        data.prepare(Preparation((str(file),), tmp_path / "out", "byte"))


@pytest.mark.parametrize(
    ("mask", "says"), [(0, "0 % of the train split would be learnt"), (1, "100 % of the train split")]
)
def test_nothing_and_everything_to_learn_are_refused(mask: int, says: str, tmp_path: Path) -> None:
    sink = data.prepare.__globals__["Sink"](tmp_path, "train", "uint16", 300, masked=True)
    sink.write(np.arange(9), np.full(9, mask, np.uint8))
    with pytest.raises(DataError, match=says):
        sink.close()


def test_no_answer_anywhere_is_refused(tmp_path: Path) -> None:
    file = jsonl(tmp_path / "a.jsonl", [{"messages": [{"role": "user", "content": str(i)}]} for i in range(9)])
    with pytest.raises(
        DataError, match=r"a\.jsonl: no conversation has an assistant's message, so that there is nothing"
    ):
        data.prepare(Preparation((str(file),), tmp_path / "out", "byte"))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.jsonl"]


def test_text_and_chat_do_not_mix(tmp_path: Path) -> None:
    jsonl(tmp_path / "a.jsonl", rows(3))
    (tmp_path / "b.txt").write_text("a story")
    with pytest.raises(DataError, match=r"b\.txt holds text, .*a\.jsonl holds chat"):
        data.prepare(Preparation((str(tmp_path),), tmp_path / "out", "byte"))


def test_real_dialogues(test_data: Path, tmp_path: Path) -> None:
    train, val = (str(test_data / "dialog" / f"dailydialog-{name}.txt") for name in ("train", "validation"))
    manifest = data.prepare(Preparation((val,), tmp_path / "out", "byte"))
    assert sum(split["documents"] for split in manifest["splits"].values()) == 1000
    assert sum(1 for _ in conversations([Path(train)])) == 11118
