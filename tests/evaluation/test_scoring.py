"""Continuations are scored as token by token, whatever goes together; tasks as their definitions say."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from fnlm import ModelConfig, evaluation, forward, init_params, key, tokenizers
from fnlm.data import DataError
from fnlm.evaluation import pair, rolling, score

TOKENIZER = tokenizers.named("byte")
CFG = ModelConfig(vocab_size=259, n_layers=1, n_heads=2, d_model=16, seq_len=12)
PARAMS = {k: 4 * v.double() for k, v in init_params(CFG, key(3)).items()}


def by_hand(context: list[int], continuation: list[int]) -> tuple[float, bool]:
    """One forward for each token."""
    total, greedy = 0.0, True
    ids = [*context, *continuation][-(CFG.seq_len + 1) :]
    for at in range(len(ids) - len(continuation), len(ids)):
        logits = forward(PARAMS, torch.tensor([ids[:at]]), CFG)[0, -1].log_softmax(-1)
        total, greedy = total + float(logits[ids[at]]), greedy and int(logits.argmax()) == ids[at]
    return total, greedy


@pytest.mark.parametrize("batch_tokens", [1, 30, 4096])
def test_scores_are_sums_of_single_tokens(batch_tokens: int) -> None:
    pairs = [([1], [2]), ([3, 4, 5], [6, 7]), (list(range(20)), list(range(30, 36))), ([9], list(range(12)))]
    likeliest = int(forward(PARAMS, torch.tensor([[1, 2, 3]]), CFG)[0, -1].argmax())
    pairs.append(([1, 2, 3], [likeliest]))
    done: list[int] = []
    found = score(PARAMS, CFG, pairs, batch_tokens=batch_tokens, progress=done.append)
    for one, both in zip(found, pairs, strict=True):
        total, greedy = by_hand(*both)
        assert one == (pytest.approx(total, abs=1e-9), greedy)
    assert found[-1].greedy and not found[0].greedy
    assert sum(done) == len(pairs)


def test_rolling_counts_each_token_once_with_what_came_before() -> None:
    ids = list(range(100, 130))
    pairs = rolling(ids, 7, 12)
    assert [i for _, own in pairs for i in own] == ids
    assert [len(context) + len(own) for context, own in pairs] == [13, 13, 13]  # all contexts are full
    assert pairs[0][0] == [7] and pairs[2] == (ids[17:24], ids[24:])
    assert rolling(ids[:3], 7, 12) == [([7], ids[:3])]


def test_a_pair_is_cut_where_the_context_ends() -> None:
    assert pair(TOKENIZER, "ab ", "cd") == ([97, 98], [32, 99, 100])
    assert pair(TOKENIZER, "", "cd") == ([256], [99, 100])
    merged = tokenizers.train("bpe", ["the the the then"], 270)
    before, after = pair(merged, "the", " the")
    assert merged.decode([*before, *after]) == "the the" and before == merged.encode("the")


@pytest.mark.parametrize(("one", "says"), [(([1], []), "no continuation"), (([1], [2] * 13), "13 tokens is longer")])
def test_pairs_that_cannot_be_scored(one: tuple[list[int], list[int]], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        score(PARAMS, CFG, [one])


def test_lambada_is_about_the_last_word(tmp_path: Path) -> None:
    file = tmp_path / "l.jsonl"
    file.write_text('{"text": "a b cde"}\n{"text": "x y"}\n', encoding="utf-8")
    examples = evaluation.lambada(file)
    assert [(e.context, e.choices) for e in examples] == [("a b", (" cde",)), ("x", (" y",))]
    found = evaluation.measured("lambada", PARAMS, CFG, TOKENIZER, examples)
    nats = [by_hand([*b"a b"], [*b" cde"])[0], by_hand([*b"x"], [*b" y"])[0]]
    assert found.figures["perplexity"] == pytest.approx(math.exp(-sum(nats) / 2), rel=1e-9)
    assert (found.examples, found.of, found.figures["acc"]) == (2, 2, 0.0)
    assert evaluation.measured("lambada", PARAMS, CFG, TOKENIZER, examples, stop=lambda: True) == (0, 2, {})


def test_hellaswag_compares_endings_whole_and_by_character(tmp_path: Path) -> None:
    endings = ["[step] b", " [title] q  r", "t", "uvwxy"]
    row = {"activity_label": "A", "ctx_a": "So  [header] on", "ctx_b": "he GOES", "endings": endings, "label": 2}
    file = tmp_path / "h.jsonl"
    file.write_text(json.dumps(row), encoding="utf-8")
    (example,) = evaluation.hellaswag(file)
    assert example.context == "A: So  on He goes"
    assert example.choices == ("  b", "  q r", " t", " uvwxy") and example.answer == 2
    nats = [by_hand([*example.context.encode()], [*c.encode()])[0] for c in example.choices]
    best = max(range(4), key=lambda i: nats[i])
    normed = max(range(4), key=lambda i: nats[i] / (len(example.choices[i]) - 1))
    assert best != normed
    for answer in range(4):
        found = evaluation.measured("hellaswag", PARAMS, CFG, TOKENIZER, [example._replace(answer=answer)])
        assert found.figures == {"acc": float(answer == best), "acc_norm": float(answer == normed)}


@pytest.mark.parametrize(
    ("task", "name", "text", "says"),
    [
        ("lambada", "a.jsonl", '{"text": "word"}', "line 1: the text must have a last word after a space"),
        ("lambada", "a.jsonl", '{"txt": "word"}', "line 1 has no 'text' that is a string; it has txt"),
        ("lambada", "a.jsonl", "", "has no example"),
        ("lambada", "a.txt", "a b", "examples are read from .jsonl"),
        ("hellaswag", "a.jsonl", '{"activity_label": "", "ctx_a": "", "ctx_b": ""}', "no 'endings'"),
        (
            "hellaswag",
            "a.jsonl",
            '{"activity_label": "", "ctx_a": "", "ctx_b": "", "endings": ["x"], "label": "1"}',
            "label '1' is not the number of one of 1 endings",
        ),
    ],
)
def test_files_that_are_not_of_the_format(task: str, name: str, text: str, says: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(text, encoding="utf-8")
    with pytest.raises(DataError, match=says):
        evaluation.TASKS[task][0](tmp_path / name)
