"""Models that other software wrote, and models for other software; docs/interop.md says which.

>>> model = read("shared/gpt2")  # the config, the tokenizer's text; weights when asked for
>>> params = model.load()
"""

from __future__ import annotations

from pathlib import Path

from fnlm.checkpoint.files import CheckpointError
from fnlm.interop import gguf, hf, hub, llama2c, nanogpt
from fnlm.interop.export import Model, to_hf
from fnlm.interop.foreign import Foreign, carried, check_tokenizer, described, read_tokenizer, speaks_chatml
from fnlm.interop.gguf_out import to_gguf
from fnlm.interop.peft import to_peft
from fnlm.interop.written import write, write_run

FORMATS = ("hf", "gguf", "llama2c", "nanogpt")
READERS = {"gguf": gguf.read, "llama2c": llama2c.read, "nanogpt": nanogpt.read}
TARGETS = ("hf", "gguf", "peft")


def find(path: str | Path) -> Path | None:
    """Where a model that `read` takes lies, fetched from the hub where the path is a name there; None for others."""
    path = Path(path)
    if not path.exists() and hub.is_name(path):
        return hub.folder(path)
    return path if is_foreign(path) else None


def is_foreign(path: str | Path) -> bool:
    """Whether a path is a model that `read` takes without being told its format."""
    path = Path(path)
    return hf.is_folder(path) or gguf.is_file(path) or llama2c.is_file(path)


def read(path: str | Path, kind: str | None = None) -> Foreign:
    """A model from elsewhere, its weights not yet read. CheckpointError, in a line, for what cannot be read."""
    path = Path(path)
    if not path.exists():
        raise CheckpointError(f"there is no {path}")
    if kind in (None, "hf") and path.is_dir():
        if not (path / hf.CONFIG).is_file():
            raise CheckpointError(f"{path} has no config.json; name a folder as Hugging Face lays them out")
        if (path / "checkpoints").is_dir() or (path / "COMMITTED").is_file():
            raise CheckpointError(
                f"{path} is fnlm's own, which every command takes as it is; there is nothing to import"
            )
        return hf.read(path)
    if path.is_file():
        kind = kind or next((k for k, found in (("gguf", gguf), ("llama2c", llama2c)) if found.is_file(path)), None)
        if kind in READERS:
            return READERS[kind](path)
    if path.suffix == ".pt" and kind is None:
        raise CheckpointError(
            f"{path} is a pickle; if it is nanoGPT's and you trust it: fnlm import {path} --from nanogpt"
        )
    raise CheckpointError(f"{path} is no model that is read; see docs/interop.md for those that are")


__all__ = [
    "FORMATS",
    "TARGETS",
    "Foreign",
    "Model",
    "carried",
    "check_tokenizer",
    "described",
    "find",
    "is_foreign",
    "read",
    "read_tokenizer",
    "speaks_chatml",
    "to_gguf",
    "to_hf",
    "to_peft",
    "write",
    "write_run",
]
