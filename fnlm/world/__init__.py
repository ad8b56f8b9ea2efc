"""A small world, written by a seeded grammar: stories, chats about them, and questions whose answers are known.

The same arguments give the same text on every machine: text i is drawn by `random.Random`, seeded with the name of the
kind of text, the seed and i, of which only `random()` is used, the one method Python promises to keep.
"""

from fnlm.world.chats import chats, questions
from fnlm.world.grammar import ENGLISH, Grammar, allowed_colours, allowed_places
from fnlm.world.questions import KINDS, Question, score
from fnlm.world.story import entropy, nats, stories

__all__ = [
    "ENGLISH",
    "KINDS",
    "Grammar",
    "Question",
    "allowed_colours",
    "allowed_places",
    "chats",
    "entropy",
    "nats",
    "questions",
    "score",
    "stories",
]
