"""Generation: batches as single prompts, stops, limits, and streams that are the whole text."""

from __future__ import annotations

import re
from collections.abc import Callable, Generator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fnlm
from fnlm import tokenizers
from fnlm.decode import decode, init_cache, prepare
from fnlm.generate import Generation, Text, Token, beginning, complete, encoded, end_ids, generate, stream
from fnlm.params import shapes
from fnlm.sampling import Settings
from fnlm.tokenizers import Byte, Char, Tokenizer
from fnlm.tree import equal
from fnlm.types import Params
from tests.reference import random_params

BYTE = Byte()
CFG = fnlm.ModelConfig(
    vocab_size=264, n_layers=2, n_heads=2, d_model=32, seq_len=64, positions="rope", ngrams=((2, 500),)
)  # five ids of padding
PARAMS = {k: 3 * v for k, v in random_params(shapes(CFG), dtype=torch.float64).items()}
READY = prepare(PARAMS, CFG)
HOT = Settings(temperature=1.0, max_tokens=20, forbidden=tuple(end_ids(BYTE)))
KEY = fnlm.key(5)


def parrot(tokenizer: Tokenizer, ids: list[int], seq_len: int = 64) -> tuple[fnlm.ModelConfig, Params]:
    """A model that says each id after the one before it (all different), the first after the last."""
    assert len(set(ids)) == len(ids)
    v = tokenizer.vocab_size
    cfg = fnlm.ModelConfig(
        vocab_size=v, n_layers=1, n_heads=1, d_model=v, d_ff=1, seq_len=seq_len, tied=False, norm_affine=False,
        positions="none", zero_init_out=True,
    )  # fmt: skip
    params = fnlm.init_params(cfg, fnlm.key(0), dtype=torch.float64)
    params["embed.tokens.weight"] = torch.eye(v, dtype=torch.float64)
    params["head.weight"] = torch.zeros(v, v, dtype=torch.float64)
    for a, b in zip(ids, ids[1:] + ids[:1], strict=True):
        params["head.weight"][b, a] = 1.0
    return cfg, params


def drained(pieces: Generator[str, None, Generation]) -> tuple[list[str], Generation]:
    out = []
    while True:
        try:
            out.append(next(pieces))
        except StopIteration as end:
            return out, end.value


GREEDY = Settings(temperature=0, max_tokens=None)


def test_a_parrot_streams_whole_characters_and_stops_at_the_end() -> None:
    ids = [*"aé漢🙂!".encode(), BYTE.special["<|endoftext|>"]]
    cfg, params = parrot(BYTE, ids)
    pieces, whole = drained(stream(params, cfg, BYTE, [ord("a")], GREEDY, KEY))
    assert pieces == ["é", "漢", "🙂", "!"]
    assert whole == Generation("é漢🙂!", ids[1:-1], "stop", 1)
    assert complete(params, cfg, BYTE, ["a"], GREEDY, KEY) == [whole]


def test_a_character_that_is_cut_is_shown_as_such() -> None:
    cfg, params = parrot(BYTE, [*"a🙂".encode()])
    pieces, whole = drained(stream(params, cfg, BYTE, [ord("a")], Settings(temperature=0, max_tokens=2), KEY))
    assert (pieces, whole.text, whole.finish, len(whole.ids)) == (["\ufffd"], "\ufffd", "length", 2)
    assert BYTE.decode(whole.ids) == whole.text


