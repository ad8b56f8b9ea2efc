"""A scene: who is there, with what, where, and what happens. Everything a story tells and a question asks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from fnlm.world.choices import Choices
from fnlm.world.grammar import Grammar, allowed_colours, allowed_places

PlacesOf = Callable[[Grammar, str, Sequence[str], Sequence[str]], Sequence[str]]
ColoursOf = Callable[[Grammar, str, Sequence[str]], Sequence[str]]


class Scene(NamedTuple):
    """Person i is called names[i], brings objects[i] of colours[i], and is first in places[i].

    `events` are "move" and "give" in their order: person `mover` goes to `destination`, person `giver` gives what they
    brought to person `receiver`. -1 where it does not happen.
    """

    names: tuple[str, ...]
    objects: tuple[str, ...]
    colours: tuple[str, ...]
    places: tuple[str, ...]
    events: tuple[str, ...] = ()
    mover: int = -1
    destination: str = ""
    giver: int = -1
    receiver: int = -1

    def place(self, person: int) -> str:
        """Where someone is in the end."""
        return self.destination if person == self.mover else self.places[person]

    def holder(self, thing: int) -> int:
        """Who has an object in the end."""
        return self.receiver if thing == self.giver else thing

    def things(self, person: int) -> list[int]:
        """What someone has in the end."""
        return [thing for thing in range(len(self.objects)) if self.holder(thing) == person]


def events_for(people: int) -> tuple[tuple[str, ...], ...]:
    """What may happen among so many people; to give takes two."""
    alone: tuple[tuple[str, ...], ...] = ((), ("move",))
    return alone if people == 1 else (*alone, ("give",), ("move", "give"), ("give", "move"))


def make_scene(
    choices: Choices,
    grammar: Grammar,
    places_of: PlacesOf = allowed_places,
    colours_of: ColoursOf = allowed_colours,
) -> Scene:
    """A scene where no two people share a place, and no two objects a colour; people are only ever where `places_of`
    allows, for every object that they ever hold."""
    count = choices.branch(grammar.people)
    everyone = range(count)
    events = choices.branch(events_for(count))
    names, objects = (_distinct(choices, words, count) for words in (grammar.names, grammar.objects))
    colours: tuple[str, ...] = ()
    for thing in objects:
        colours += (choices.fill(colours_of(grammar, thing, colours)),)
    giver = choices.branch(everyone) if "give" in events else -1
    receiver = choices.branch([i for i in everyone if i != giver]) if "give" in events else -1
    mover = choices.branch(everyone) if "move" in events else -1
    held = [[objects[i], objects[giver]] if i == receiver else [objects[i]] for i in everyone]
    places: tuple[str, ...] = ()
    for i in everyone:
        places += (choices.fill(places_of(grammar, names[i], held[i], places)),)
    elsewhere = places_of(grammar, names[mover], held[mover], places) if mover >= 0 else ("",)
    return Scene(names, objects, colours, places, events, mover, choices.fill(elsewhere), giver, receiver)


def _distinct(choices: Choices, words: Sequence[str], count: int) -> tuple[str, ...]:
    left, taken = list(words), []
    for _ in range(count):
        taken.append(choices.fill(left))
        left.remove(taken[-1])
    return tuple(taken)
