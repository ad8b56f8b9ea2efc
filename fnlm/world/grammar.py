"""The words and sentences of the world, and which combinations of words no training text may hold."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from hashlib import sha256
from typing import NamedTuple

NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")


class Grammar(NamedTuple):
    """What a story is made of: words, how many people it may have and how many questions follow it, which facts of each
    person it tells and in what order (layouts, the shortest first), and the templates of each fact.

    Templates name a person {n}, another {m}, an object {o}, its colour {c}, a place {p} and what someone has {things}.
    `states` tell how all is in the end, in the words that answers begin with: readers find sooner what follows words
    they have met than what precedes them. Entropy is exact when no two choices give the same text, so all words and all
    templates differ.
    """

    names: tuple[str, ...]
    objects: tuple[str, ...]
    colours: tuple[str, ...]
    places: tuple[str, ...]
    people: tuple[int, ...]
    asked: tuple[int, ...]
    layouts: tuple[tuple[str, ...], ...]
    has: tuple[str, ...]
    stays: tuple[str, ...]
    both: tuple[str, ...]
    gives: tuple[str, ...]
    goes: tuple[str, ...]
    states: tuple[str, ...]


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


ENGLISH = Grammar(
    names=_words("Mia Max Tess Omar Lily Rosa Ben Ada Leo Nina Tom Eva Sam Ida Hugo Zoe"),
    objects=_words("kite ball cup key ring hat bag bell book lamp drum boat doll coin pen box"),
    colours=_words("red blue green yellow black white purple pink brown gold"),
    places=_words("garden kitchen market forest park library barn school tower cave house shop"),
    people=(1, 2, 3),
    asked=(2, 3, 4, 5, 6),
    layouts=(("both",), ("has", "stays"), ("stays", "has")),
    has=("{n} found a {c} {o}.", "{n} took a {c} {o}."),
    stays=("{n} went to the {p}.", "{n} came to the {p}."),
    both=("{n} went to the {p} with a {c} {o}.", "{n} came to the {p} with a {c} {o}."),
    gives=("{n} gave the {o} to {m}.", "{n} gave the {c} {o} to {m}."),
    goes=("Then {n} went to the {p}.", "{n} walked to the {p}."),
    states=("The {o} is {c}.", "The {o} belongs to {m}.", "{n} is in the {p}.", "{n} has {things}."),
)


@cache
def _ranked(words: tuple[str, ...], *key: str) -> tuple[str, ...]:
    """The words in an order of their own for every key: by a hash of both."""
    return tuple(sorted(words, key=lambda word: sha256(" ".join((*key, word)).encode()).digest()))


def _without(ranked: Sequence[str], taken: Sequence[str]) -> tuple[str, ...]:
    """The words but those taken; in place of one that is gone already, the next in rank goes. So the number of words
    left, and with it the entropy, depends on no word."""
    left = list(ranked)
    for word in taken:
        left.remove(word if word in left else left[0])
    return tuple(left)


def allowed_colours(grammar: Grammar, thing: str, used: Sequence[str] = ()) -> tuple[str, ...]:
    """The colours that an object has in training texts: all but one, chosen by hash, and not those of other objects."""
    ranked = _ranked(grammar.colours, thing)
    return _without(ranked, (ranked[0], *used))


def allowed_places(grammar: Grammar, name: str, things: Sequence[str], used: Sequence[str] = ()) -> tuple[str, ...]:
    """Where a person who ever holds these objects may ever be in a training text, and nobody else is.

    For each object all places but one, chosen by a hash of person and object.
    """
    held_out = [_ranked(grammar.places, name, thing)[0] for thing in things]
    return _without(_ranked(grammar.places, name, things[0]), (*held_out, *used))


def is_held_out(grammar: Grammar, name: str, thing: str, place: str) -> bool:
    """Whether no training text has this person hold this object and be in this place."""
    return place not in allowed_places(grammar, name, (thing,))
