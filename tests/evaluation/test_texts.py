"""Words and bytes of texts are counted as by hand, however the text is cut, and the loss is shared among them."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from fnlm import evaluation, tokenizers
from fnlm.data import DataError, Split
from fnlm.data.sources import PIECE, Piece

TEXT = "Größe  zählt,\tdas\u3000weiß man 😀.\nEnd"  # words: Größe zählt, das weiß man 😀. End
BYTES = 5 + 2 + 2 + 6 + 1 + 1 + 3 + 3 + 4 + 1 + 1 + 3 + 1 + 5 + 1 + 3


def test_by_hand() -> None:
    text = evaluation.text_of([Piece(TEXT)], tokenizers.named("byte"))
    assert (text.words, text.split.bytes, text.split.documents) == (7, BYTES, 1)
    assert text.split.tokens.tolist() == [256, *TEXT.encode("utf-8")]
    assert text.split.mask is not None and text.split.mask.tolist() == [0] + [1] * BYTES


@pytest.mark.parametrize("at", range(len(TEXT) + 1))
def test_a_cut_within_a_document_makes_no_word(at: int) -> None:
    cut = [Piece(TEXT[:at], True, False), Piece("", False, False), Piece(TEXT[at:], False, True), Piece("x y")]
    text = evaluation.text_of(cut, tokenizers.named("byte"))
    assert (text.words, text.split.bytes, text.split.documents) == (7 + 2, BYTES + 3, 2)


def test_a_long_file_comes_in_pieces(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("ab" * (2 * PIECE) + " c\n", encoding="utf-8")
    text = evaluation.read_text([str(tmp_path)], tokenizers.named("byte"))
    assert (text.words, text.split.bytes, int(text.split.mask.sum())) == (2, 4 * PIECE + 3, 4 * PIECE + 3)  # type: ignore[union-attr]


def test_words_of_prepared_tokens() -> None:
    tokenizer = tokenizers.named("byte")
    tokens = np.array([*TEXT.encode("utf-8"), 256, *b"more words", 256], np.uint16)
    for n in (1, 5, 1 << 16):  # blocks that cut characters and words
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("fnlm.evaluation.texts.BLOCK", n)
            assert evaluation.words_of(Split(tokens, None, 2, 0), tokenizer) == 9


def test_the_loss_is_shared_among_words_and_bytes() -> None:
    found = evaluation.normalised(2.0, 30, 10, 60)
    assert found.word_perplexity == pytest.approx(math.exp(6.0))
    assert found.byte_perplexity == pytest.approx(math.exp(1.0))
    assert found.bits_per_byte == pytest.approx(1 / math.log(2))
    assert evaluation.normalised(2.0, 30, None, None) == (None, None, None)
    assert evaluation.normalised(900.0, 30, 1, 1).word_perplexity == math.inf


def test_what_is_no_text(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no text in the text"):
        evaluation.text_of([], tokenizers.named("byte"))
    (tmp_path / "a.txt").write_text("abc", encoding="utf-8")
    with pytest.raises(DataError, match=r"a\.txt: character 'c'"):
        evaluation.read_text([str(tmp_path / "a.txt")], tokenizers.train("char", ["ab"]))
