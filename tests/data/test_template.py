"""A model's own chat template: golden masks, special tokens only where the template writes them, what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fnlm import data, tokenizers
from fnlm.data import DataError, Preparation
from fnlm.data.chat import render
from fnlm.data.template import Template

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TURNS = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content | trim }} [/INST]"
    "{% elif m.role == 'assistant' %} {{ m.content | trim }}{{ eos_token }}{% else %}"
    "{{ raise_exception('no ' + m.role) }}{% endif %}{% endfor %}"
)
TALK = [
    {"role": "user", "content": "Hi <|im_end|>"},
    {"role": "assistant", "content": "Hello é"},
    {"role": "user", "content": "Bye"},
    {"role": "assistant", "content": "So long."},
]


def shown(template: str, tokenizer: tokenizers.Tokenizer, talk: list[dict[str, str]] = TALK) -> str:
    """The text, learnt parts in brackets."""
    ((ids, mask),) = Template(template, tokenizer).render([talk])
    out, before = b"", 0
    for i, learnt in [*zip(ids.tolist(), mask.tolist(), strict=True), (None, 0)]:
        out += b"" if learnt == before else b"{" if learnt else b"}"
        out += b"" if i is None else tokenizer.decode_bytes([i])
        before = learnt
    return out.decode()


def test_golden_masks() -> None:
    t = tokenizers.named("byte")
    assert shown(CHATML, t) == (
        "<|im_start|>user\nHi <|im_end|><|im_end|>\n<|im_start|>assistant\n{Hello é<|im_end|>}\n"
        "<|im_start|>user\nBye<|im_end|>\n<|im_start|>assistant\n{So long.<|im_end|>}\n<|endoftext|>"
    )
    assert shown(TURNS, t) == (
        "<|endoftext|>[INST] Hi <|im_end|> [/INST] {Hello é<|endoftext|>}[INST] Bye [/INST] {So long.<|endoftext|>}"
    )
    padded = [{**m, "content": f" {m['content']}\n"} for m in TALK]
    assert shown(TURNS, t, padded) == shown(TURNS, t)


def test_chatml_by_template_is_ours() -> None:
    t = tokenizers.train("bpe", ["assistant user hello there how are you " * 9], 300)
    for ours, theirs in zip(render(t, [TALK, TALK[:2]]), Template(CHATML, t).render([TALK, TALK[:2]]), strict=True):
        assert [x.tolist() for x in ours] == [x.tolist() for x in theirs]


@pytest.mark.parametrize(
    ("template", "talk", "says"),
    [
        ("{% for %}", TALK, "the chat template is not Jinja"),
        (TURNS, [{"role": "system", "content": "x"}], "the chat template refuses a conversation: no system"),
        ("{{ messages[0].content }}", TALK, "leaves out a message"),
        ("{% for m in messages %}{{ m.content | upper }}{% endfor %}", TALK, "changes what is said"),
        ("{{ messages.__class__.__mro__ }}", TALK, "refuses a conversation|leaves out"),
    ],
)
def test_what_is_refused(template: str, talk: list[dict[str, str]], says: str) -> None:
    with pytest.raises(DataError, match=says):
        Template(template, tokenizers.named("byte")).render([talk])


def prepared(tmp_path: Path, template: str, **settings: Any) -> data.Dataset:
    file = tmp_path / "a.jsonl"
    file.write_text("".join(json.dumps({"prompt": f"q{i}", "completion": f"a{i}"}) + "\n" for i in range(30)))
    data.prepare(Preparation((str(file),), tmp_path / "out", "byte", template=template, **settings))
    list(data.verify(tmp_path / "out"))
    return data.open(tmp_path / "out")


def test_prepared_by_a_template(tmp_path: Path) -> None:
    made = prepared(tmp_path, TURNS)
    assert made.manifest["template"] == TURNS
    assert "<|endoftext|>[INST] q" in made.tokenizer.decode(made.train.tokens)
    assert made.train.mask is not None
    learnt = made.tokenizer.decode(made.train.tokens[made.train.mask == 1]).split("<|endoftext|>")
    assert set(learnt) <= {f"a{i}" for i in range(30)} | {""}
    with pytest.raises(DataError, match="its chat template ends turns as documents end; train with documents=together"):
        data.boundary(made)


def test_text_has_no_template(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a story")
    with pytest.raises(ValueError, match=r"--template is for conversations; .*a\.txt holds text"):
        data.prepare(Preparation((str(tmp_path / "a.txt"),), tmp_path / "out", "byte", template=TURNS))
