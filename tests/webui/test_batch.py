"""Texts in one batch are what each is alone: joining and leaving at any step, chunked, sharing beginnings, any type."""

from __future__ import annotations

import random as chance
from typing import Any

import pytest
import torch

import fnlm
from fnlm import random
from fnlm.decode import Prepared, decode, init_cache, prefill, prepare
from fnlm.generate import end_ids, generate
from fnlm.params import shapes
from fnlm.sampling import Settings
from fnlm.tokenizers import Tokenizer, named
from tests.reference import random_params
from webui.batch import SHORT, Batch, Slot, agreeing
from webui.writing import Writer, chosen

SHAPES: dict[str, dict[str, Any]] = {
    "rope": {"n_heads": 4, "n_kv_heads": 2, "positions": "rope"},
    "learned": {"n_heads": 2},
    "demo": {
        "n_heads": 2, "positions": "rope", "ngrams": ((2, 40),), "qk_norm": True, "embed_norm": True,
        "token_shift": 0.5,
    },
    "window-alibi": {"n_heads": 4, "positions": "alibi", "window": 9},
}  # fmt: skip
BYTES: Tokenizer = named("byte")


def model(name: str, seq_len: int = 96, dtype: torch.dtype = torch.float32) -> tuple[Prepared, fnlm.ModelConfig]:
    cfg = fnlm.ModelConfig(vocab_size=BYTES.vocab_size, n_layers=2, d_model=16, seq_len=seq_len, **SHAPES[name])
    return prepare(random_params(shapes(cfg)), cfg, dtype), cfg


def alone(ready: Prepared, cfg: fnlm.ModelConfig, prompt: list[int], settings: Settings, seed: int) -> list[int]:
    """The ids that fnlm.generate draws: without a batch, chunks, or anything kept."""
    steps = generate(ready, cfg, [prompt], settings, random.key(seed), eot_ids=end_ids(BYTES))
    return [token.id for (token,) in steps if token.id >= 0]


class Written:
    """A text on its way through a batch."""

    def __init__(self, batch: Batch, cfg: fnlm.ModelConfig, prompt: list[int], settings: Settings, seed: int):
        self.writer = Writer(BYTES, prompt, settings, seed, cfg.vocab_size)
        self.slot = batch.join(prompt)

    @property
    def ids(self) -> list[int]:
        return self.writer.generation.ids if self.writer.finish else []


def step(batch: Batch, running: dict[Slot, Written], budget: int) -> list[Written]:
    """One step of the batch, as the engine makes it; those that have ended leave."""
    new = {slot: w.writer.next for slot, w in running.items() if w.writer.next is not None}
    slots, logits = batch.advance(new) if new else ([], torch.empty(0))
    read = batch.fill(budget)
    slots = [*slots, *(slot for slot, _ in read)]
    logits = (
        torch.cat([logits, *(row[None] for _, row in read)])
        if new
        else torch.stack([row for _, row in read] or [torch.empty(0)])
    )
    if slots:
        ids, _ = chosen([running[slot].writer for slot in slots], logits)
        for slot, token in zip(slots, ids, strict=True):
            running[slot].writer.push(token, None)
    ended = [running.pop(slot) for slot in list(running) if running[slot].writer.finish]
    for text in ended:
        batch.leave(text.slot)
    return ended


def settings_of(dice: chance.Random, greedy: bool) -> Settings:
    most = dice.randint(1, 24)
    if greedy:
        return Settings(temperature=0, max_tokens=most)
    penalty = dice.choice([{}, {"repetition_penalty": 1.3}, {"frequency_penalty": 0.5}])
    narrow = dice.choice([{}, {"top_k": 5}, {"top_p": 0.8}, {"min_p": 0.1}, {"min_tokens": most}])
    return Settings(temperature=dice.choice([0.5, 1.0]), max_tokens=most, **penalty, **narrow)


def conversation(seed: int, name: str, greedy: bool, rows: int = 8) -> None:
    """Texts come at random times to a batch, some are given up, some take up where another ended: each is as alone."""
    dice = chance.Random(seed)
    ready, cfg = MODELS[name]
    batch, running, past = Batch(ready, cfg, rows), dict[Slot, Written](), [[BYTES.eot_id or 0]]
    todo = [(settings_of(dice, greedy), dice.randrange(2**32)) for _ in range(8)]
    ends: list[Written] = []
    while todo or running:
        while todo and len(running) < rows and dice.random() < 0.4:
            begin = dice.choice(past)[: dice.randint(1, 40)] if dice.random() < 0.5 else []
            prompt = [*begin, *(dice.randrange(256) for _ in range(dice.randint(0 if begin else 1, 30)))]
            text = Written(batch, cfg, prompt, *todo.pop())
            running[text.slot] = text
        for text in step(batch, running, dice.choice([1, 5, 256])):
            ends.append(text)
            past.append([*text.writer.prompt, *text.ids])
        if running and dice.random() < 0.03:
            slot = dice.choice(list(running))
            batch.leave(slot)
            del running[slot]
    for text in ends:
        w = text.writer
        assert text.ids == alone(ready, cfg, list(w.prompt), w.settings, w.seed), (seed, name)
    assert not any(slot.taken for slot in batch.slots)
    assert len(batch.slots) <= rows


MODELS = {name: model(name) for name in SHAPES}


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("greedy", [True, False])
def test_ragged_requests_are_what_each_is_alone(name: str, greedy: bool) -> None:
    for seed in range(3):
        conversation(seed, name, greedy)


