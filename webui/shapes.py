"""The shapes of what is answered, as OpenAI's schema has them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from fnlm.tokenizers import Tokenizer
from webui.models import About
from webui.writing import Scored

LEAST = -9999.0  # stands for a probability of 0, as with OpenAI: JSON has no infinity
Json = dict[str, Any]
Shape = Callable[[int, str | None, str | None, Json | None], Json]
Told = Callable[[Sequence[Scored], Tokenizer, int], Json]


def chat_chunk(index: int, content: str | None, finish: str | None, logprobs: Json | None) -> Json:
    """A choice of a streamed chat reply; None for both begins it."""
    begins = {"role": "assistant", "content": ""}
    delta = {"content": content} if content is not None else {} if finish else begins
    return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish}


def chat_choice(index: int, content: str | None, finish: str | None, logprobs: Json | None) -> Json:
    """A choice of a whole chat reply."""
    message = {"role": "assistant", "content": content, "refusal": None}
    return {"index": index, "message": message, "logprobs": logprobs, "finish_reason": finish}


def text_choice(index: int, content: str | None, finish: str | None, logprobs: Json | None) -> Json:
    """A choice of a completion, streamed or whole."""
    return {"index": index, "text": content or "", "logprobs": logprobs, "finish_reason": finish}


def chat_logprobs(tokens: Sequence[Scored], tokenizer: Tokenizer, _: int) -> Json:
    """Of a chat reply. `id` is not OpenAI's."""

    def entry(token: int, logprob: float | None) -> Json:
        return {"token": spelled(tokenizer, token), "bytes": list(tokenizer.table[token]), "logprob": at_least(logprob)}

    content = [
        {**entry(t.id, t.logprob), "id": t.id, "top_logprobs": [{**entry(i, p), "id": i} for i, p in t.top]}
        for t in tokens
    ]
    return {"content": content, "refusal": None}


def text_logprobs(tokens: Sequence[Scored], tokenizer: Tokenizer, offset: int) -> Json:
    """Of a completion whose tokens begin after `offset` characters. `ids` are not OpenAI's."""
    offsets = []
    for token in tokens:
        offsets.append(offset)
        offset += len(tokenizer.table[token.id].decode("utf-8", "replace"))
    return {
        "tokens": [spelled(tokenizer, t.id) for t in tokens],
        "token_logprobs": [at_least(t.logprob) for t in tokens],
        "top_logprobs": [
            None if t.logprob is None else {spelled(tokenizer, i): at_least(p) for i, p in t.top} for t in tokens
        ],
        "text_offset": offsets,
        "ids": [t.id for t in tokens],
    }


def spelled(tokenizer: Tokenizer, token: int) -> str:
    r"""A token's text; one that is a part of a character as its bytes, `\xe2\x80`."""
    letters = tokenizer.table[token]
    try:
        return letters.decode("utf-8")
    except UnicodeDecodeError:
        return "".join(f"\\x{byte:02x}" for byte in letters)


def at_least(logprob: float | None) -> float | None:
    """A number that JSON can say; None for what has none."""
    return None if logprob is None else max(logprob, LEAST)


def usage(read: int, written: int) -> dict[str, int]:
    """How many tokens were read and written."""
    return {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written}


def model_object(about: About) -> Json:
    """A model of /v1/models; `fnlm` is what OpenAI's do not have."""
    ours = {k: v for k, v in about._asdict().items() if k != "name"}
    return {"id": about.name, "object": "model", "created": about.saved, "owned_by": "fnlm", "fnlm": ours}
