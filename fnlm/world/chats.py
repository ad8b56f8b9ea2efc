"""Chats: a user tells a short story and asks about it, or asks general things; and the questions held out from them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from fnlm.world.choices import Choices, Draw
from fnlm.world.grammar import ENGLISH, Grammar, allowed_colours, is_held_out
from fnlm.world.questions import KINDS, Message, Question, all_questions, exchange, facts, subjects
from fnlm.world.scene import Scene, make_scene
from fnlm.world.story import check, tell
from fnlm.world.talk import small_talk

MOST_TURNS = 6
STORIES_IN_CHATS = 4  # of five chats


def chats(seed: int, n: int, grammar: Grammar = ENGLISH) -> Iterator[list[Message]]:
    """`n` chats for finetuning, each a list of messages that begins with the user and ends with the assistant; chat i
    depends on the seed and i only. ValueError for a negative number."""
    check(seed, n)
    return (_chat(Draw("chat", seed, i), grammar) for i in range(n))


def questions(seed: int, n: int, grammar: Grammar = ENGLISH) -> list[Question]:
    """`n` questions, of each kind in turn, about what no story and no chat has ever said.

    For colours, this object never has this colour there; for the other kinds, this person, who in the end has this
    object, never has it while in the place where they are in the end. ValueError for a negative number.
    """
    check(seed, n)
    kinds = list(KINDS)
    return [_held_out(Draw("question", seed, i), grammar, kinds[i % len(kinds)]) for i in range(n)]


def _chat(choices: Choices, grammar: Grammar) -> list[Message]:
    if choices.branch(range(STORIES_IN_CHATS + 1)) == STORIES_IN_CHATS:
        return small_talk(choices, grammar)
    scene = make_scene(choices, grammar)
    told = tell(choices, grammar, scene)
    turns: list[Message] = []
    for _ in range(choices.branch(range(1, MOST_TURNS + 1))):
        kind = choices.branch([kind for kind in KINDS if subjects(scene, kind)])
        asked, answered = exchange(scene, *choices.branch(all_questions(scene, [kind])))
        turns += [*_user(" ".join([*told, asked])), {"role": "assistant", "content": answered}]
        told = []
    return turns


def _user(text: str) -> list[Message]:
    return [{"role": "user", "content": text}]


def _held_out(choices: Choices, grammar: Grammar, kind: str) -> Question:
    """Scenes of several people without any restriction, until one has what is held out and asked for."""
    grammar = grammar._replace(people=tuple(k for k in grammar.people if k > 1) or grammar.people)
    while True:
        scene = make_scene(choices, grammar, _any_place, _any_colour)
        about = [i for i in subjects(scene, kind) if _is_new(grammar, scene, kind, i)]
        if about:
            told = tell(choices, grammar, scene)
            asked, answered = exchange(scene, kind, choices.branch(about), choices.fill(KINDS[kind].ask))
            return Question(_user(" ".join([*told, asked])), answered, kind)


def _any_place(grammar: Grammar, name: str, things: Sequence[str], used: Sequence[str]) -> Sequence[str]:
    return [place for place in grammar.places if place not in used]


def _any_colour(grammar: Grammar, thing: str, used: Sequence[str]) -> Sequence[str]:
    return [colour for colour in grammar.colours if colour not in used]


def _is_new(grammar: Grammar, scene: Scene, kind: str, subject: int) -> bool:
    person, thing = facts(scene, kind, subject)
    if "colour" in kind:
        return scene.colours[subject] not in allowed_colours(grammar, scene.objects[subject])
    things = [thing] if thing is not None else scene.things(person) or [person]  # or what they gave away
    return any(is_held_out(grammar, scene.names[person], scene.objects[t], scene.place(person)) for t in things)