@pytest.mark.parametrize(
    ("stop", "pieces"),
    [
        (("de",), ["b", "c"]),
        (("cdef", "zz"), ["b"]),
        (("dx", "efgh"), ["b", "c", "d"]),
        (("b",), []),
        (("bx",), ["bc", "d", "e", "f", "g", "h", "i", "j"]),  # b waits for what follows
        (("ijx",), ["b", "c", "d", "e", "f", "g", "h", "ij"]),  # shown when the text ends
        (("def", "e"), ["b", "c", "d"]),  # the one that is complete first
        (("de", "cde"), ["b"]),
    ],
)
def test_stop_strings_over_token_borders(stop: tuple[str, ...], pieces: list[str]) -> None:
    tokenizer = Char("abcdefghij", ["<|endoftext|>"])
    cfg, params = parrot(tokenizer, list(range(11)))
    settings_ = Settings(temperature=0, max_tokens=None, stop=stop)
    shown, whole = drained(stream(params, cfg, tokenizer, [0], settings_, KEY))
    assert shown == pieces
    assert (whole.text, whole.finish) == ("".join(pieces), "stop")
    assert complete(params, cfg, tokenizer, ["a"], settings_, KEY) == [whole]


def feed(tokenizer: Tokenizer, ids: list[int], stop: tuple[str, ...]) -> tuple[list[str], Generation]:
    text = Text(tokenizer, [1], stop)
    pieces = []
    for i, token in enumerate(ids):
        if text.finish is None:
            pieces.append(text.push(Token(0, token, 0.0, "length" if i + 1 == len(ids) else None)))
    return pieces, text.generation


@settings(max_examples=400)
@given(st.text("ab🙂漢é", min_size=1, max_size=12), st.lists(st.text("ab🙂", min_size=1, max_size=3), max_size=3))
def test_stop_strings_are_those_of_a_slow_search(text: str, stops: list[str]) -> None:
    """The text ends before the first stop string to be complete; nothing of it was ever shown."""
    pieces, whole = feed(BYTE, list(text.encode()), tuple(stops))
    ends = [n for n in range(1, len(text) + 1) if any(text[:n].endswith(s) for s in stops)]
    want = text
    if ends:
        want = text[: ends[0] - max(len(s) for s in stops if text[: ends[0]].endswith(s))]
    assert "".join(pieces) == whole.text == want
    assert whole.finish == ("stop" if ends else "length")


@settings(max_examples=300)
@given(st.lists(st.integers(0, 255), min_size=1, max_size=20) | st.text(max_size=8).map(lambda s: [*s.encode()]))
def test_a_stream_is_the_whole_text(ids: list[int]) -> None:
    if ids:
        pieces, whole = feed(BYTE, ids, ())
        assert "".join(pieces) == whole.text == BYTE.decode(ids)


@pytest.mark.parametrize("more", [{}, {"temperature": 0}, {"top_p": 0.9, "repetition_penalty": 1.2}, {"top_k": 40}])
def test_a_row_is_the_same_alone_and_in_company(more: dict[str, Any]) -> None:
    prompts = ["Hello there", "x", "A longer prompt, to be sure", "漢字"]
    chosen = Settings(**{"temperature": 1.0, "max_tokens": 15, **more})
    together = complete(READY, CFG, BYTE, prompts, chosen, KEY)
    keys = fnlm.fold_in(KEY, torch.arange(4))
    for i, prompt in enumerate(prompts):
        assert complete(READY, CFG, BYTE, [prompt], chosen, keys[i : i + 1]) == [together[i]]
    assert complete(READY, CFG, BYTE, prompts[:1], chosen, KEY) == together[:1]
    assert drained(stream(READY, CFG, BYTE, encoded(BYTE, prompts[0]), chosen, KEY))[1] == together[0]
    if more != {"temperature": 0}:
        assert complete(READY, CFG, BYTE, prompts, chosen, fnlm.key(6)) != together


def test_rows_that_end_make_room() -> None:
    """The batch shrinks as rows end, by stop strings and lengths; what goes on does not change."""
    prompts = ["a" * n for n in (50, 1, 60, 30, 62, 45, 10, 63, 5)]
    for more in ({}, {"frequency_penalty": 0.5}):
        chosen = Settings(temperature=1.5, max_tokens=None, stop=("q", "7"), **more)
        together = complete(READY, CFG, BYTE, prompts, chosen, KEY)
        keys = fnlm.fold_in(KEY, torch.arange(len(prompts)))
        alone = [complete(READY, CFG, BYTE, [p], chosen, keys[i : i + 1])[0] for i, p in enumerate(prompts)]
        assert together == alone
        assert len({len(g.ids) for g in together}) > 4


