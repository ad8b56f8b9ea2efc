"""The demo's world: the same text everywhere, its entropy by brute force, answers that a reader of the text finds."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from hashlib import sha256
from itertools import islice
from pathlib import Path

import pytest

from fnlm import world
from fnlm.world.choices import every
from fnlm.world.story import write

W = world.ENGLISH
PAGE = Path(__file__).parents[1] / "docs" / "world.md"


def tokens(text: str) -> list[str]:
    return re.findall(r"\w+|[^\w\s]", text)


def sentences(text: str) -> list[str]:
    return re.split(r"(?<=[.?!])\s", text)


def told_and_asked(story: str) -> tuple[list[str], list[str]]:
    """The sentences of the story, and the questions and answers in turn."""
    said = sentences(story)
    first = min(i for i, sentence in enumerate([*said, "?"]) if sentence.endswith("?"))
    return said[:first], said[first:]


def text_of(messages: list[dict[str, str]]) -> str:
    return " ".join(m["content"] for m in messages)


# A reader of its own: it knows the sentences, and nothing of how they were made.


class Reader:
    """What a text says: who has held what, who has been where, what has which colour; and how it is in the end."""

    def __init__(self, text: str) -> None:
        self.held: defaultdict[str, set[str]] = defaultdict(set)
        self.been: defaultdict[str, set[str]] = defaultdict(set)
        self.pairs: set[tuple[str, str]] = set()
        self.holder: dict[str, str] = {}
        self.place: dict[str, str] = {}
        self.colour: dict[str, str] = {}
        for sentence in sentences(text):
            if not sentence.endswith("?"):
                self.read(tokens(sentence))

    def read(self, said: list[str]) -> None:
        names = [w for w in said if w in W.names]
        things = [w for w in said if w in W.objects]
        if "gave" in said:
            self.holder[things[0]] = names[1]
        elif names and things:
            self.holder[things[0]] = names[0]
        for thing, name in self.holder.items():
            self.held[name].add(thing)
        for place in {*said} & {*W.places} if names and said[-2:-1] != ["place"] else ():
            self.place[names[-1]] = place
            self.been[names[-1]].add(place)
        for colour in {*said} & {*W.colours} if things else ():
            self.colour[things[0]] = colour
            self.pairs.add((things[0], colour))

    def triples(self) -> set[tuple[str, str, str]]:
        return {(n, o, p) for n, held in self.held.items() for o in held for p in self.been[n]}

    def answer(self, question: str) -> tuple[str, str]:
        """The deciding word, and which kind of word it is."""
        asked = tokens(question)
        about = next((w for w in asked if w in (*W.names, *W.objects, *W.colours)), "")
        if "colour" in asked:
            return self.colour[about], "colours"
        if about in W.colours:
            (thing,) = (o for o, c in self.colour.items() if c == about)
            return thing, "objects"
        if asked[0] in ("Who", "Whose"):
            return self.holder[about], "names"
        if asked[0] == "Where":
            return self.place[about if about in W.names else self.holder[about]], "places"
        things = [o for o, n in self.holder.items() if n == about]
        if "many" in asked:
            return ("zero", "one", "two")[len(things)], "numbers"
        (thing,) = things
        return thing, "objects"


def says(answer: str, word: str, kind: str) -> bool:
    known = {"zero", "one", "two"} if kind == "numbers" else set(getattr(W, kind))
    return {w for w in tokens(answer) if w in known} == {word}


TRAINING = [*world.stories(3, 4000), *(text_of(chat) for chat in world.chats(3, 4000))]
QUESTIONS = world.questions(0, 360)


# The text


def test_the_same_text_everywhere() -> None:
    texts = [*world.stories(7, 300), *map(str, world.chats(7, 300)), *map(str, world.questions(7, 90))]
    assert sha256("\n".join(texts).encode()).hexdigest()[:16] == "b45f7ae878baca82"


def test_text_i_depends_on_seed_and_i_only() -> None:
    assert list(world.stories(1, 5)) == list(islice(world.stories(1, 1 << 60), 5))
    assert list(world.chats(1, 5)) == list(islice(world.chats(1, 1 << 60), 5))
    assert world.questions(1, 5) == world.questions(1, 9)[:5]
    assert len({*world.stories(1, 200), *world.stories(2, 200)}) > 390


def test_stories_are_short_and_differ_in_length() -> None:
    texts = list(world.stories(5, 2000))
    lengths = {len(told_and_asked(text)[0]) for text in texts}
    assert (min(lengths), max(lengths)) == (5, 17)
    assert len(lengths) > 8
    assert {len(told_and_asked(text)[1]) for text in texts} == {2 * n for n in W.asked}
    assert max(len(tokens(text)) for text in texts) < 240


def test_few_words() -> None:
    words = {w for text in TRAINING for w in tokens(text)}
    assert 150 < len(words) < 200
    assert {w for q in QUESTIONS for w in [*tokens(q.answer), *tokens(text_of(q.messages))]} <= words


def test_chats_are_turns_that_end_with_the_assistant() -> None:
    for chat in world.chats(2, 500):
        assert [m["role"] for m in chat] == ["user", "assistant"] * (len(chat) // 2)
        assert 2 <= len(chat) <= 12
        assert all(m["content"] == m["content"].strip() != "" and set(m) == {"role", "content"} for m in chat)


def test_a_story_ends_in_the_words_of_its_answers() -> None:
    """Who reads on where the same words stood before has the answer, but for "one thing" and "It is the red kite"."""
    other = 0
    for story in world.stories(4, 500):
        told, asked = told_and_asked(story)
        for answer in asked[1::2]:
            known = any(sentence in told for sentence in sentences(answer.replace(", and ", ". ")))
            assert known or "one thing" in answer or answer.startswith("It is"), story
            other += not known
    assert other


@pytest.mark.parametrize("make", [world.stories, world.chats, world.questions, world.nats])
def test_negative_numbers_are_refused(make: object) -> None:
    assert callable(make)
    with pytest.raises(ValueError, match="n=-1 is negative"):
        make(0, -1)
    with pytest.raises(ValueError, match="seed=-2 is negative"):
        make(-2, 1)


# Entropy


def small(**fields: tuple[object, ...]) -> world.Grammar:
    """A few words and the first template of each fact, unless given, and no questions."""
    short = {name: words[:1] for name, words in W._asdict().items()}
    words = {"names": W.names[:2], "objects": W.objects[:2], "colours": W.colours[:3], "places": W.places[:4]}
    return world.Grammar(**{**short, **words, "asked": (0,), **fields})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "grammar",
    [
        small(),
        small(people=(1,), layouts=W.layouts, has=W.has, stays=W.stays, both=W.both, goes=W.goes),
        small(people=(1, 2), places=W.places[:6]),
        small(people=(1,), asked=(0, 1, 2)),
        small(people=(2,), places=W.places[:5], names=W.names[:3], gives=W.gives[:2]),
    ],
    ids=["one person", "all templates", "two people", "questions", "gifts"],
)
def test_entropy_is_that_of_all_texts(grammar: world.Grammar) -> None:
    found: defaultdict[str, float] = defaultdict(float)
    for text, p, length in every(lambda choices: write(choices, grammar)):
        found[text] += p
        assert math.isclose(p, math.exp(-length), rel_tol=1e-9)
    assert len(found) > 60
    assert math.isclose(sum(found.values()), 1, rel_tol=1e-9)
    brute = -sum(p * math.log(p) for p in found.values())
    assert math.isclose(world.entropy(grammar), brute, rel_tol=1e-9)


def test_two_choices_of_one_text_are_noticed() -> None:
    """The brute force sees what the formula assumes: that templates differ."""
    grammar = small(both=W.both[:1] * 2)
    found: defaultdict[str, float] = defaultdict(float)
    for text, p, _ in every(lambda choices: write(choices, grammar)):
        found[text] += p
    brute = -sum(p * math.log(p) for p in found.values())
    assert math.isclose(world.entropy(grammar) - brute, math.log(2), rel_tol=1e-9)


def test_nats_are_those_of_each_story() -> None:
    lengths = list(world.nats(11, 8000))
    mean = sum(lengths) / len(lengths)
    error = math.sqrt(sum((x - mean) ** 2 for x in lengths)) / len(lengths)
    assert abs(mean - world.entropy()) < 4 * error < 1
    story, length = next(world.stories(11, 1)), lengths[0]
    assert {story} == {s for s, x in zip(world.stories(11, 8000), lengths, strict=True) if x == length and s == story}


# Held out


def test_training_never_holds_what_is_held_out() -> None:
    triples, pairs = set(), set()
    for text in TRAINING:
        reader = Reader(text)
        triples |= reader.triples()
        pairs |= reader.pairs
    allowed = {(o, c) for o in W.objects for c in world.allowed_colours(W, o)}
    assert pairs == allowed  # and every other combination is seen
    for n, o, p in triples:
        assert p in world.allowed_places(W, n, (o,))
    assert len(triples) > 0.9 * len(W.names) * len(W.objects) * (len(W.places) - 1)


def test_questions_are_about_what_is_held_out() -> None:
    for question in QUESTIONS:
        reader = Reader(text_of(question.messages))
        if "colour" in question.kind:
            assert any(c not in world.allowed_colours(W, o) for o, c in reader.pairs), question
        else:
            new = {(n, o, p) for n, o, p in reader.triples() if p not in world.allowed_places(W, n, (o,))}
            assert new, question


def test_two_objects_take_away_two_places() -> None:
    for n in W.names:
        for a, b in (("kite", "ball"), ("ball", "kite"), ("pen", "box")):
            both = set(world.allowed_places(W, n, (a, b)))
            assert len(both) == len(W.places) - 2
            assert both <= set(world.allowed_places(W, n, (a,))) & set(world.allowed_places(W, n, (b,)))


def test_every_kind_is_asked_equally_often() -> None:
    kinds = [q.kind for q in QUESTIONS]
    assert list(dict.fromkeys(kinds)) == list(world.KINDS)
    assert {kinds.count(kind) for kind in world.KINDS} == {40}


# Answers


def test_a_reader_finds_every_answer() -> None:
    for question in QUESTIONS:
        story = question.messages[-1]["content"]
        word, kind = Reader(story).answer(sentences(story)[-1])
        assert says(question.answer, word, kind), question


def test_a_reader_finds_the_answers_of_stories_and_chats() -> None:
    found = 0
    for story in world.stories(8, 1000):
        told, asked = told_and_asked(story)
        for ask, answer in zip(asked[::2], asked[1::2], strict=True):
            assert says(answer, *Reader(" ".join(told)).answer(ask)), story
            found += 1
    for chat in world.chats(8, 1000):
        story, _, asked = chat[0]["content"].rpartition(". ")
        if story:
            turns = [asked, *(m["content"] for m in chat[1:])]
            for ask, answer in zip(turns[::2], turns[1::2], strict=True):
                assert says(answer, *Reader(story + ".").answer(ask)), chat
                found += 1
    assert found > 2500


def test_no_question_is_answered_by_a_fixed_guess() -> None:
    for kind in world.KINDS:
        answers = [q.answer for q in QUESTIONS if q.kind == kind]
        key = {"counting": ("zero", "one", "two")}.get(kind, ())
        shares = [sum(w in tokens(a) for a in answers) / len(answers) for w in (*key, *W.places, *W.colours)]
        assert max(shares) < 0.75, kind


# Score


def test_true_answers_score_one() -> None:
    shares = world.score([q.answer for q in QUESTIONS], QUESTIONS)
    assert shares == dict.fromkeys([*world.KINDS, "overall"], 1.0)
    assert world.score([q.answer.upper() for q in QUESTIONS], QUESTIONS) == shares


def test_score_per_kind() -> None:
    asked = [world.Question([], "The kite is red.", "colour"), world.Question([], "Mia has two things.", "counting")]
    asked += [world.Question([], "The kite belongs to Mia, and Mia is in the garden.", "where-object")]
    said = ["It is blue.", "two", "In the garden."]
    assert world.score(said, asked) == {
        "colour": 0.0,
        "where-object": 1.0,
        "counting": 1.0,
        "overall": pytest.approx(2 / 3),
    }


@pytest.mark.parametrize("said", ["", "It is red or blue.", "reddish", "The kite.", "blue red green"])
def test_what_is_not_the_answer(said: str) -> None:
    asked = [world.Question([], "The kite is red.", "colour")]
    assert world.score([said], asked)["overall"] == 0
    assert world.score(["I think it is red!"], asked)["overall"] == 1


def test_score_wants_one_answer_to_each() -> None:
    with pytest.raises(ValueError, match="1 answers to 2 questions"):
        world.score([""], QUESTIONS[:2])
    with pytest.raises(ValueError, match="0 answers to 0"):
        world.score([], [])


# The page


def test_the_page_shows_what_is_written() -> None:
    page = PAGE.read_text(encoding="utf-8")
    shown = " ".join(page.replace("> ", "").split())
    assert all(" ".join(story.split()) in shown for story in world.stories(0, 3))
    for q in world.questions(0, 9):
        assert f"| `{q.kind}` |" in page
    assert f"{world.entropy():.2f} nats" in page
