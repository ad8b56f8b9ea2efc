"""Each cleaning step by golden cases and properties."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fnlm.cleaning import gopher, language_of, luhn, masked, repetition
from fnlm.cleaning.duplicates import Exact, Memory, MinHash, shingles

GOOD = (
    "The old lighthouse keeper climbed the narrow stairs every evening and lit the great lamp with a steady hand. "
    "Ships that passed in the night would look for its beam, and their captains knew that they were close to home. "
    "One winter a storm came from the north, so strong that waves broke over the rocks and shook the walls around him."
)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (GOOD, None),
        (" ".join(GOOD.split()[:49]), "number of words"),
        ("a " * 60, "mean word length"),
        (GOOD.replace(" ", " # ", 20), "symbols"),
        (GOOD.replace(" ", " … ", 20), "symbols"),
        ("\n".join(f"- {line}" for line in GOOD.split(". ")), "bullets"),
        ("\n".join(f"{line}..." for line in GOOD.split(". ")), "lines that end in an ellipsis"),
        (GOOD + " " + "12345 " * 40, "words without a letter"),
        ("lorem ipsum dolor amet " * 20, "stop words"),
        ("\n".join([*GOOD.split(". "), *["The same line again with the words that be."] * 3]), "repeated lines"),
        (GOOD + " and the sea" * 40, "most frequent 2-gram"),
        (GOOD + " " + " ".join(GOOD.split()[:30]), "repeated 5-grams"),
    ],
)
def test_gophers_rules(text: str, reason: str | None) -> None:
    assert gopher(text) == reason


@given(st.text(max_size=300))
def test_gopher_takes_any_text(text: str) -> None:
    assert gopher(text) is None or isinstance(gopher(text), str)


def test_repetition_counts_each_character_once() -> None:
    words = [f"word{i:03}" for i in range(100)]
    assert repetition(" ".join(words)) is None
    assert repetition(" ".join([*words, *words[:10]])) is None  # 10 of 110 words, below the 10 % of 10-grams
    assert repetition(" ".join([*words, *words[:19]])) == "repeated 5-grams"


@pytest.mark.parametrize(
    ("text", "after"),
    [
        ("write to jane.doe+x@mail.example.org.", "write to [EMAIL]."),
        ("a@b is no address, nor is @home", "a@b is no address, nor is @home"),
        ("from 192.0.2.17, not 300.1.2.3 or 1.2.3", "from [IP], not 300.1.2.3 or 1.2.3"),
        ("at 2001:db8::8a2e:370:7334 and ::", "at [IP] and ::"),
        ("card 4539 1488 0343 6467!", "card [CARD]!"),
        ("card 4539-1488-0343-6468?", "card 4539-1488-0343-6468?"),
        ("call +49 30 123456 or (212) 555-0199", "call [PHONE] or [PHONE]"),
        ("call 1-212-555-0199 or 212.555.0199", "call [PHONE] or [PHONE]"),
        ("in 1984 there were 1,000,000 of 3.14159", "in 1984 there were 1,000,000 of 3.14159"),
        ("version 1.2.3.4.5 at 12:30:45", "version 1.2.3.4.5 at 12:30:45"),
    ],
)
def test_masks(text: str, after: str) -> None:
    assert masked(text) == (after, after.count("["))


PARTS = st.sampled_from(
    ["+49 30 123456", "a@b.org", "10.0.0.1", "4539148803436467", "212-555-0199", "x", "7", ".", ":"]
)


@given(st.lists(PARTS | st.text(max_size=8), max_size=8).map(" ".join))
def test_masking_twice_is_masking_once(text: str) -> None:
    once, _ = masked(text)
    assert masked(once) == (once, 0)


@given(st.text(alphabet="abc XYZ.,-\n", max_size=80))
def test_words_are_left_alone(text: str) -> None:
    assert masked(text) == (text, 0)


@given(st.integers(10**11, 10**17))
@example(453914880343646)
def test_exactly_one_check_digit_satisfies_luhn(number: int) -> None:
    assert sum(luhn(f"{number}{digit}") for digit in range(10)) == 1


LANGUAGES = {
    "en": GOOD,
    "de": "Der alte Wärter stieg jeden Abend die schmale Treppe hinauf und zündete mit ruhiger Hand die Lampe an, "
    "die den Schiffen den Weg nach Hause zeigte. Es war nicht leicht, aber er hatte es sich so ausgesucht.",
    "fr": "Le vieux gardien montait chaque soir l'escalier étroit et allumait la grande lampe qui montrait le chemin "
    "aux bateaux. Ce n'était pas facile, mais il avait choisi cette vie avec les vagues et le vent pour voisins.",
    "es": "El viejo farero subía cada noche la escalera estrecha y encendía la lámpara que mostraba el camino a los "
    "barcos. No era fácil, pero había elegido esa vida con las olas y el viento como vecinos de su casa.",
    "ru": "Старый смотритель каждый вечер поднимался по узкой лестнице и зажигал большую лампу.",
    "ja": "古い灯台守は毎晩狭い階段を上り、大きなランプに火をともしました。船はその光を頼りに帰ります。",
    "zh": "老守塔人每天晚上都爬上狭窄的楼梯，点亮大灯，船只靠着它的光芒回家，他喜欢这样的生活。",
}


@pytest.mark.parametrize("language", LANGUAGES)
def test_languages(language: str) -> None:
    assert language_of(LANGUAGES[language]) == language


def test_too_little_text_and_no_language() -> None:
    assert language_of("Bonjour") is None
    assert language_of("xq vb " * 30) == ""


@contextmanager
def memory(folder: Path, kind: type[Exact] | type[MinHash], size: int = 0) -> Iterator[Memory]:
    made = Memory(folder / kind.__name__, kind.RECORD, size)
    try:
        yield made
    finally:
        made.flush()
        made.close()


@given(st.lists(st.sampled_from(["a", "b", " a", "c\n", "ab"])))
@settings(max_examples=20)
def test_the_first_of_each_text_is_new(tmp_path_factory: pytest.TempPathFactory, texts: list[str]) -> None:
    with memory(tmp_path_factory.mktemp("x"), Exact) as made:
        step = Exact(made)
        kept = [text for text in texts if step.is_new(Exact.measure(text))]
    assert [t.strip() for t in kept] == list(dict.fromkeys(t.strip() for t in texts))


def test_near_duplicates(tmp_path: Path) -> None:
    pytest.importorskip("datasketch")
    words = [f"w{i}" for i in range(400)]
    near, far = " ".join([*words, "and", "one", "more"]), " ".join([*words[:200], *words[300:][::-1]])
    with memory(tmp_path, MinHash) as made:
        step = MinHash(made)
        for text, new in (
            (" ".join(words), True),
            (near, False),
            (near.upper() + "!", False),
            (far, True),
            (far, False),
        ):
            assert step.is_new(MinHash.measure(text)) is new
    with memory(tmp_path, MinHash, made.size) as kept:  # what it remembers survives
        step = MinHash(kept)
        assert not step.is_new(MinHash.measure(near))
        assert step.is_new(MinHash.measure("something else"))


def test_the_estimate_is_near_the_similarity() -> None:
    np = pytest.importorskip("numpy")
    pytest.importorskip("datasketch")
    words = [f"w{i}" for i in range(500)]
    for cut in (50, 150, 250):
        one, other = " ".join(words), " ".join(words[cut:])
        a, b = shingles(one), shingles(other)
        x, y = (np.frombuffer(MinHash.measure(text), "<u4") for text in (one, other))
        assert abs((x == y).mean() - len(a & b) / len(a | b)) < 0.12


def test_what_is_after_the_size_does_not_count(tmp_path: Path) -> None:
    with memory(tmp_path, Exact) as made:
        step = Exact(made)
        assert [step.is_new(Exact.measure(text)) for text in "ab"] == [True, True]
    with memory(tmp_path, Exact, Exact.RECORD) as kept:
        step = Exact(kept)
        assert [step.is_new(Exact.measure(text)) for text in "ab"] == [False, True]
