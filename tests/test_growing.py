"""A model learns special tokens that were put behind its own: rows for them, and nothing else changes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

import fnlm
from cli.main import cli
from fnlm import tokenizers
from fnlm.growing import added, grown
from fnlm.tokenizers import CHAT_SPECIAL, Byte, Char, Tokenizer
from fnlm.trained import Trained, load
from tests.cli.test_sample import save

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


def test_a_model_of_text_is_finetuned_on_chatml(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prepared with the model's tokenizer and ChatML's tokens behind it; trained, and asked by them."""
    monkeypatch.chdir(tmp_path)
    save(tmp_path / "base", Byte([]), "text", seq_len=96)
    rows = [{"prompt": "abc" * i, "completion": "fed" * i} for i in range(1, 21)]
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = CliRunner()
    special = [word for token in CHAT_SPECIAL for word in ("--special", token)]
    refused = run.invoke(cli, ["prepare", "chats.jsonl", "--tokenizer", "base", "--out", "chats"])
    assert refused.exit_code == 4
    assert "add them with --special" in refused.stderr
    for words in (
        ["prepare", "chats.jsonl", "--tokenizer", "base", *special, "--out", "chats"],
        ["finetune", "base", "chats", "--out", "tuned", "steps=2", "batch_size=2", "precision=fp32"],
        ["finetune", "tuned", "chats", "--out", "again", "steps=2", "batch_size=2", "precision=fp32"],
    ):
        done = run.invoke(cli, words)
        assert done.exit_code == 0, done.stderr
        assert ("new to the model" in done.stderr) == (words[:2] == ["finetune", "base"])
    tuned = load("tuned")
    assert tuned.tokenizer.special.keys() == set(CHAT_SPECIAL)
    assert tuned.cfg.vocab_size >= tuned.tokenizer.vocab_size
    said = run.invoke(cli, ["sample", "tuned", "--chat", "--prompt", "abc", "--seed", "1", "--max-new-tokens", "5"])
    assert said.exit_code == 0, said.stderr
