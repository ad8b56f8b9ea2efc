"""Prompts by a model's own chat template: golden texts, what ends a turn, what is refused, and which runs have one."""

from __future__ import annotations

from typing import Any

import pytest

from fnlm.data import DataError, Dialogue, dialogue_of, is_chat, prompt
from fnlm.data.template import Template
from fnlm.tokenizers import named
from tests.templates import ENDED, GEMMA, KEPT, LLAMA, PLAIN, ZEPHYR, came, talk

TEMPLATES = {"llama": LLAMA, "zephyr": ZEPHYR, "gemma": GEMMA, "plain": PLAIN}
GOLDEN = {
    # template: of a model from elsewhere, of one that was trained here, with instructions
    "llama": (
        "<s>[INST] a [/INST] b </s><s>[INST] c [/INST]",
        "<s>[INST] a [/INST] b </s><s>[INST] c [/INST] ",
        "<s>[INST] <<SYS>>\nS\n<</SYS>>\n\na [/INST] b </s><s>[INST] c [/INST]",
    ),
    "zephyr": (
        "<|user|>\na</s>\n<|assistant|>\nb</s>\n<|user|>\nc</s>\n<|assistant|>",
        "<|user|>\na</s>\n<|assistant|>\nb</s>\n<|user|>\nc</s>\n<|assistant|>\n",
        "<|system|>\nS</s>\n<|user|>\na</s>\n<|assistant|>\nb</s>\n<|user|>\nc</s>\n<|assistant|>",
    ),
    "gemma": (
        "<s>user: a<|end|>\nassistant: b<|end|>\nuser: c<|end|>\nassistant: ",
        "<s>user: a<|end|>\nassistant: b<|end|>\nuser: c<|end|>\nassistant: ",
        None,
    ),
    "plain": (
        "### user\na\n### assistant\nb\n### user\nc\n### assistant\n",
        "### user\na\n### assistant\nb\n### user\nc\n### assistant\n",
        "### system\nS\n### user\na\n### assistant\nb\n### user\nc\n### assistant\n",
    ),
}
ENDS = {"llama": {257}, "zephyr": {257}, "gemma": {257, 258}, "plain": {257}}  # with </s>, which all came with


def foreign(template: str) -> Dialogue:
    return Dialogue(ENDED, template, learnt=False, kept=KEPT)


def learnt(template: str) -> Dialogue:
    """Trained here; a document's own tokens stand for bos_token and eos_token then."""
    return Dialogue(ENDED, template)


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_prompts(name: str) -> None:
    theirs, ours, instructed = GOLDEN[name]
    said, template = talk("a", "b", "c"), TEMPLATES[name]
    assert ENDED.decode(foreign(template).prompt(said)) == theirs
    assert ENDED.decode(learnt(template).prompt(said)).replace("</s>", "<s>") == ours.replace("</s>", "<s>")
    assert foreign(template).ends == ENDS[name]
    assert foreign(template).stop == (("\n### user",) if name == "plain" else ())
    if instructed is not None:
        assert ENDED.decode(foreign(template).prompt(talk("a", "b", "c", system="S"))) == instructed


@pytest.mark.parametrize("name", GOLDEN)
def test_a_prompt_is_what_training_had_before_the_answer(name: str) -> None:
    whole = talk(" a", "b ", "\nc d\n", "e")
    ((ids, mask),) = Template(TEMPLATES[name], ENDED).render([whole])
    told = ids.tolist()
    asked = learnt(TEMPLATES[name]).prompt(whole[:-1])
    assert told[: len(asked)] == asked
    assert (told[len(asked)], mask[len(asked)]) == (ord("e"), 1)


def test_special_tokens_are_those_of_the_template_alone() -> None:
    said = talk("x</s>y \ue0003\ue001")
    for dialogue in (foreign(ZEPHYR), learnt(ZEPHYR)):
        ids = dialogue.prompt(said)
        assert ids.count(257) == 1  # the template's own
        assert "x</s>y \ue0003\ue001</s>" in ENDED.decode(ids)


def test_what_a_template_changes_is_written_as_it_wants() -> None:
    """As templates do that leave the thoughts of earlier answers out."""
    short = ZEPHYR.replace("m.content", "m.content.split('=')[-1]")
    for dialogue in (foreign(short), learnt(short)):
        text = ENDED.decode(dialogue.prompt(talk("a", "thought=b", "c")))
        assert text.startswith("<|user|>\na</s>\n<|assistant|>\nb</s>\n<|user|>\nc</s>\n<|assistant|>")


def test_a_template_may_take_spaces_from_either_end() -> None:
    text = ENDED.decode(learnt(LLAMA).prompt(talk(" a\n", system=" S\n")))
    assert text.endswith("[INST] <<SYS>>\n S\n\n<</SYS>>\n\n a [/INST] ")


def test_chatml_is_as_ever() -> None:
    t = named("byte")
    said = talk("a", "b", "c", system="S")
    assert Dialogue(t).prompt(said) == prompt(t, said)
    assert (Dialogue(t).ends, Dialogue(t).stop) == (frozenset(), ())


@pytest.mark.parametrize(
    ("template", "said", "says"),
    [
        (GEMMA, talk("a", system="S"), "refuses a conversation: no system role; this model takes no system .* leave"),
        (LLAMA, [*talk("a"), *talk("b")], "refuses a conversation: user and assistant must take turns$"),
        (
            "{% for m in messages if m.role != 'system' %}{{ m.content }}{% endfor %}",
            talk("a", system="S"),
            "the chat template leaves out the system message; this model takes no system message here, so leave it out",
        ),
        ("{% for %}", talk("a"), "is not Jinja"),
        ("{{ 1 // 0 }}", talk("a"), "refuses a conversation: "),
        ("{% for i in range(999999999) %}x{% endfor %}", talk("a"), "refuses a conversation: Range too big"),
        ("{{ messages.__class__.mro() }}", talk("a"), "refuses a conversation: .*unsafe"),
    ],
)
def test_what_is_refused(template: str, said: list[dict[str, str]], says: str) -> None:
    for dialogue in (foreign(template), learnt(template)):
        with pytest.raises(DataError, match=says):
            dialogue.prompt(said)


@pytest.mark.parametrize(
    ("config", "chat", "text", "here"),
    [
        ({"kind": "text"}, False, None, False),
        ({"kind": "chat"}, True, None, False),
        ({"kind": "text", **came(ZEPHYR)}, True, ZEPHYR, False),  # as imported
        ({"kind": "text", **came("{{ messages }}")}, False, "{{ messages }}", False),  # it writes no conversation
        ({"kind": "text", "train": {}, **came(ZEPHYR)}, False, ZEPHYR, False),  # trained further on text
        ({"kind": "chat", "train": {}, "template": None, **came(ZEPHYR)}, True, None, True),  # by ChatML
        ({"kind": "chat", "train": {}, "template": LLAMA}, True, LLAMA, True),
        ({"kind": "chat", "train": {}, **came(LLAMA)}, True, LLAMA, True),  # by an earlier version
    ],
)
def test_which_runs_have_which(config: dict[str, Any], chat: bool, text: str | None, here: bool) -> None:
    found = dialogue_of(config, ENDED)
    assert (is_chat(config, ENDED), found.text) == (chat, text)
    assert found.learnt == here or text is None
    strange = came(GEMMA, generation={"eos_token_id": [258, 7, "x", 9999]})
    assert dialogue_of({"kind": "text", **strange}, ENDED).ends == {7, 257, 258}
