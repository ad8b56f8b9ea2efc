"""Chats without a story of the user's: greetings, counting, what is a colour, and what this assistant can do."""

from __future__ import annotations

from fnlm.world.choices import Choices
from fnlm.world.grammar import NUMBERS, Grammar
from fnlm.world.questions import Message
from fnlm.world.scene import make_scene
from fnlm.world.story import tell

FIXED = (
    (("Hello!", "Hi!", "Good morning!"), "Hello! Tell me a story and ask me about it."),
    (("How are you?",), "I am well, thank you!"),
    (("Who are you?", "What are you?"), "I am a small model of a small world."),
    (("What can you do?", "Can you help me?"), "I can answer questions about a story, name things and count to ten."),
    (("Thank you!", "Thank you very much!"), "You are welcome!"),
    (("Good night!", "See you soon!"), "Good night, and see you soon!"),
)
CLASSES = {"names": "name", "objects": "thing", "colours": "colour", "places": "place"}


def small_talk(choices: Choices, grammar: Grammar) -> list[Message]:
    """A greeting, something else, or both."""
    greets, asks = choices.branch(((True, False), (True, True), (False, True), (False, True)))
    said = [_fixed(choices, 0)] if greets else []
    if asks:
        said.append(choices.branch((_about_itself, _count, _next, _name_one, _is_one, _story))(choices, grammar))
    roles = ("user", "assistant")
    return [{"role": role, "content": text} for turn in said for role, text in zip(roles, turn, strict=True)]


def _fixed(choices: Choices, which: int) -> tuple[str, str]:
    asked, answer = FIXED[which]
    return choices.fill(asked), answer


def _about_itself(choices: Choices, grammar: Grammar) -> tuple[str, str]:
    return _fixed(choices, choices.branch(range(1, len(FIXED))))


def _count(choices: Choices, grammar: Grammar) -> tuple[str, str]:
    last = choices.branch(range(2, len(NUMBERS)))
    return f"Count to {NUMBERS[last]}.", f"{', '.join(NUMBERS[1 : last + 1])}.".capitalize()


def _next(choices: Choices, grammar: Grammar) -> tuple[str, str]:
    n = choices.branch(range(1, len(NUMBERS) - 1))
    asked, answer = choices.fill(
        (("comes after", f"{NUMBERS[n + 1]} comes after"), ("comes before", f"{NUMBERS[n - 1]} comes before"))
    )
    return f"Which number {asked} {NUMBERS[n]}?", f"{answer} {NUMBERS[n]}.".capitalize()


def _name_one(choices: Choices, grammar: Grammar) -> tuple[str, str]:
    kind = choices.fill(("objects", "colours", "places"))
    word = choices.fill(getattr(grammar, kind))
    return f"Name a {CLASSES[kind]}.", _sentence(kind, word, f"is a {CLASSES[kind]}.")


def _is_one(choices: Choices, grammar: Grammar) -> tuple[str, str]:
    kind, asked = choices.fill(tuple(CLASSES)), choices.fill(tuple(CLASSES))
    word = choices.fill(getattr(grammar, kind))
    verdict = "Yes" if kind == asked else "No"
    subject = _sentence(kind, word, "")[:-1] if kind in ("names", "colours") else f"the {word}"
    subject = subject if kind == "names" else subject[0].lower() + subject[1:]
    return f"Is {subject} a {CLASSES[asked]}?", f"{verdict}, {subject} is a {CLASSES[kind]}."


def _sentence(kind: str, word: str, rest: str) -> str:
    subject = f"The {word}" if kind in ("objects", "places") else word.capitalize()
    return f"{subject} {rest}"


def _story(choices: Choices, grammar: Grammar) -> tuple[str, str]:
    asked = choices.fill(("Tell me a story.", "Tell me a short story, please."))
    return asked, " ".join(tell(choices, grammar, make_scene(choices, grammar._replace(people=(1,)))))
