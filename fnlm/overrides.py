"""Fields of a config given as text, `key=value` or `--key value`: read, checked against their types, and applied."""

from __future__ import annotations

import ast
import difflib
import types
from collections.abc import Iterator, Sequence
from dataclasses import fields
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from pydantic import ConfigDict, TypeAdapter, ValidationError

from fnlm.config import did_you_mean, override

# nanoGPT's names; one stands for its field only where the config has no field of that name itself.
ALIASES: dict[str, tuple[str, ...]] = {
    "n_layer": ("n_layers",),
    "n_head": ("n_heads",),
    "n_embd": ("d_model",),
    "block_size": ("seq_len",),
    "dropout": ("dropout_embed", "dropout_attn", "dropout_residual"),
}
C = TypeVar("C")


def parse(words: Sequence[str], kind: type[C], base: C, also: Sequence[str] = ()) -> C:
    """`base` with the overrides in `words`; a later one replaces an earlier one.

    Raises ValueError, in one line, for an unknown key (with the nearest name; `also` are further names to suggest, such
    as a command's own "--json"), for a value that is not of the field's type, and for a word that is no override.
    """
    plain, pairs = split(words)
    if plain:
        raise ValueError(f"{plain[0]!r} sets nothing; write KEY=VALUE or --KEY VALUE")
    return apply(pairs, kind, base, also)


def split(words: Sequence[str]) -> tuple[list[str], list[tuple[str, str | None]]]:
    """The words that are no override, and the (key, value) pairs: value None for a `--key` that no value follows.

    `key=value`, `--key=value` and `--key value` mean the same, and a key may be written with dashes.
    """
    plain: list[str] = []
    pairs: list[tuple[str, str | None]] = []
    rest = list(words)
    while rest:
        word = rest.pop(0)
        key, equals, value = word.partition("=")
        name = key.removeprefix("--").replace("-", "_")
        if equals:
            pairs.append((name, value))
        elif not word.startswith("--"):
            plain.append(word)
        else:
            # `-1` is a value, `--other` and `other=1` are not
            follows = bool(rest) and not rest[0].startswith("--") and "=" not in rest[0]
            pairs.append((name, rest.pop(0) if follows else None))
    return plain, pairs


def apply(pairs: Sequence[tuple[str, str | None]], kind: type[C], base: C, also: Sequence[str] = ()) -> C:
    """`base` with the fields of `kind` that the pairs name changed; errors as in `parse`."""
    hints = get_type_hints(kind)
    names = [f.name for f in fields(kind)]  # type: ignore[arg-type]
    changes: dict[str, Any] = {}
    for key, text in pairs:
        targets = _targets(key, names, kind.__name__, also)
        if text is None:
            raise ValueError(f"--{key} has no value; write {key}={describe(hints[targets[0]])}")
        changes |= {name: value_of(key, text, hints[name]) for name in targets}
    return override(base, **changes)


def _targets(key: str, names: Sequence[str], owner: str, also: Sequence[str]) -> tuple[str, ...]:
    """The fields that a key sets: itself, or those that an alias stands for."""
    aliases = {alias: targets for alias, targets in ALIASES.items() if set(targets) <= set(names)}
    if key in names or key in aliases:
        return (key,) if key in names else aliases[key]
    near = difflib.get_close_matches(key, [*names, *aliases, *also], n=1)
    raise ValueError(f"{owner} has no field {key!r}{did_you_mean(near[0] if near else key, near or names)}")


def value_of(key: str, text: str, hint: Any) -> Any:
    """The value that `text` writes, of type `hint`. Raises ValueError naming the key, the text and what is expected."""
    if type(None) in get_args(hint) and text.lower() in {"none", "null"}:
        return None
    adapter: TypeAdapter[Any] = TypeAdapter(hint, config=ConfigDict(allow_inf_nan=False))
    try:
        if any(get_origin(part) is tuple for part in _parts(hint)):
            return adapter.validate_python(ast.literal_eval(text.strip()))
        return adapter.validate_strings(text.strip())
    except (ValidationError, SyntaxError, ValueError) as error:
        choices = [str(c) for part in _parts(hint) if get_origin(part) is Literal for c in get_args(part)]
        near = did_you_mean(text, choices) if difflib.get_close_matches(text, choices) else ""
        raise ValueError(f"{key}={text} is not {describe(hint)}{near}") from error


def _parts(hint: Any) -> Iterator[Any]:
    """The members of a union, or the type itself."""
    yield from get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)


def describe(hint: Any) -> str:
    """A type in the words of a user: "a whole number or none"."""
    return " or ".join(_words(part) for part in _parts(hint))


def _words(part: Any) -> str:
    if get_origin(part) is Literal:
        return "one of " + ", ".join(map(str, get_args(part)))
    if get_origin(part) is tuple:
        return "a list such as " + ("[1, 2]" if get_args(part)[0] is int else "[[2, 16384], [3, 65536]]")
    known = {int: "a whole number", float: "a number", bool: "true or false", type(None): "none", str: "a text"}
    return known.get(part, getattr(part, "__name__", str(part)))
