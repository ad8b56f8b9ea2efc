"""A model of ours as a folder that Hugging Face's tools read."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from fnlm.config import ModelConfig
from fnlm.interop import outward, shards
from fnlm.interop.hf import KEPT
from fnlm.interop.homes import cut, home, theirs
from fnlm.interop.written import must_be_free
from fnlm.tokenizers import Tokenizer
from fnlm.types import Params

PARITY = "PARITY.json"


class Model(NamedTuple):
    """What is exported: `config` is the run's, where it says what the model was imported from."""

    cfg: ModelConfig
    params: Params
    tokenizer: Tokenizer
    config: dict[str, Any]

    @property
    def is_chat(self) -> bool:
        """Whether it was last trained on conversations."""
        return bool(self.config.get("kind") == "chat")


def exported(model: Model) -> Model:
    """The model as it leaves: without rows of the vocabulary that stand for no token, unless it came with them."""
    came = model.config.get("interop", {}).get("format") == "hf"
    if came or model.tokenizer.vocab_size >= model.cfg.vocab_size:
        return model
    cfg, params = cut(model.cfg, model.params, model.tokenizer.vocab_size)
    return model._replace(cfg=cfg, params=params)


def to_hf(
    model: Model,
    out: Path,
    force: bool = False,
    check: Callable[[Path, Model], dict[str, Any]] | None = None,
    shard_size: int | None = None,
) -> dict[str, Any]:
    """Write the folder, there when it is whole, and return what `check` says of it, which PARITY.json keeps.

    `shard_size`: bytes of a file of weights at most, so that there are several and an index where they need more.
    ValueError for a config without a home; CheckpointError where `out` holds something, unless it is such an export and
    `force`.
    """
    must_be_free(out, force, is_export, "holds what no export has written; choose another --out")
    home(model.cfg)
    leaving = exported(model)
    temporary = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    try:
        temporary.mkdir(parents=True)
        _write(leaving, temporary, shard_size)
        said = check(temporary, leaving) if check else {"checked": False}
        _json(temporary / PARITY, said)
        if out.exists():
            shutil.rmtree(out)
        os.rename(temporary, out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return said


def is_export(path: Path) -> bool:
    """Whether a folder was written by `to_hf`."""
    return (path / PARITY).is_file() and (path / "config.json").is_file()


def _write(model: Model, folder: Path, shard_size: int | None) -> None:
    family = home(model.cfg)
    values, tensors = theirs(model.cfg, model.params, family)
    kept = model.config.get("interop", {}).get("kept", {})
    ids = kept.get("config") or outward.ids_of(model.tokenizer, model.is_chat)
    named = {"architectures": [family.architecture], "model_type": family.model_type, **values}
    dtype = str(next(iter(model.params.values())).dtype).removeprefix("torch.")
    _json(folder / "config.json", {**named, **{k: ids[k] for k in KEPT if k in ids}, "torch_dtype": dtype})
    generation = kept.get("generation") or outward.generation(model.tokenizer, model.is_chat)
    _json(folder / "generation_config.json", generation)
    shards.write(folder, tensors, shard_size)
    template = outward.template_of(model.config, model.tokenizer, model.is_chat)
    _text(folder / "tokenizer.json", outward.tokenizer_json(model.tokenizer))
    about = outward.tokenizer_config(model.tokenizer, model.cfg.seq_len, ids, template)
    _json(folder / "tokenizer_config.json", about)
    _json(folder / "special_tokens_map.json", outward.special_tokens(model.tokenizer, ids))
    if template is not None:
        _text(folder / "chat_template.jinja", template)


def _json(path: Path, value: Any) -> None:
    _text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def _text(path: Path, text: str) -> None:
    path.write_bytes(text.encode("utf-8"))