def test_cached_is_uncached() -> None:
    """Greedy, token for token, as by the forward of the whole text each time."""
    ids = encoded(BYTE, "Once upon")
    want = list(ids)
    for _ in range(20):
        logits = fnlm.forward(PARAMS, torch.tensor([want]), CFG)[0, -1, : BYTE.vocab_size]
        logits[list(end_ids(BYTE))] = -torch.inf
        want.append(int(logits.argmax()))
    greedy = Settings(temperature=0, max_tokens=20, forbidden=tuple(end_ids(BYTE)))
    assert complete(PARAMS, CFG, BYTE, ["Once upon"], greedy, KEY)[0].ids == want[len(ids) :]


def test_a_seed_stands_for_a_key() -> None:
    seeded = Settings(temperature=1.0, max_tokens=12, seed=9)
    plain = Settings(temperature=1.0, max_tokens=12)
    assert complete(READY, CFG, BYTE, ["a"], seeded, KEY) == complete(READY, CFG, BYTE, ["a"], plain, fnlm.key(9))


def test_the_end_of_the_context() -> None:
    full = Settings(temperature=1.0, max_tokens=None, forbidden=HOT.forbidden)
    short, long, last = complete(READY, CFG, BYTE, ["a", "b" * 40, "c" * 63], full, KEY)
    assert [len(g.ids) for g in (short, long, last)] == [63, 24, 1]
    assert {g.finish for g in (short, long, last)} == {"length"}
    assert [g.prompt_tokens for g in (short, long, last)] == [1, 40, 63]
    with pytest.raises(ValueError, match=r"has 64 tokens, the model.s context only 64 .* shorten it to 63"):
        generate(READY, CFG, [[1] * 64], full, KEY, eot_ids=frozenset())


def test_min_tokens_before_an_end() -> None:
    ids = [*b"abc", BYTE.special["<|im_end|>"]]
    cfg, params = parrot(BYTE, ids)

    def made(n: int) -> Generation:
        return complete(params, cfg, BYTE, ["a"], Settings(temperature=0, min_tokens=n), KEY)[0]

    assert made(0) == made(2) == Generation("bc", [98, 99], "stop", 1)
    forced = made(5)
    assert forced.ids[:2] == [98, 99]
    assert len(forced.ids) >= 5
    assert ids[-1] not in forced.ids


def test_stop_ids_and_steps() -> None:
    cfg, params = parrot(BYTE, [*b"abcdef"])
    chosen = Settings(temperature=0, max_tokens=3, stop_ids=(ord("d"),))
    steps = list(generate(params, cfg, [[97], [99], [101]], chosen, KEY, eot_ids=frozenset([ord("a")])))
    said = [[(t.row, t.id, t.finish) for t in step] for step in steps]
    assert said == [
        [(0, 98, None), (1, -1, "stop"), (2, 102, None)],
        [(0, 99, None), (2, -1, "stop")],
        [(0, -1, "stop")],
    ]
    steps = list(generate(params, cfg, [[97]], Settings(temperature=0, max_tokens=2), KEY, eot_ids=frozenset()))
    assert [t.finish for (t,) in steps] == [None, "length"]


def test_logprobs_are_the_models_own() -> None:
    (first,), (second,) = generate(READY, CFG, [[72, 105]], Settings(temperature=0.3, top_k=2, max_tokens=2), KEY, eot_ids=frozenset())  # fmt: skip  # noqa: E501
    for token, ids in ((first, [72, 105]), (second, [72, 105, first.id])):
        want = fnlm.forward(PARAMS, torch.tensor([ids]), CFG)[0, -1].log_softmax(-1)[token.id]
        assert abs(token.logprob - want) < 1e-9