@pytest.mark.slow
@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("greedy", [True, False])
def test_a_thousand_ragged_requests_are_what_each_is_alone(name: str, greedy: bool) -> None:
    for seed in range(100, 116):
        conversation(seed, name, greedy)


def crowd(seed: int, name: str, dtype: torch.dtype) -> None:
    """Eight texts in a batch that keeps to one shape, joining at random times: each is what it is there alone."""
    dice, (ready, cfg) = chance.Random(seed), EXACT[name, dtype]
    asked = [
        ([dice.randrange(256) for _ in range(dice.randint(1, 60))], settings_of(dice, dice.random() < 0.5), i)
        for i in range(8)
    ]

    def run(some: list[Any], hurry: float, budget: int) -> dict[int, list[int]]:
        batch, running, todo = Batch(ready, cfg, exact=True), dict[Slot, Written](), list(some)
        made: dict[int, list[int]] = {}
        while todo or running:
            while todo and dice.random() < hurry:
                prompt, settings, i = todo.pop()
                text = Written(batch, cfg, prompt, settings, i)
                running[text.slot] = text
            for ended in step(batch, running, budget):
                made[ended.writer.seed] = ended.ids
        return made

    alone = {i: run([one], 1.0, 256)[i] for one in asked for i in (one[2],)}
    assert run(asked, 0.4, dice.choice([1, 60, 256])) == alone, (seed, name)


EXACT = {(name, dtype): model(name, dtype=dtype) for name in SHAPES for dtype in (torch.bfloat16, torch.float32)}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_text_does_not_depend_on_its_neighbours(dtype: torch.dtype) -> None:
    crowd(0, "demo", dtype)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", SHAPES)
def test_a_thousand_texts_do_not_depend_on_their_neighbours(name: str, dtype: torch.dtype) -> None:
    for seed in range(16):
        crowd(seed, name, dtype)


def test_what_a_row_held_is_not_read_again() -> None:
    ready, cfg = MODELS["rope"]
    batch = Batch(ready, cfg)
    first = batch.join([1, 2, 3, 4])
    batch.fill()
    batch.leave(first)
    again = batch.join([1, 2, 3, 4, 5, 6])
    assert (again, again.reused) == (first, 4)
    ((_, logits),) = batch.fill()
    want, _ = prefill(ready, [[1, 2, 3, 4, 5, 6]], cfg, init_cache(cfg, 1))
    torch.testing.assert_close(logits, want[0])
    other = batch.join([1, 2, 3, 9])  # the row is taken: what it holds is copied
    assert other is not first
    batch.fill()
    assert other.reused == 3
    batch.leave(first)
    third = batch.join([1, 8])  # another conversation's row is not given up for one token
    assert third not in (first, other)
    batch.fill()
    assert third.reused == 1


def test_choices_of_one_prompt_read_it_once(monkeypatch: pytest.MonkeyPatch) -> None:
    ready, cfg = model("rope", 600)
    batch, read = Batch(ready, cfg), list[int]()

    def counted(*args: Any, **options: Any) -> Any:
        read.append(args[1].numel())
        return decode(*args, **options)

    monkeypatch.setattr("webui.batch.decode", counted)
    prompt = [i % 250 for i in range(500)]
    for _ in range(4):
        batch.join(prompt)
    while any(slot.missing for slot in batch.slots if slot.taken):
        batch.fill(100)
    assert sum(read) < 1.5 * len(prompt)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", SHAPES)
def test_neighbours_do_not_change_a_bit(name: str, dtype: torch.dtype) -> None:
    """The logits at every step of a text that is alone, and among others that come and go: the same bits."""
    ready, cfg = model(name, 400, dtype)
    prompt, new = [i % 200 for i in range(150)], [7, 90, 3, 14, 200, 61]

    def logits(company: int, before: bool) -> list[torch.Tensor]:
        batch, out, others = Batch(ready, cfg, exact=True), [], list[Slot]()
        if before:  # it was read earlier, and gone on with
            slot = batch.join(prompt[:140])
            batch.fill(1000)
            batch.advance({slot: 5})
            batch.leave(slot)
        for i in range(company):
            others.append(batch.join([(i * j) % 250 for j in range(1, 4 + 30 * i)]))
        batch.fill(10_000)
        own = batch.join(prompt)
        while own.missing:
            for slot, row in batch.fill(1):
                out += [row] * (slot is own)
            if others:
                slots, rows = batch.advance(dict.fromkeys(others, 9))
                out += [row for slot, row in zip(slots, rows, strict=True) if slot is own]
        if before:
            assert own.reused == SHORT
        for n, token in enumerate(new):
            if n == 3 and others:
                batch.leave(others.pop())
            slots, rows = batch.advance({own: token, **dict.fromkeys(others, 8)})
            out.append(rows[slots.index(own)])
        return out

    want = logits(0, False)
    assert len(want) == 1 + len(new)
    for company, before in ((0, True), (3, False), (5, True), (10, False)):
        got = logits(company, before)
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True)), (company, before)


def test_agreeing() -> None:
    assert [agreeing([1, 2, 3], b, 3) for b in ([1, 2, 3], [1, 2, 4], [9, 2, 3], [1, 9, 3])] == [3, 2, 0, 1]
    assert agreeing([1, 2, 3], [1, 2, 3], 2) == 2
    assert agreeing([], [], 0) == 0
