"""Overrides as text: how they are written, what they become, and every refusal."""

from __future__ import annotations

import contextlib
import re
from dataclasses import asdict, dataclass, fields, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fnlm.config import ModelConfig, TrainConfig
from fnlm.overrides import ALIASES, describe, parse, split
from fnlm.presets import PRESETS

BASE = PRESETS["gpt2"]


@pytest.mark.parametrize(
    "words", [["n_heads=8"], ["--n_heads=8"], ["--n_heads", "8"], ["--n-heads", "8"], ["n-heads=8"]]
)
def test_every_way_to_write_it(words: list[str]) -> None:
    assert parse(words, ModelConfig, BASE) == replace(BASE, n_heads=8)


@pytest.mark.parametrize(
    ("word", "field", "value"),
    [
        ("n_layers=1_000", "n_layers", 1000),
        ("n_kv_heads=4", "n_kv_heads", 4),
        ("window=none", "window", None),
        ("norm_eps=1e-6", "norm_eps", 1e-6),
        ("rope_theta=500000", "rope_theta", 500000.0),
        ("bias=False", "bias", False),
        ("qk_norm=yes", "qk_norm", True),
        ("norm=rmsnorm", "norm", "rmsnorm"),
        ("ngrams=[[2,512],[3,1024]]", "ngrams", ((2, 512), (3, 1024))),
        ("ngrams=((2, 512),)", "ngrams", ((2, 512),)),
        ("ngrams=[]", "ngrams", ()),
        ("n_layer=3", "n_layers", 3),
        ("n_head=6", "n_heads", 6),
        ("n_embd=96", "d_model", 96),
        ("block_size=64", "seq_len", 64),
    ],
)
def test_values_have_the_type_of_their_field(word: str, field: str, value: object) -> None:
    got = getattr(parse([word], ModelConfig, BASE), field)
    assert (got, type(got)) == (value, type(value))


def test_nanogpts_dropout_is_three() -> None:
    assert parse(["dropout=0.25"], ModelConfig, BASE) == replace(
        BASE, dropout_embed=0.25, dropout_attn=0.25, dropout_residual=0.25
    )
    train = TrainConfig(steps=1, batch_size=1)
    assert parse(["dropout=0.25"], TrainConfig, train) == replace(train, dropout=0.25)


def test_the_later_one_counts() -> None:
    cfg = parse(["dropout=0.25", "--dropout_attn", "0", "n_heads=2", "n_head=4"], ModelConfig, BASE)
    assert (cfg.dropout_embed, cfg.dropout_attn, cfg.n_heads) == (0.25, 0.0, 4)


def test_nothing_changes_nothing() -> None:
    assert parse([], ModelConfig, BASE) == BASE


def test_aliases_name_fields_and_hide_none() -> None:
    names = {f.name for f in fields(ModelConfig)}
    assert all(set(targets) <= names and alias not in names for alias, targets in ALIASES.items())


@pytest.mark.parametrize("name", list(PRESETS))
def test_every_field_reads_what_it_prints(name: str) -> None:
    words = [f"{k}={v}" for k, v in asdict(PRESETS[name]).items()]
    assert parse(words, ModelConfig, BASE) == PRESETS[name]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["n_heads=abc"], "n_heads=abc is not a whole number"),
        (["n_heads=1.5"], "n_heads=1.5 is not a whole number"),
        (["n_heads="], "n_heads= is not a whole number"),
        (["n_heads=none"], "n_heads=none is not a whole number"),
        (["n_embd=x"], "n_embd=x is not a whole number"),
        (["n_kv_heads=x"], "n_kv_heads=x is not a whole number or none"),
        (["rope_theta=nan"], "rope_theta=nan is not a number"),
        (["rope_theta=inf"], "rope_theta=inf is not a number"),
        (["tied=maybe"], "tied=maybe is not true or false"),
        (["norm=rmsnrm"], "norm=rmsnrm is not one of layernorm, rmsnorm; did you mean 'rmsnorm'?"),
        (["norm=zzz"], "norm=zzz is not one of layernorm, rmsnorm"),
        (["ngrams=2"], "ngrams=2 is not a list such as [[2, 16384], [3, 65536]]"),
        (["ngrams=[[2]]"], "ngrams=[[2]] is not a list such as [[2, 16384], [3, 65536]]"),
        (["ngrams=(("], "ngrams=(( is not a list such as [[2, 16384], [3, 65536]]"),
        (["n_haeds=4"], "ModelConfig has no field 'n_haeds'; did you mean 'n_heads'?"),
        (["n_lyer=4"], "ModelConfig has no field 'n_lyer'; did you mean 'n_layer'?"),
        (["--jsn"], "ModelConfig has no field 'jsn'; did you mean '--json'?"),
        (["zzzz=4"], "ModelConfig has no field 'zzzz'; choose from vocab_size, n_layers,"),
        (["=4"], "ModelConfig has no field ''; choose from vocab_size, n_layers,"),
        (["--tied"], "--tied has no value; write tied=true or false"),
        (["--tied", "n_heads=4"], "--tied has no value; write tied=true or false"),
        (["--tied", "--bias", "true"], "--tied has no value"),
        (["n_heads", "4"], "'n_heads' sets nothing; write KEY=VALUE or --KEY VALUE"),
        (["n_heads=5"], "d_model=768 is not divisible by n_heads=5; choose n_heads from 1, 2, 3, 4,"),
        (["--logit-softcap", "-1"], "logit_softcap=-1.0 must be positive"),
    ],
)
def test_every_refusal_is_one_line_that_says_what_to_write(words: list[str], says: str) -> None:
    with pytest.raises(ValueError, match="^" + re.escape(says)) as refused:
        parse(words, ModelConfig, BASE, also=["--json", "--batch"])
    assert "\n" not in str(refused.value)


def test_a_text_and_a_list_of_numbers() -> None:
    @dataclass(frozen=True)
    class Config:
        name: str = "x"
        sizes: tuple[int, ...] = ()

    assert parse(["name=a=b", "sizes=[1, 2]"], Config, Config()) == Config("a=b", (1, 2))
    assert describe(tuple[int, ...]) == "a list such as [1, 2]"


@given(st.lists(st.text(max_size=8), max_size=6))
def test_no_word_is_lost(words: list[str]) -> None:
    plain, pairs = split(words)
    assert len(plain) + len(pairs) <= len(words) <= len(plain) + 2 * len(pairs)
    assert split(plain) == (plain, [])


@given(st.text(max_size=30))
def test_no_value_raises_anything_but_value_error(text: str) -> None:
    for field in ("n_heads", "rope_theta", "tied", "norm", "ngrams", "window"):
        with contextlib.suppress(ValueError):
            parse([f"{field}={text}"], ModelConfig, BASE)
