"""Stories: who came where with what, what happened, how all is in the end, and a few questions with their answers."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import zip_longest

from fnlm.world.choices import Choices, Draw, every
from fnlm.world.grammar import ENGLISH, Grammar
from fnlm.world.questions import all_questions, belongings, exchange
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
    lines = [" ".join(tell(choices, grammar, scene))]
    left = all_questions(scene)
    for _ in range(choices.branch(grammar.asked)):
        question = choices.fill(left)
        left.remove(question)
        lines += exchange(scene, *question)
    return "\n".join(lines)


def tell(choices: Choices, grammar: Grammar, scene: Scene) -> list[str]:
    """The sentences of a scene: the facts, person by person or in turns, the events, and in any order how it ends."""
    everyone = range(len(scene.names))
    layouts = grammar.layouts if len(everyone) <= MOST_AT_LENGTH else grammar.layouts[:1]
    facts = [[_fact(choices, grammar, scene, kind, i) for kind in choices.branch(layouts)] for i in everyone]
    by_turns = [fact for turn in zip_longest(*facts) for fact in turn if fact]
    by_person = [fact for person in facts for fact in person]
    told = choices.branch((by_person, by_turns)) if by_person != by_turns else by_person
    told += [_event(choices, grammar, scene, event) for event in scene.events]
    left = [state for i in everyone for state in _states(grammar, scene, i)]
    while left:
        told.append(choices.fill(left))
        left.remove(told[-1])
    return told


def _states(grammar: Grammar, scene: Scene, i: int) -> list[str]:
    """How it is in the end with person i and with the object they brought."""
    holder = scene.names[scene.holder(i)]
    fields = {"n": scene.names[i], "m": holder, "o": scene.objects[i], "c": scene.colours[i], "p": scene.place(i)}
    return [template.format(**fields, things=belongings(scene, i)) for template in grammar.states]


def _fact(choices: Choices, grammar: Grammar, scene: Scene, kind: str, i: int) -> str:
    template: str = choices.fill(getattr(grammar, kind))
    return template.format(n=scene.names[i], o=scene.objects[i], c=scene.colours[i], p=scene.places[i])


def _event(choices: Choices, grammar: Grammar, scene: Scene, event: str) -> str:
    if event == "move":
        return choices.fill(grammar.goes).format(n=scene.names[scene.mover], p=scene.destination)
    thing = {"o": scene.objects[scene.giver], "c": scene.colours[scene.giver]}
    names = {"n": scene.names[scene.giver], "m": scene.names[scene.receiver]}
    return choices.fill(grammar.gives).format(**thing, **names)
