"""A run's settings from everywhere they may come from: defaults < file < environment FNLM_* < command line."""

from __future__ import annotations

import difflib
import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from fnlm import overrides
from fnlm.config import did_you_mean
from fnlm.loop import KINDS, Settings

Pair = tuple[str, str | None]

# nanoGPT's names of what is not the model (overrides.ALIASES has those).
NANOGPT = {
    "learning_rate": "lr", "max_iters": "steps", "warmup_iters": "warmup", "beta1": "b1", "beta2": "b2",
    "grad_clip": "clip", "gradient_accumulation_steps": "micro_batches", "eval_interval": "eval_every",
    "log_interval": "log_every", "eval_iters": "eval_windows", "dtype": "precision", "batch": "batch_size",
}  # fmt: skip
VALUES = {
    "precision": {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"},
    "compile": {"true": "step", "True": "step", "false": "off", "False": "off"},
}
NOT_SETTINGS = ("FNLM_API_KEY", "FNLM_TEST_DATA", "FNLM_HOME")


def owners() -> dict[str, str]:
    """The record that each field belongs to; no two share a name."""
    return {f.name: kind for kind, record in KINDS.items() for f in fields(record)}


def applied(base: Settings, pairs: Sequence[Pair], also: Sequence[str] = ()) -> Settings:
    """The four records with the pairs applied, which may be dotted: `train.lr=3e-4`.

    Raises ValueError in one line for an unknown key, with the nearest one, and for a value that does not fit.
    """
    records: tuple[Any, ...] = base
    known, found = owners(), dict(zip(KINDS, records, strict=True))
    sorted_pairs: dict[str, list[Pair]] = {kind: [] for kind in KINDS}
    for key, value in pairs:
        kind, name = _owner(key, known, also)
        sorted_pairs[kind].append((name, VALUES.get(name, {}).get(value or "", value)))
    for kind, mine in sorted_pairs.items():
        found[kind] = overrides.apply(mine, KINDS[kind], found[kind], also)
    model, train, run, compute = found.values()
    return model, train, run, compute


def _owner(key: str, known: Mapping[str, str], also: Sequence[str]) -> tuple[str, str]:
    """The record and the field that a key means."""
    section, dot, rest = key.rpartition(".")
    name = NANOGPT.get(rest, rest)
    if dot and section not in KINDS:
        raise ValueError(f"there is no section {section!r} in {key!r}{did_you_mean(section, list(KINDS))}")
    if name in known and section in ("", known[name]):
        return known[name], name
    if name in overrides.ALIASES and section in ("", "model"):
        return "model", name
    words = [k for k, kind in known.items() if section in ("", kind)]
    near = difflib.get_close_matches(rest, [*words, *NANOGPT, *overrides.ALIASES, *also], n=1)
    raise ValueError(f"there is no setting {key!r}{did_you_mean(near[0], near) if near else _where()}")


def _where() -> str:
    return "; docs/cli.md lists them, and 'fnlm train PRESET --dry-run' prints them"


def from_file(path: Path) -> list[Pair]:
    """The pairs of a TOML or YAML file, with or without the sections [model], [train], [run], [compute]."""
    try:
        text = path.read_text(encoding="utf-8")
        values = _toml(text) if path.suffix == ".toml" else _yaml(text)
    except ValueError as error:
        raise ValueError(f"{path}: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds no settings; write lines such as 'lr = 3e-4' (TOML) or 'lr: 3e-4' (YAML)")
    pairs: list[Pair] = []
    for key, value in values.items():
        inner = {f"{key}.{k}": v for k, v in value.items()} if isinstance(value, dict) else {key: value}
        pairs += [(name, _text(v)) for name, v in inner.items()]
    _require_known(str(path), [name for name, _ in pairs])
    return pairs


def _require_known(where: str, keys: Sequence[str]) -> None:
    """Raises ValueError, with where it stands, for a key that is no setting."""
    known = owners()
    for key in keys:
        try:
            _owner(key, known, ())
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error


def _toml(text: str) -> Any:
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    return tomllib.loads(text)


def _yaml(text: str) -> Any:
    import yaml

    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from error


def _text(value: Any) -> str:
    """A value as it would be written on the command line."""
    if value is None:
        return "none"
    return value if isinstance(value, str) else json.dumps(value)


def from_environment(environment: Mapping[str, str] = os.environ) -> list[Pair]:
    """`FNLM_LR=3e-4` as lr=3e-4; a name that is no setting is an error, as it would be on the command line."""
    names = sorted(name for name in environment if name.startswith("FNLM_") and name not in NOT_SETTINGS)
    pairs: list[Pair] = [(name.removeprefix("FNLM_").lower(), environment[name]) for name in names]
    for variable, (key, _) in zip(names, pairs, strict=True):
        _require_known(f"environment variable {variable}", [key])
    return pairs


def set_to_auto(pairs: Sequence[Pair], key: str) -> tuple[list[Pair], bool]:
    """The pairs without `key=auto`, and whether that was the last word on it."""
    mine = [value for name, value in pairs if names(name) == key]
    rest = [(name, value) for name, value in pairs if not (names(name) == key and value == "auto")]
    return rest, bool(mine) and mine[-1] == "auto"


def names(key: str) -> str:
    """The field that a key names, without its section and by our name."""
    word = key.rpartition(".")[2]
    return NANOGPT.get(word, word)


def steps_in(pairs: Sequence[Pair]) -> int | None:
    """The number of steps that the pairs ask for, where it is one."""
    asked = [value for key, value in pairs if names(key) == "steps"]
    return int(asked[-1]) if asked and asked[-1] and asked[-1].isdecimal() else None


def given(pairs: Sequence[Pair], *wanted: str) -> bool:
    """Whether one of the settings is set by the pairs."""
    return any(names(key) in wanted for key, _ in pairs)
