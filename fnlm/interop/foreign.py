"""A model that other software wrote, before its weights are read."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict
from types import MappingProxyType
from typing import Any, NamedTuple

from fnlm import tokenizers
from fnlm.checkpoint.files import CheckpointError
from fnlm.config import ModelConfig
from fnlm.tokenizers import CHAT_SPECIAL, IM_START, Tokenizer
from fnlm.types import Params


class Foreign(NamedTuple):
    """What there is to know without the weights, and how to get them.

    `tokenizer` is the text of a tokenizer.json, None where none came along; `template` a Jinja chat template; `kept`
    what an export should give back: token ids, generation settings. `source` and `format` say where it is from.
    """

    cfg: ModelConfig
    load: Callable[[], Params]
    source: str
    format: str
    architecture: str
    tokenizer: str | None = None
    template: str | None = None
    kept: Mapping[str, Any] = MappingProxyType({})


PADDING = 1024  # rows that small vocabularies may be filled up with


def read_tokenizer(model: Foreign) -> Tokenizer:
    """The tokenizer that came along. CheckpointError where there is none, it cannot be read, or it does not fit."""
    if model.tokenizer is None:
        raise CheckpointError(f"{model.source} has no tokenizer; give one: fnlm import {model.source} --tokenizer T")
    try:
        found = tokenizers.loads(model.tokenizer)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{model.source}: its tokenizer cannot be read: {error}") from error
    check_tokenizer(found, model.cfg, model.source)
    return found


def check_tokenizer(tokenizer: Tokenizer, cfg: ModelConfig, source: str) -> None:
    """Raises CheckpointError for a tokenizer with more tokens than the model, or not half as many (padding is less)."""
    if tokenizer.vocab_size > cfg.vocab_size:
        raise CheckpointError(
            f"{source}: the tokenizer has {tokenizer.vocab_size} tokens, the model only vocab_size={cfg.vocab_size}"
        )
    if 2 * tokenizer.vocab_size < cfg.vocab_size - PADDING:
        raise CheckpointError(
            f"{source}: the tokenizer has {tokenizer.vocab_size} tokens, the model vocab_size={cfg.vocab_size}: "
            "it is another model's; give the right one with --tokenizer"
        )


def described(model: Foreign, tokenizer: Tokenizer) -> dict[str, Any]:
    """config.json of a run that holds it."""
    own = {"source": model.source, "format": model.format, "architecture": model.architecture}
    return {
        "model": asdict(model.cfg),
        "kind": "chat" if speaks_chatml(model, tokenizer) else "text",
        "init_from": model.source,
        "preset": None,
        "tokenizer": {"kind": tokenizer.kind, "sha256": tokenizer.sha256},
        "interop": own | {"template": model.template, "kept": dict(model.kept)},
    }


def carried(config: Mapping[str, Any], kind: str, template: str | None = None) -> dict[str, Any]:
    """What a run's config.json says of where the model was imported from, for a run that trains it further.

    A model of text that is trained on conversations (`kind`) keeps neither its end tokens nor its template; it gets the
    `template` by which they were written.
    """
    came = config.get("interop")
    if came is None:
        return {}
    anew = kind == "chat" and config.get("kind") != "chat"
    return {"interop": {**came, "template": template, "kept": {}} if anew else came}


def speaks_chatml(model: Foreign, tokenizer: Tokenizer) -> bool:
    """Whether its chat template is written with ChatML's tokens, and the tokenizer has them."""
    return IM_START in (model.template or "") and all(token in tokenizer.special for token in CHAT_SPECIAL)
