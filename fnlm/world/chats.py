"""Chats: a user tells a short story and asks about it, or asks general things; and the questions held out from them."""

from __future__ import annotations

from collections.abc import Iterator

from fnlm.world.choices import Choices, Draw
from fnlm.world.grammar import ENGLISH, Grammar, allowed_colours, is_held_out
from fnlm.world.questions import KINDS, Message, Question, answer, facts, phrase, subjects
from fnlm.world.scene import Scene, make_scene
from fnlm.world.story import check, tell
from fnlm.world.talk import small_talk

MOST_TURNS = 2
STORIES_IN_CHATS = 4  # of five chats


def chats(seed: int, n: int, grammar: Grammar = ENGLISH) -> Iterator[list[Message]]:
    """`n` chats for finetuning, each a list of messages that begins with the user and ends with the assistant; chat i
    depends on the seed and i only. ValueError for a negative number."""
    check(seed, n)
    return (_chat(Draw("chat", seed, i), grammar) for i in range(n))


def questions(seed: int, n: int, grammar: Grammar = ENGLISH) -> list[Question]:
    """`n` questions, of each kind in turn, about what no story and no chat has ever said.

    For colours, this object never has this colour there; for the other kinds, this person, who in the end has this
    object, never has it while in the place where they are in the end. Colours and places differ within a story, so that
    a guess among those it names is seldom right. ValueError for a negative number.
    """
    check(seed, n)
    kinds = list(KINDS)
    return [_held_out(Draw("question", seed, i), grammar, kinds[i % len(kinds)]) for i in range(n)]


def _chat(choices: Choices, grammar: Grammar) -> list[Message]:
    if choices.branch(range(STORIES_IN_CHATS + 1)) == STORIES_IN_CHATS:
        return small_talk(choices, grammar)
    scene = make_scene(choices, grammar)
    told = tell(choices, grammar, scene)
    open_kinds = [kind for kind in KINDS if subjects(scene, kind)]
    turns: list[Message] = []
    for _ in range(choices.branch(range(1, MOST_TURNS + 1))):
        kind = choices.branch(open_kinds)
        open_kinds.remove(kind)
        subject = choices.branch(subjects(scene, kind))
        turns += _user(" ".join([*told, phrase(choices, scene, kind, subject)]))
        turns += [{"role": "assistant", "content": answer(scene, kind, subject)}]
        told = []
    return turns


def _user(text: str) -> list[Message]:
    return [{"role": "user", "content": text}]


def _held_out(choices: Choices, grammar: Grammar, kind: str) -> Question:
    """Scenes of several people without any restriction, until one has what is held out and asked for."""
    grammar = grammar._replace(people=tuple(k for k in grammar.people if k > 1) or grammar.people)
    while True:
        scene = make_scene(choices, grammar, lambda g, name, things: g.places, lambda g, thing: g.colours)
        about = [i for i in subjects(scene, kind) if _is_new(grammar, scene, kind, i)]
        if about and _is_varied(scene):
            subject = choices.branch(about)
            story = " ".join([*tell(choices, grammar, scene), phrase(choices, scene, kind, subject)])
            return Question(_user(story), answer(scene, kind, subject), kind)


def _is_new(grammar: Grammar, scene: Scene, kind: str, subject: int) -> bool:
    person, thing = facts(scene, kind, subject)
    if "colour" in kind:
        return scene.colours[subject] not in allowed_colours(grammar, scene.objects[subject])
    things = [thing] if thing is not None else scene.things(person) or [person]  # or what they gave away
    return any(is_held_out(grammar, scene.names[person], scene.objects[t], scene.place(person)) for t in things)


def _is_varied(scene: Scene) -> bool:
    """Whether no colour and no place occurs twice."""
    places = [*scene.places, *[scene.destination][: scene.mover + 1]]
    return len(set(scene.colours)) == len(scene.colours) and len(set(places)) == len(places)
