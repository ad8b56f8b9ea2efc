"""A model as a run of ours: a folder with its config and one checkpoint, of parameters alone."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from fnlm import checkpoint, random
from fnlm.checkpoint.files import CheckpointError
from fnlm.interop.foreign import Foreign, described
from fnlm.tokenizers import Tokenizer
from fnlm.types import Params, TrainState


def write(model: Foreign, tokenizer: Tokenizer, out: Path, force: bool = False, **more: Any) -> Path:
    """A model from elsewhere as a run; `more` goes into its config.json. Parameters keep their dtype.

    CheckpointError where `out` exists and holds something, unless `force` and it holds a run.
    """
    must_be_free(out, force, is_run, "is no run, and is not replaced; choose another --out")
    return write_run(model.load(), described(model, tokenizer) | more, tokenizer, out, force)


def write_run(params: Params, config: dict[str, Any], tokenizer: Tokenizer, out: Path, force: bool = False) -> Path:
    """The run's folder, there when it is whole. CheckpointError as of `write`."""
    must_be_free(out, force, is_run, "is no run, and is not replaced; choose another --out")
    temporary = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    try:
        temporary.mkdir(parents=True)
        state = TrainState(torch.tensor(0), params, (), random.key(0))
        vocabulary = tokenizer.save(temporary)
        checkpoint.save(temporary / "checkpoints", state, config=config, tokenizer=vocabulary, what="params")
        vocabulary.unlink()
        (temporary / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        if out.exists():
            shutil.rmtree(out)
        os.rename(temporary, out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return out


def must_be_free(out: Path, force: bool, is_own: Callable[[Path], bool], otherwise: str) -> None:
    """Raises CheckpointError unless `out` is not there, is an empty folder, or is replaced by `force`.

    Only what is recognised as such an output is replaced, whoever asks; `otherwise` ends the line for anything else.
    """
    if out.name in ("", ".."):
        raise CheckpointError(f"--out {out} has no name of its own; choose one such as runs/NAME")
    if not out.exists() or (out.is_dir() and not out.is_symlink() and not any(out.iterdir())):
        return
    if not force:
        raise CheckpointError(f"{out} exists; choose another --out, or replace it: --force")
    if out.is_symlink() or not is_own(out):
        raise CheckpointError(f"{out} {otherwise}")


def is_run(path: Path) -> bool:
    """Whether a folder is a run's: it has checkpoints and says what they are of."""
    return (path / "checkpoints").is_dir() and (path / "config.json").is_file()
