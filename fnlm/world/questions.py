"""Questions about a scene, their answers, and how many of them someone answered."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from fnlm.world.grammar import ENGLISH, NUMBERS, Grammar
from fnlm.world.scene import Scene

Message = dict[str, str]


class Question(NamedTuple):
    """What a user says, as chat messages, the answer in one sentence, and the kind of question, one of KINDS."""

    messages: list[Message]
    answer: str
    kind: str


class Kind(NamedTuple):
    """How to ask and to answer, about people or objects, which words decide (see `score`), and which of them it fits.

    Templates name a person {n}, an object {o}, its colour {c}, a place {p} and a number of {things}. The answers repeat
    the question's words and go on: one object, then its owner, then where the owner is.
    """

    ask: tuple[str, ...]
    answer: str
    about: str
    key: str
    fits: Callable[[Scene, int], bool] = lambda scene, i: True


def _moved(scene: Scene, person: int) -> bool:
    return person == scene.mover


def _given(scene: Scene, thing: int) -> bool:
    return thing == scene.giver


_WHERE, _OWNER = ("Where is {n}?", "Where is {n} now?"), ("Who has the {o}?", "Whose is the {o}?")
KINDS: dict[str, Kind] = {
    "where": Kind(_WHERE, "{n} is in the {p}.", "people", "places", lambda s, i: not _moved(s, i)),
    "where-after-move": Kind(_WHERE, "{n} is in the {p}.", "people", "places", _moved),
    "what": Kind(
        ("What does {n} have?",), "{n} has a {c} {o}.", "people", "objects", lambda s, i: len(s.things(i)) == 1
    ),
    "colour": Kind(
        ("What colour is the {o}?", "What is the colour of the {o}?"), "The {o} is {c}.", "objects", "colours"
    ),
    "owner": Kind(_OWNER, "The {o} belongs to {n}.", "objects", "names", lambda s, i: not _given(s, i)),
    "owner-after-give": Kind(_OWNER, "The {o} belongs to {n}.", "objects", "names", _given),
    "which-by-colour": Kind(("Which thing is {c}?", "What is {c}?"), "It is the {c} {o}.", "objects", "objects"),
    "where-object": Kind(
        ("Where is the {o}?", "Where is the {o} now?"), "The {o} belongs to {n}, and {n} is in the {p}.",
        "objects", "places",
    ),
    "counting": Kind(
        ("How many things does {n} have?",), "{n} has {things}.", "people", "numbers", lambda s, i: s.giver >= 0
    ),
}  # fmt: skip


def subjects(scene: Scene, kind: str) -> list[int]:
    """The people or objects, by number, that a question of this kind may be about."""
    fits = KINDS[kind].fits
    return [i for i in range(len(scene.names)) if fits(scene, i)]


def facts(scene: Scene, kind: str, subject: int) -> tuple[int, int | None]:
    """The person a question is about, and the object: for a question about a person the only one they have, or None."""
    if KINDS[kind].about == "objects":
        return scene.holder(subject), subject
    things = scene.things(subject)
    return subject, things[0] if len(things) == 1 else None


def belongings(scene: Scene, person: int) -> str:
    """What someone has in the end: "a red kite", or how many things."""
    things = scene.things(person)
    if len(things) == 1:
        return f"a {scene.colours[things[0]]} {scene.objects[things[0]]}"
    return f"{NUMBERS[len(things)]} things"


def _fields(scene: Scene, kind: str, subject: int) -> dict[str, str]:
    person, thing = facts(scene, kind, subject)
    count = len(scene.things(person))
    fields = {"n": scene.names[person], "p": scene.place(person)}
    fields["things"] = f"{NUMBERS[count]} thing" + "s" * (count != 1)
    return fields if thing is None else {**fields, "o": scene.objects[thing], "c": scene.colours[thing]}


def exchange(scene: Scene, kind: str, subject: int, asked: str) -> tuple[str, str]:
    """A question after the template `asked`, and its answer, one sentence."""
    fields = _fields(scene, kind, subject)
    return asked.format(**fields), KINDS[kind].answer.format(**fields)


def all_questions(scene: Scene, kinds: Iterable[str] = KINDS) -> list[tuple[str, int, str]]:
    """Every question of these kinds, in each phrasing: arguments of `exchange`."""
    return [(kind, i, asked) for kind in kinds for i in subjects(scene, kind) for asked in KINDS[kind].ask]


def score(answers: Sequence[str], questions: Sequence[Question], grammar: Grammar = ENGLISH) -> dict[str, float]:
    """The share of right answers, for each kind asked and "overall".

    An answer is right when the words in it that could be the key are those of the true answer and no others: of all
    places it names only the garden, of all numbers only two. ValueError where the counts differ, or nothing is asked.
    """
    if len(answers) != len(questions) or not questions:
        raise ValueError(f"{len(answers)} answers to {len(questions)} questions; give one to each, and at least one")
    right: dict[str, list[bool]] = {}
    for said, question in zip(answers, questions, strict=True):
        right.setdefault(question.kind, []).append(is_right(said, question, grammar))
    shares = {kind: sum(right[kind]) / len(right[kind]) for kind in KINDS if kind in right}
    return {**shares, "overall": sum(map(sum, right.values())) / len(questions)}


def is_right(said: str, question: Question, grammar: Grammar = ENGLISH) -> bool:
    """Whether the deciding words of what was said are those of the true answer."""
    key = KINDS[question.kind].key
    known = {word.casefold() for word in (NUMBERS if key == "numbers" else getattr(grammar, key))}
    return _words(said) & known == _words(question.answer) & known


def _words(text: str) -> set[str]:
    return set(re.findall(r"\w+", text.casefold()))
