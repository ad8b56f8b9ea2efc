"""Stories: two to eight sentences about a scene, then a few questions with their answers."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import zip_longest

from fnlm.world.choices import Choices, Draw, every
from fnlm.world.grammar import ENGLISH, Grammar
from fnlm.world.questions import all_questions, exchange
from fnlm.world.scene import Scene, make_scene

MOST_AT_LENGTH = 2  # of more people the shortest layout tells: eight sentences are soon full


def stories(seed: int, n: int, grammar: Grammar = ENGLISH) -> Iterator[str]:
    """`n` stories for pretraining; story i depends on the seed and i only. ValueError for a negative number."""
    return (text for text, _ in _drawn(seed, n, grammar))


def nats(seed: int, n: int, grammar: Grammar = ENGLISH) -> Iterator[float]:
    """Minus the log of the probability of each of `stories(seed, n)`: the least loss, summed over the whole story with
    its end, that a model can have on average."""
    return (length for _, length in _drawn(seed, n, grammar))


def entropy(grammar: Grammar = ENGLISH) -> float:
    """The entropy of a story in nats, exact: choices are uniform, and no two sequences of them give the same text."""
    return sum(p * length for _, p, length in every(lambda choices: write(choices, grammar), fills=False))


def _drawn(seed: int, n: int, grammar: Grammar) -> Iterator[tuple[str, float]]:
    check(seed, n)
    return (_one(Draw("story", seed, i), grammar) for i in range(n))


def _one(draw: Draw, grammar: Grammar) -> tuple[str, float]:
    return write(draw, grammar), draw.nats


def check(seed: int, n: int) -> None:
    """ValueError unless seed and count are whole numbers from 0."""
    for name, value in (("seed", seed), ("n", n)):
        if value < 0:
            raise ValueError(f"{name}={value} is negative; choose 0 or more")


def write(choices: Choices, grammar: Grammar) -> str:
    """One story."""
    scene = make_scene(choices, grammar)
    sentences = tell(choices, grammar, scene)
    left = all_questions(scene)
    for _ in range(choices.branch(grammar.asked)):
        question = choices.fill(left)
        left.remove(question)
        sentences += exchange(scene, *question)
    return " ".join(sentences)


def tell(choices: Choices, grammar: Grammar, scene: Scene) -> list[str]:
    """The sentences of a scene: the facts, person by person or in turns, then the events."""
    everyone = range(len(scene.names))
    layouts = grammar.layouts if len(everyone) <= MOST_AT_LENGTH else grammar.layouts[:1]
    facts = [[_fact(choices, grammar, scene, kind, i) for kind in choices.branch(layouts)] for i in everyone]
    by_turns = [fact for turn in zip_longest(*facts) for fact in turn if fact]
    by_person = [fact for person in facts for fact in person]
    told = choices.branch((by_person, by_turns)) if len(facts) > 1 else by_person
    return told + [_event(choices, grammar, scene, event) for event in scene.events]


def _fact(choices: Choices, grammar: Grammar, scene: Scene, kind: str, i: int) -> str:
    template: str = choices.fill(getattr(grammar, kind))
    return template.format(n=scene.names[i], o=scene.objects[i], c=scene.colours[i], p=scene.places[i])


def _event(choices: Choices, grammar: Grammar, scene: Scene, event: str) -> str:
    if event == "move":
        return choices.fill(grammar.goes).format(n=scene.names[scene.mover], p=scene.destination)
    thing = {"o": scene.objects[scene.giver], "c": scene.colours[scene.giver]}
    names = {"n": scene.names[scene.giver], "m": scene.names[scene.receiver]}
    return choices.fill(grammar.gives).format(**thing, **names)
