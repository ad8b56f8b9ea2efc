"""What is asked of a model, as the ids it reads: a text, or as much of a conversation as its context holds."""

from __future__ import annotations

from collections.abc import Sequence

from fnlm import data
from fnlm.generate import encoded
from webui.models import Reader

Messages = list[dict[str, str]]


class TooLong(ValueError):
    """More than the model can read at once."""


def text_ids(model: Reader, prompt: str | Sequence[int], truncate: bool = False) -> tuple[list[int], int]:
    """The ids of a text, or ids given as such, and how many of the first were left out for them to fit (`truncate`).

    An empty text is the beginning of a document; what is truncated leaves room for a quarter of the context.

    Raises ValueError for an id outside the vocabulary, TooLong for a text that leaves no room for a token.
    """
    if isinstance(prompt, str) and not truncate:
        _refuse_hopeless(model, prompt, "text")
    ids = encoded(model.tokenizer, prompt) if isinstance(prompt, str) else list(prompt)
    wrong = next((i for i in ids if not 0 <= i < model.tokenizer.vocab_size), None)
    if wrong is not None:
        raise ValueError(f"token {wrong} is not in the vocabulary of {model.tokenizer.vocab_size}")
    dropped = len(ids) - (model.context - max(1, model.context // 4))
    if truncate and dropped > 0:
        return ids[dropped:], dropped
    if len(ids) >= model.context:
        raise TooLong(f"the text has {len(ids)} tokens; the model reads at most {model.context - 1}, so shorten it")
    return ids, 0


def chat_ids(model: Reader, messages: Messages, reply: int | None = None) -> tuple[list[int], int]:
    """The ids of a conversation, and how many of its oldest messages were left out for them to fit.

    Kept are the instructions at its beginning and, with room for an answer (an eighth of the context, or `reply` tokens
    if those are fewer), the newest messages, beginning with one of the user's. Raises TooLong where the last alone
    does not fit, ValueError for a conversation that the model's chat template refuses.
    """
    _refuse_hopeless(model, messages[-1]["content"], "last message")
    room = model.context - max(1, min(reply or model.context, model.context // 8))
    first = _instructions(messages)
    system, turns = messages[:first], messages[first:]
    if model.dialogue.text is not None:
        return _by_template(model, system, turns, room)
    starts = [i for i, m in enumerate(turns) if m["role"] == "user" or i == len(turns) - 1] or [0]
    starts = sorted({0, *starts})
    sizes = [*_sizes(model, system), *_sizes(model, turns)]
    fixed = sum(sizes[:first]) + len(data.prompt(model.tokenizer, []))
    for start in starts:
        needed = fixed + sum(sizes[first + start :])
        if needed <= room:
            return data.prompt(model.tokenizer, [*system, *turns[start:]]), start
    if needed < model.context:  # the last message fits, though the answer will be short
        return data.prompt(model.tokenizer, [*system, *turns[starts[-1] :]]), starts[-1]
    raise _too_long(model, needed)


def _by_template(model: Reader, system: Messages, turns: Messages, room: int) -> tuple[list[int], int]:
    """The same by the model's own template, which may say more or less for one turn than for another: what is kept is
    found by halves, and nothing is read of which the bytes alone show that it does not fit."""
    model.dialogue.check([*system, *turns])
    users = [i for i, m in enumerate(turns) if m["role"] == "user"]
    starts = [0, *(i for i in users if i)]
    least = [_least(model, m["content"]) for m in turns]
    low = next((i for i, start in enumerate(starts) if sum(least[start:]) <= room), len(starts) - 1)
    high, found, tried = len(starts) - 1, list[int](), low
    while low < high or not found:
        ids = model.dialogue.prompt([*system, *turns[starts[tried] :]])
        if len(ids) <= room or tried == len(starts) - 1:
            found, high = ids, tried
        else:
            low = tried + 1
        tried = (low + high) // 2
    if len(found) >= model.context:
        raise _too_long(model, len(found))
    return found, starts[high]


def _too_long(model: Reader, needed: int) -> TooLong:
    return TooLong(
        f"the last message needs {needed} tokens with the instructions before it; the model reads at most "
        f"{model.context - 1}, so shorten it"
    )


def instructions(model: Reader, messages: Messages) -> int:
    """How many tokens the instructions at a conversation's beginning have; with a template, what stands before the
    user's first words."""
    first = messages[: _instructions(messages)]
    if model.dialogue.text is None:
        return sum(_sizes(model, first))
    one, other = (model.dialogue.prompt([*first, {"role": "user", "content": c}]) for c in "ab")
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), 0)


def _instructions(messages: Messages) -> int:
    """How many messages of the system a conversation begins with."""
    return next((i for i, m in enumerate(messages) if m["role"] != "system"), len(messages))


def _refuse_hopeless(model: Reader, text: str, what: str) -> None:
    """Say that a text is too long without reading all of it, where its bytes alone show that."""
    least = _least(model, text)
    if least > 2 * model.context:
        raise TooLong(f"the {what} has more than {least} tokens; the model reads at most {model.context - 1}")


def _least(model: Reader, text: str) -> int:
    """The fewest tokens that a text may have."""
    return len(text.encode("utf-8")) // max(map(len, model.tokenizer.table), default=1)


def _sizes(model: Reader, messages: Messages) -> list[int]:
    """The tokens of each message with its frame; from the newest on which they no longer fit back, just too many."""
    frame, sizes, room = len(data.prompt(model.tokenizer, [])), list[int](), model.context
    for message in reversed(messages):
        if sum(sizes) > room or _least(model, message["content"]) > room:
            sizes.append(room + 1)
        else:
            sizes.append(len(data.prompt(model.tokenizer, [message])) - frame)
    return sizes[::-1]
