"""A trained model ready for use: found below a folder, loaded with its tokenizer from a checkpoint or a run."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch

from fnlm import checkpoint, tokenizers
from fnlm.checkpoint import CheckpointError
from fnlm.config import ModelConfig, did_you_mean
from fnlm.tokenizers import Tokenizer
from fnlm.types import Params

Which = Literal["best", "newest"]


class Trained(NamedTuple):
    """A model to sample from, evaluate or finetune, and where it comes from.

    `extra` is what the run noted at that step (losses, tokens seen), `config` the run's whole config.json.
    """

    cfg: ModelConfig
    params: Params
    tokenizer: Tokenizer
    path: Path
    step: int
    extra: dict[str, Any]
    config: dict[str, Any]

    @property
    def is_chat(self) -> bool:
        """Whether it was last trained on conversations."""
        return bool(self.config.get("kind") == "chat")


class Found(NamedTuple):
    """A model that a folder holds: `name` is its path below that folder, `path` what `load` takes."""

    name: str
    path: Path


def load(
    path: str | Path,
    which: Which = "best",
    average: bool = True,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
) -> Trained:
    """The model of a checkpoint, or of a run: its best checkpoint where one is marked, else the newest good one.

    `average`: the moving average of the parameters, where the run kept one (`ema`). Raises CheckpointError where there
    is no model, or no tokenizer beside it, in one line that says what to do.
    """
    at = locate(path, which)
    cfg, params, extra = checkpoint.load_params(at, average=average)
    about, config = checkpoint.describe(at), json.loads((at / "config.json").read_text(encoding="utf-8"))
    if not (at / "tokenizer.json").is_file():
        raise CheckpointError(f"{at} has no tokenizer.json; save it with tokenizer=PATH")
    tokenizer = tokenizers.load(at)
    if tokenizer.vocab_size > cfg.vocab_size:
        raise CheckpointError(
            f"{at}: its tokenizer has {tokenizer.vocab_size} tokens, the model only vocab_size={cfg.vocab_size}"
        )
    moved = {k: v.to(device=device, dtype=dtype) for k, v in params.items()}
    return Trained(cfg, moved, tokenizer, at, about["step"], extra, config)


def locate(path: str | Path, which: Which = "best") -> Path:
    """The checkpoint that a path stands for: itself, or a run's. Raises CheckpointError, with the nearest name."""
    path = Path(path)
    if not path.exists():
        siblings = [p.name for p in path.parent.iterdir() if p.is_dir()] if path.parent.is_dir() else []
        near = did_you_mean(path.name, siblings) if siblings else ""
        raise CheckpointError(f"there is no {path}{near}")
    folder = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    marked = checkpoint.best(folder) if which == "best" else None
    if marked is not None:
        try:
            checkpoint.verify(marked)
            return marked
        except CheckpointError:  # damaged since it was marked: the newest good one is said by `resolve`
            pass
    return checkpoint.resolve(path, "params")


def find(folder: str | Path) -> list[Found]:
    """Every model at or below a folder: runs by their name, checkpoints that lie in no run by theirs; sorted."""
    root = Path(folder)
    return sorted(_below(root, root))


def _below(folder: Path, root: Path) -> Iterator[Found]:
    if not folder.is_dir():
        return
    inner = folder / "checkpoints"
    if (inner.is_dir() and checkpoint.is_any(inner)) or checkpoint.is_any(folder) or (folder / "COMMITTED").is_file():
        yield Found(_name(folder, root), folder)
    else:
        for child in folder.iterdir():
            if not child.is_symlink():  # a link may lead outside, or around
                yield from _below(child, root)


def _name(folder: Path, root: Path) -> str:
    return folder.relative_to(root).as_posix() if folder != root else folder.resolve().name
