"""OpenAI's schema: a request's JSON read field by field into jobs, and the shapes of what is answered."""

from __future__ import annotations

import json
import math
import secrets
from collections.abc import Mapping
from typing import Any, NoReturn

from webui.jobs import Job
from webui.models import About
from webui.prompts import Messages

ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
MOST_TOKENS, MOST_CHOICES, MOST_STOPS, MOST_MESSAGES, MOST_LOGPROBS = 1_000_000, 8, 16, 1000, 20
COMPLETION_TOKENS = 16  # OpenAI's default for /v1/completions
# field: the least and the greatest value
NUMBERS = {
    "temperature": (0.0, 100.0),
    "top_p": (0.0, 1.0),
    "min_p": (0.0, 1.0),
    "typical_p": (0.0, 1.0),
    "repetition_penalty": (0.01, 100.0),
    "presence_penalty": (-2.0, 2.0),
    "frequency_penalty": (-2.0, 2.0),
}
COUNTS = {"top_k": (-1, MOST_TOKENS), "min_tokens": (0, MOST_TOKENS), "max_tokens": (1, MOST_TOKENS)}


class ApiError(Exception):
    """An answer that is an error: its status, and OpenAI's error object."""

    def __init__(
        self, status: int, message: str, param: str | None = None, code: str | None = None, retry: int | None = None
    ):
        super().__init__(message)
        self.status, self.message, self.param, self.code, self.retry = status, message, param, code, retry

    def body(self) -> dict[str, Any]:
        kind = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}.get(self.status)
        kind = kind or ("invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


def parsed(data: bytes) -> dict[str, Any]:
    """The JSON object of a request's body."""

    def refuse(word: str) -> NoReturn:
        raise ValueError(f"{word} is not JSON")

    try:
        body = json.loads(data.decode("utf-8"), parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f"the body is not JSON: {str(error)[:200]}") from None
    if not isinstance(body, dict):
        raise ApiError(400, "the body must be a JSON object")
    return body


def wrong(name: str, wanted: str) -> ApiError:
    """A field of another type or range than it must have."""
    return ApiError(400, f"{name} must be {wanted}", name)


def number(body: Mapping[str, Any], name: str, least: float, most: float) -> float | None:
    """A number in a range; None where it is null or missing."""
    value = body.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not least <= value <= most:
        raise wrong(name, f"a number from {least:g} to {most:g}")
    assert math.isfinite(value)
    return float(value)


def whole(body: Mapping[str, Any], name: str, least: int, most: int) -> int | None:
    """A whole number in a range; None where it is null or missing."""
    value = body.get(name)
    if value is None:
        return None
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise wrong(name, f"a whole number from {least} to {most}")
    return value


def flag(body: Mapping[str, Any], name: str) -> bool:
    """True or false; false where it is null or missing."""
    value = body.get(name)
    if value is not None and not isinstance(value, bool):
        raise wrong(name, "true or false")
    return bool(value)


def text(value: Any, name: str) -> str:
    """A string that can be written as UTF-8; lone surrogates become question marks."""
    if not isinstance(value, str):
        raise wrong(name, "a string")
    return value.encode("utf-8", "replace").decode("utf-8")


def settings(body: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of fnlm.sampling.Settings that are there. Other fields are ignored."""
    found: dict[str, Any] = {name: number(body, name, *limits) for name, limits in NUMBERS.items()}
    found |= {name: whole(body, name, *limits) for name, limits in COUNTS.items()}
    longest = whole(body, "max_completion_tokens", *COUNTS["max_tokens"])
    found["max_tokens"] = found["max_tokens"] if longest is None else longest
    if found["temperature"] is None:
        found["temperature"] = 1.0
    for name in ("top_p", "typical_p"):
        if found[name] == 0:
            raise wrong(name, "a number above 0 and up to 1")
    if (found["top_k"] or 0) < 1:
        found["top_k"] = None
    if (found["min_tokens"] or 0) > (found["max_tokens"] or MOST_TOKENS):
        raise wrong("min_tokens", f"at most max_tokens={found['max_tokens']}")
    lists = {"stop": stops(body), "stop_ids": stop_ids(body), "logit_bias": biases(body)}
    return {k: v for k, v in found.items() if v is not None} | lists


def stops(body: Mapping[str, Any]) -> tuple[str, ...]:
    """The texts at which to stop: a string, or a list of some."""
    value = body.get("stop")
    listed = [value] if isinstance(value, str) else value or []
    if not isinstance(listed, list) or len(listed) > MOST_STOPS or not all(isinstance(s, str) and s for s in listed):
        raise wrong("stop", f"a string that is not empty, or a list of at most {MOST_STOPS} of them")
    return tuple(text(s, "stop") for s in listed)


def stop_ids(body: Mapping[str, Any]) -> tuple[int, ...]:
    """Further ids that end a reply."""
    value = body.get("stop_token_ids") or []
    if not isinstance(value, list) or len(value) > MOST_STOPS or not all(_is_id(i) for i in value):
        raise wrong("stop_token_ids", f"a list of at most {MOST_STOPS} token ids")
    return tuple(value)


def biases(body: Mapping[str, Any]) -> dict[int, float]:
    """What to add to logits, by id."""
    value = body.get("logit_bias") or {}
    if not isinstance(value, dict):
        raise wrong("logit_bias", "an object of token ids and numbers")
    found = {}
    for k in value:
        if not (k.isascii() and k.isdigit() and len(k) < 10):
            raise wrong("logit_bias", "an object of token ids and numbers")
        try:
            found[int(k)] = number(value, k, -100, 100) or 0.0
        except ApiError as error:
            raise wrong("logit_bias", "an object whose values are numbers from -100 to 100") from error
    return found


def model_of(body: Mapping[str, Any], models: Mapping[str, About]) -> About:
    """The model that is named; without a name, the first. Raises ApiError 404 with those there are."""
    name = body.get("model")
    if name is None and models:
        return next(iter(models.values()))
    name = text(name, "model") if name is not None else ""
    if name not in models:
        known = f"choose from {', '.join(list(models)[:50])}" if models else "there is none yet"
        raise ApiError(404, f"there is no model {name[:200]!r}; {known}", "model", "model_not_found")
    return models[name]


def messages_of(body: Mapping[str, Any]) -> Messages:
    """The conversation; contents are strings or lists of text parts."""
    value = body.get("messages")
    if not isinstance(value, list) or not value or len(value) > MOST_MESSAGES:
        raise wrong("messages", f"a list of 1 to {MOST_MESSAGES} messages")
    return [_message(m, f"messages[{i}]") for i, m in enumerate(value)]


def _message(value: Any, at: str) -> dict[str, str]:
    if not isinstance(value, dict):
        raise wrong(at, "an object with role and content")
    role, content = value.get("role"), value.get("content")
    if not isinstance(role, str) or role not in ROLES:
        raise wrong(f"{at}.role", f"one of {', '.join(ROLES)}")
    if isinstance(content, list):
        parts = [p["text"] for p in content if isinstance(p, dict) and isinstance(p.get("text"), str)]
        if len(parts) < len(content):
            raise wrong(f"{at}.content", "a string, or a list of text parts")
        content = "".join(parts)
    return {"role": ROLES[role], "content": text(content, f"{at}.content")}


def prompts_of(body: Mapping[str, Any]) -> list[str | list[int]]:
    """The prompts: a text, several, token ids, or several lists of them."""
    value = body.get("prompt", "")
    if isinstance(value, str):
        return [text(value, "prompt")]
    if isinstance(value, list) and value and all(_is_id(i) for i in value):
        return [value]
    if isinstance(value, list) and 0 < len(value) <= MOST_CHOICES:
        if all(isinstance(p, str) for p in value):
            return [text(p, "prompt") for p in value]
        if all(isinstance(p, list) and p and all(_is_id(i) for i in p) for p in value):
            return value
    raise wrong("prompt", f"a string, token ids, or a list of at most {MOST_CHOICES} of either")


def _is_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 32


def _shared(body: Mapping[str, Any], refused: Mapping[str, str]) -> tuple[dict[str, Any], int, int]:
    """Settings, seed and n; refuses what cannot be had, rather than answer something else."""
    for name, instead in refused.items():
        if body.get(name) not in (None, False, 0, "", [], {}):
            raise ApiError(400, f"{name} is not supported; {instead}", name)
    seed = whole(body, "seed", -(1 << 63), (1 << 64) - 1)
    return settings(body), secrets.randbits(32) if seed is None else seed, whole(body, "n", 1, MOST_CHOICES) or 1


def sliding(body: Mapping[str, Any]) -> dict[str, Any]:
    """Whether a text may go on past the context's end, and how many first tokens it then keeps."""
    return {"slide": flag(body, "slide"), "keep": whole(body, "slide_keep", 0, MOST_TOKENS)}


def chat_jobs(body: Mapping[str, Any], models: Mapping[str, About]) -> list[Job]:
    """The jobs of a /v1/chat/completions request."""
    about = model_of(body, models)
    if not about.chat:
        raise ApiError(400, f"{about.name} was not trained on conversations; use /v1/completions", "model")
    messages = messages_of(body)
    refused = dict.fromkeys(("tools", "functions"), "leave it out")
    if body.get("response_format") not in (None, {"type": "text"}):
        refused["response_format"] = 'only {"type": "text"} is written'
    if body.get("tool_choice") not in (None, "none", "auto"):
        refused["tool_choice"] = "there are no tools"
    chosen, seed, n = _shared(body, refused)
    top = whole(body, "top_logprobs", 0, MOST_LOGPROBS)
    if top is not None and not flag(body, "logprobs"):
        raise wrong("top_logprobs", "left out, or asked for together with logprobs: true")
    top = (top or 0) if flag(body, "logprobs") else None
    slide = sliding(body)
    return [Job(about.name, messages, settings=chosen, seed=seed + i, top=top, **slide) for i in range(n)]


def completion_jobs(body: Mapping[str, Any], models: Mapping[str, About]) -> list[Job]:
    """The jobs of a /v1/completions request, prompt by prompt."""
    about = model_of(body, models)
    prompts, echo = prompts_of(body), flag(body, "echo")
    only = echo and type(body.get("max_tokens")) is int and body["max_tokens"] == 0
    body = {**body, "max_tokens": 1} if only else body
    chosen, seed, n = _shared(body, {"suffix": "text is only continued"})
    if len(prompts) * n > MOST_CHOICES:
        raise wrong("n", f"at most {MOST_CHOICES} for all prompts together")
    chosen.setdefault("max_tokens", max(COMPLETION_TOKENS, chosen.get("min_tokens", 0)))
    if (whole(body, "best_of", 1, MOST_TOKENS) or n) != n:
        raise wrong("best_of", "left out, or the same as n")
    truncate, top = flag(body, "truncate"), None
    if body.get("logprobs") is not False:  # as some clients say it
        top = whole(body, "logprobs", 0, MOST_LOGPROBS)
    more = {"scored": echo and top is not None, "only": only, **sliding(body)}
    return [Job(about.name, None, p, truncate, chosen, seed + i, top, **more) for p in prompts for i in range(n)]


def text_or_messages(body: Mapping[str, Any]) -> str | Messages:
    """What /v1/tokenize is to read: exactly one of the two."""
    if (body.get("text") is None) == (body.get("messages") is None):
        raise wrong("text", "a string, or left out where messages are given")
    return text(body["text"], "text") if body.get("text") is not None else messages_of(body)


def ids_of(body: Mapping[str, Any], size: int) -> list[int]:
    """The ids of /v1/detokenize."""
    value = body.get("tokens")
    if not isinstance(value, list) or not all(_is_id(i) and i < size for i in value):
        raise wrong("tokens", f"a list of ids from 0 to {size - 1}")
    return value
