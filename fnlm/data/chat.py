r"""Conversations: read in the forms that people have them in, written as tokens by ChatML, with the answers marked.

ChatML (OpenAI, 2023): `<|im_start|>role\ncontent<|im_end|>\n`. Learnt are the assistant's content and the `<|im_end|>`
after it, nothing else; `<|endoftext|>` ends a conversation.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from fnlm.data.manifest import DataError
from fnlm.data.sources import TEXT, decoded, records, whole
from fnlm.tokenizers import CHAT_SPECIAL, IM_END, IM_START, Tokenizer

Messages: TypeAlias = list[dict[str, str]]
ROLES = ("system", "user", "assistant")
END_OF_TURN = "__eou__"
_SHARE_GPT = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}


def is_chat(file: Path) -> bool:
    """Whether a file holds conversations, judged by its first line or object."""
    if file.suffix in TEXT:
        return END_OF_TURN in next(iter(decoded(file))).partition("\n")[0]
    if file.suffix in (".jsonl", ".json", ".parquet"):
        row = next(iter(records(file)), ("", {}))[1]
        return form_of(row) is not None
    return False


def conversations(files: Sequence[Path]) -> Iterator[Messages]:
    """The messages, each a `role` and its `content`, of every conversation. Raises DataError with the line."""
    for file in files:
        if file.suffix in TEXT:
            yield from _lines(file)
        else:
            for where, row in records(file):
                yield messages_of(where, row)


def answered(files: Sequence[Path]) -> Iterator[Messages]:
    """The conversations in which the assistant says something: the others have nothing to learn."""
    return filter(is_answered, conversations(files))


def is_answered(messages: Messages) -> bool:
    """Whether the assistant says something."""
    return any(m["role"] == "assistant" for m in messages)


def _lines(file: Path) -> Iterator[Messages]:
    """A conversation in each line: turns in turn, each followed by __eou__, the user's first."""
    rest = ""
    for block in decoded(file):
        *lines, rest = (rest + block).split("\n")
        yield from (messages for line in lines if (messages := _turns(line)))
    if messages := _turns(rest):
        yield messages


def _turns(line: str) -> Messages:
    return _in_turn(line.split(END_OF_TURN))


def _in_turn(said: Sequence[str]) -> Messages:
    """The user and the assistant in turn."""
    turns = [turn for turn in map(str.strip, said) if turn]
    return [{"role": ROLES[1 + i % 2], "content": turn} for i, turn in enumerate(turns)]


def form_of(row: dict[str, Any]) -> Callable[[dict[str, Any]], list[dict[str, Any]]] | None:
    """How to read a row: OpenAI's messages, ShareGPT's, Alpaca's, DailyDialog's, or a prompt and its completion."""
    if "messages" in row:
        return lambda r: list(r["messages"])
    if "conversations" in row:
        return lambda r: [{"role": _SHARE_GPT[t["from"]], "content": t["value"]} for t in r["conversations"]]
    if {"instruction", "output"} <= row.keys():
        return lambda r: _pair("\n\n".join(filter(None, (r["instruction"], r.get("input")))), r["output"])
    if isinstance(row.get("dialog"), list):
        return lambda r: _in_turn(r["dialog"])
    if {"prompt", "completion"} <= row.keys():
        return lambda r: _pair(r["prompt"], r["completion"])
    return None


def _pair(question: str, answer: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def messages_of(where: str, row: dict[str, Any]) -> Messages:
    """The conversation of a row, in whatever form. Raises DataError, which begins with `where` it stands."""
    form = form_of(row)
    if form is None:
        wanted = "messages, conversations, instruction and output, or prompt and completion"
        raise DataError(f"{where} is no conversation: it has {', '.join(row) or 'nothing'}, not {wanted}")
    try:
        messages = [{"role": m["role"], "content": m["content"]} for m in form(row)]
    except (KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{where} is no conversation: {type(error).__name__} {error}") from error
    for message in messages:
        if message["role"] not in ROLES:
            raise DataError(f"{where}: a message has role {message['role']!r}; known: {', '.join(ROLES)}, with a text")
        if not isinstance(message["content"], str):
            raise DataError(f"{where}: the content of a message is no text; give one string, without parts or pictures")
    return [{"role": m["role"], "content": whole(m["content"])} for m in messages]


def key_of(messages: Messages) -> str:
    """What makes two conversations the same."""
    return json.dumps(messages, ensure_ascii=False)


def require_special(tokenizer: Tokenizer) -> None:
    """Raises DataError where ChatML's special tokens are missing from the vocabulary."""
    missing = [token for token in CHAT_SPECIAL if token not in tokenizer.special]
    if missing:
        raise DataError(
            f"this {tokenizer.kind} tokenizer has no {' '.join(missing)}; "
            "add them with --special (a model learns them in training), or write conversations its way with --template"
        )


def render(tokenizer: Tokenizer, batch: Sequence[Messages]) -> list[tuple[NDArray[np.uint32], NDArray[np.uint8]]]:
    """The ids of each conversation and 1 for each that is learnt. Contents are encoded by themselves, in parallel."""
    require_special(tokenizer)
    contents = iter(tokenizer.encode_arrays([m["content"] for messages in batch for m in messages]))
    roles = {role: _head(tokenizer, role) for role in ROLES}
    end, newline = tokenizer.special[IM_END], tokenizer.encode("\n")
    rendered = []
    for messages in batch:
        ids: list[NDArray[np.uint32]] = [np.array(tokenizer.prefix, np.uint32)]
        mask: list[NDArray[np.uint8]] = [_repeated(0, len(tokenizer.prefix))]
        for message in messages:
            head, body = roles[message["role"]], next(contents)
            ids += [np.array(head, np.uint32), body, np.array([end, *newline], np.uint32)]
            learnt = int(message["role"] == "assistant")
            mask += [_repeated(0, len(head)), _repeated(learnt, len(body) + 1), _repeated(0, len(newline))]
        ids.append(np.array([tokenizer.eot_id], np.uint32))
        rendered.append((np.concatenate(ids), np.concatenate([*mask, _repeated(0, 1)])))
    return rendered


def prompt(tokenizer: Tokenizer, messages: Messages) -> list[int]:
    """The ids after which the assistant's next content comes: exactly those of training."""
    ids = render(tokenizer, [messages])[0][0].tolist()[:-1]
    return [*ids, *_head(tokenizer, "assistant")]


def _head(tokenizer: Tokenizer, role: str) -> list[int]:
    return [tokenizer.special[IM_START], *tokenizer.encode(role + "\n")]


def _repeated(value: int, n: int) -> NDArray[np.uint8]:
    return np.full(n, value, np.uint8)