def test_padding_is_never_drawn() -> None:
    cfg, params = CFG, dict(PARAMS)
    made = complete(params, cfg, BYTE, ["a"] * 30, Settings(temperature=5.0, max_tokens=10), KEY)
    assert all(i < BYTE.vocab_size for g in made for i in g.ids)


def test_cancelled() -> None:
    asked = iter([False, False, False, True])
    pieces, whole = drained(stream(READY, CFG, BYTE, [72], HOT, KEY, cancelled=lambda: next(asked)))
    assert whole.finish == "cancelled"
    assert len(whole.ids) == 3
    assert "".join(pieces) == whole.text == BYTE.decode(whole.ids)
    assert complete(READY, CFG, BYTE, ["a"], HOT, KEY, cancelled=lambda: True) == [Generation("", [], "cancelled", 1)]


def test_chat_prompts_are_those_of_training() -> None:
    ids = encoded(BYTE, "Hi", chat=True)
    assert BYTE.decode(ids) == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert complete(READY, CFG, BYTE, ["Hi"], HOT, KEY, chat=True) == complete(READY, CFG, BYTE, [ids], HOT, KEY)


def test_beginnings_and_ends() -> None:
    assert beginning(BYTE) == [256]
    assert beginning(Char("\nab")) == [0]
    assert beginning(Char("ab\n")) == [2]
    assert beginning(Char("xyz")) == [0]
    assert encoded(BYTE, "") == [256]
    assert end_ids(BYTE) == {256, 258}
    assert end_ids(Char("ab")) == frozenset()


def test_inputs_are_unchanged() -> None:
    before = {k: v.clone() for k, v in PARAMS.items()}
    state = torch.get_rng_state()
    key = fnlm.key(5)
    complete(PARAMS, CFG, BYTE, ["a", "bc"], HOT, key)
    assert equal(before, PARAMS)
    assert torch.equal(key, fnlm.key(5))
    assert torch.equal(state, torch.get_rng_state())


def test_errors() -> None:
    def run(prompts: list[list[int]], params: Any = READY, **more: Any) -> Callable[[], Any]:
        return lambda: generate(params, CFG, prompts, Settings(**more), KEY, eot_ids=frozenset(), vocab_size=259)

    broken = prepare({k: v * float("nan") for k, v in PARAMS.items()}, CFG)
    wrong = [
        (run([]), "there is no prompt"),
        (run([[1], []]), "prompt 1 is empty"),
        (run([[1, 259]]), "prompt 0 has id 259, the vocabulary 259"),
        (run([[-1]]), "prompt 0 has id -1"),
        (lambda: list(run([[1]], broken)()), "no token can be drawn: the model's logits are not finite"),
        (lambda: list(run([[1]], forbidden=tuple(range(259)))()), "or all ids are forbidden"),
        (lambda: encoded(Char("abc"), "a漢cé"), "knows 3 characters, but not 'é' (U+00E9), '漢' (U+6F22); leave"),
        (lambda: encoded(tokenizers.named("byte", special=[]), "a", chat=True), "has no <|endoftext|>"),
    ]
    for call, says in wrong:
        with pytest.raises(ValueError, match=re.escape(says)):
            call()


@pytest.mark.parametrize("lengths", [None, [2, 0, 5]])
def test_logits_at_every_new_position(lengths: list[int] | None) -> None:
    tokens = torch.randint(0, 259, (3, 8), generator=torch.Generator().manual_seed(1))
    _, cache = decode(READY, tokens[:, :3], CFG, init_cache(CFG, 3, dtype=torch.float64))
    given = None if lengths is None else torch.tensor(lengths)
    logits, cache = decode(READY, tokens[:, 3:], CFG, cache, lengths=given, every=True)
    want = fnlm.forward(PARAMS, tokens, CFG)[:, 3:]
    assert logits.shape == want.shape
    for row, n in enumerate(lengths or [5, 5, 5]):
        torch.testing.assert_close(logits[row, :n], want[row, :n], rtol=0, atol=1e-10)
    assert cache.pos.tolist() == [3 + n for n in lengths or [5, 5, 5]]
