"""A model from elsewhere as a run of ours: a folder with its config and one checkpoint, of parameters alone."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch

from fnlm import checkpoint, random
from fnlm.checkpoint.files import CheckpointError
from fnlm.interop.foreign import Foreign, described
from fnlm.tokenizers import Tokenizer
from fnlm.types import TrainState


def write(model: Foreign, tokenizer: Tokenizer, out: Path, force: bool = False, **more: Any) -> Path:
    """The run's folder, there when it is whole; `more` goes into its config.json. Parameters keep their dtype.

    CheckpointError where `out` exists and holds something, unless `force`.
    """
    if out.exists() and not force and (not out.is_dir() or any(out.iterdir())):
        raise CheckpointError(f"{out} exists; choose another --out, or replace it: --force")
    params = model.load()
    config = described(model, tokenizer) | more
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
