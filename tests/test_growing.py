"""A model learns special tokens that were put behind its own: rows for them, and nothing else changes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

import fnlm
from fnlm import tokenizers
from fnlm.growing import added, grown
from fnlm.tokenizers import CHAT_SPECIAL, Byte, Char, Tokenizer
from fnlm.trained import Trained

OWN = Char("\n abcdefgh", ["<|endoftext|>"])


def model(tied: bool = True, padded: int = 0, tokenizer: Tokenizer = OWN) -> Trained:
    cfg = fnlm.ModelConfig(
        vocab_size=tokenizer.vocab_size + padded, n_layers=1, n_heads=2, d_model=16, seq_len=24, tied=tied
    )
    return Trained(cfg, fnlm.init_params(cfg, fnlm.key(0)), tokenizer, Path("base"), 0, {}, {})


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("padded", [0, 1, 64])
def test_what_it_said_of_its_own_tokens_stays(tied: bool, padded: int) -> None:
    base = model(tied, padded)
    new = tokenizers.extended(OWN, CHAT_SPECIAL)
    more = grown(base, new)
    n, ids = OWN.vocab_size, [new.special[t] for t in added(base, new)]
    assert [t for t in new.special if new.special[t] in ids] == ["<|im_start|>", "<|im_end|>"]
    assert more.cfg.vocab_size == max(n + padded, new.vocab_size)
    assert {k: tuple(p.shape) for k, p in more.params.items()} == dict(fnlm.params.shapes(more.cfg))
    tokens = torch.arange(20).view(1, 20) % n
    was, now = (fnlm.forward(m.params, tokens, m.cfg)[..., :n] for m in (base, more))
    torch.testing.assert_close(was, now)
    rows = more.params["embed.tokens.weight"]
    assert not torch.equal(*rows[ids])
    mean, spread = rows[:n].mean(0), rows[:n].std(0)
    assert float(((rows[ids] - mean) / spread).abs().max()) < 0.5


def test_other_tokenizers_add_nothing() -> None:
    base = model()
    for other in (OWN, Byte(CHAT_SPECIAL), Char("\n abcdefgh", CHAT_SPECIAL[1:]), Char("\n abcdefghi", CHAT_SPECIAL)):
        assert added(base, other) == []
        assert grown(base, other) is base


def test_n_grams_would_lie_elsewhere() -> None:
    base = model()
    hashed = base._replace(cfg=replace(base.cfg, ngrams=((2, 40),)))
    assert added(hashed, tokenizers.extended(OWN, CHAT_SPECIAL)) == []
