"""Hugging Face folders in: config.json says which family, safetensors hold the tensors, no module is built."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fnlm.checkpoint.files import CheckpointError
from fnlm.config import did_you_mean
from fnlm.interop import stored, vocabulary
from fnlm.interop.described import Described
from fnlm.interop.families import BY_ARCHITECTURE, Family, weights
from fnlm.interop.foreign import Foreign
from fnlm.interop.stored import Tensors
from fnlm.interop.ties import taken
from fnlm.types import Params

CONFIG = "config.json"
KEPT = ("bos_token_id", "eos_token_id", "pad_token_id")


def is_folder(path: Path) -> bool:
    """Whether a folder is laid out as Hugging Face's models are: its config.json names an architecture.

    One whose config.json cannot be read, beside their weights, counts: `read` says what is wrong with it.
    """
    file = path / CONFIG
    if not file.is_file() or (path / "checkpoints").is_dir() or (path / "COMMITTED").is_file():
        return False
    try:
        found = stored.read_json(file)
    except CheckpointError:
        return (path / stored.WEIGHTS).is_file() or (path / stored.INDEX).is_file()
    return "architectures" in found or "model_type" in found


def read(folder: Path) -> Foreign:
    """The model of a folder, its weights not yet read. CheckpointError, in a line, for one that cannot be."""
    described = Described(stored.read_json(folder / CONFIG), folder / CONFIG)
    family = family_of(described)
    described.must(quantization_config=None)
    cfg = family.config(described)
    tensors = _named(stored.of_folder(folder), family, cfg.tied)
    if cfg.n_layers > len(tensors):
        raise CheckpointError(f"{folder}: config.json says {cfg.n_layers} layers, but there are {len(tensors)} tensors")

    def load() -> Params:
        return taken(tensors, weights(cfg, family), cfg, str(folder))

    template = vocabulary.template_of(folder)
    return Foreign(
        cfg, load, str(folder), "hf", family.architecture, vocabulary.of_folder(folder), template, _kept(described)
    )


def family_of(described: Described) -> Family:
    """The family that a config.json names. CheckpointError for another, with those that are read."""
    named = described.get("architectures") or []
    if not isinstance(named, list) or not all(isinstance(name, str) for name in named):
        raise CheckpointError(f"{described.path}: architectures={named!r} is not a list of names")
    by_type = {family.model_type: family.architecture for family in BY_ARCHITECTURE.values()}
    name = named[0] if named else by_type.get(str(described.get("model_type")), str(described.get("model_type")))
    if name not in BY_ARCHITECTURE:
        known = list(BY_ARCHITECTURE)
        remedy = did_you_mean(name, known) if "did you mean" in did_you_mean(name, known) else ""
        raise CheckpointError(
            f"{described.path}: architecture {name!r} is not supported; supported: {', '.join(known)}{remedy}"
        )
    return BY_ARCHITECTURE[name]


def _named(tensors: Tensors, family: Family, tied: bool) -> Tensors:
    """The tensors by full name: without buffers, without a tied head; a base model's get their prefix."""
    kept = {name: t for name, t in tensors.items() if not name.endswith(family.ignored or ("\0",))}
    if kept and not any(name.startswith(family.prefix) for name in kept):
        kept = {name if name == family.head else family.prefix + name: t for name, t in kept.items()}
    return {name: t for name, t in kept.items() if not (tied and name == family.head)}


def _kept(described: Described) -> dict[str, Any]:
    own = {name: described.values[name] for name in KEPT if name in described.values}
    file = described.path.with_name("generation_config.json")
    return {"config": own, "generation": stored.read_json(file) if file.is_file() else {}}
