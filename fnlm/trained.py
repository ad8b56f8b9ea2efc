"""A trained model ready for use: found below a folder, loaded with its tokenizer from a checkpoint, a run, or a file or
folder that other software wrote.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch

from fnlm import checkpoint, interop, lora, tokenizers
from fnlm.checkpoint import CheckpointError
from fnlm.config import ModelConfig, did_you_mean
from fnlm.data import Dialogue, dialogue_of, is_chat
from fnlm.tokenizers import Tokenizer
from fnlm.trainable import lora_scale
from fnlm.types import Params

Which = Literal["best", "newest"]
SHOWN = 5  # folders that a message names
TAIL = 1 << 14  # bytes of a log's end, in which its last step stands


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
        """Whether it was last trained on conversations, here or, by its chat template, elsewhere."""
        return is_chat(self.config, self.tokenizer)

    @property
    def dialogue(self) -> Dialogue:
        """How its conversations are written."""
        return dialogue_of(self.config, self.tokenizer)


class Adapters(NamedTuple):
    """Low-rank adapters and what they are added times (`fnlm.lora`); `config` is the run's."""

    cfg: ModelConfig
    params: Params
    rank: int
    scale: float
    config: dict[str, Any]


class Found(NamedTuple):
    """A model that a folder holds: `name` is its path below that folder, `path` what `load` takes."""

    name: str
    path: Path


def load(
    path: str | Path,
    which: Which = "best",
    average: bool = True,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | Literal["saved"] | None = None,
) -> Trained:
    """The model of a checkpoint, or of a run: its best checkpoint where one is marked, else the newest good one.

    Also of what other software wrote, as `fnlm.interop` reads it, and by name from Hugging Face's hub. `average`: the
    moving average of the parameters, where the run kept one (`ema`). `dtype` None: float32 of what was saved shorter.
    Raises CheckpointError where there is no model, or no tokenizer beside it, in one line that says what to do.
    """
    at = locate(path, which)
    if interop.is_foreign(at):
        return _foreign(at, device, dtype)
    cfg, params, extra = checkpoint.load_params(at, average=average)
    about, config = checkpoint.describe(at), json.loads((at / "config.json").read_text(encoding="utf-8"))
    if (scale := scale_of(config)) is not None:
        params = lora.merge(params, scale)
    if not (at / "tokenizer.json").is_file():
        raise CheckpointError(f"{at} has no tokenizer.json; save it with tokenizer=PATH")
    tokenizer = tokenizers.load(at)
    if tokenizer.vocab_size > cfg.vocab_size:
        raise CheckpointError(
            f"{at}: its tokenizer has {tokenizer.vocab_size} tokens, the model only vocab_size={cfg.vocab_size}"
        )
    return Trained(cfg, _moved(params, device, dtype), tokenizer, at, about["step"], extra, config)


def adapters(path: str | Path, which: Which = "best", average: bool = True) -> Adapters:
    """The adapters of a run trained with `lora`, apart from its model. CheckpointError where there are none."""
    at = locate(path, which)
    config = {} if interop.is_foreign(at) else json.loads((at / "config.json").read_text(encoding="utf-8"))
    scale = scale_of(config)
    if scale is None:
        raise CheckpointError(f"{at} has no adapters: it was not trained with lora=RANK")
    cfg, params, _ = checkpoint.load_params(at, average=average)
    own = {k: p for k, p in params.items() if lora.is_adapter(k)}
    return Adapters(cfg, own, int(config["train"]["lora"]), scale, config)


def scale_of(config: dict[str, Any]) -> float | None:
    """What a run's adapters are added times, None for a run without."""
    train = config.get("train", {})
    rank, alpha = train.get("lora"), train.get("lora_alpha")
    return None if rank is None else lora_scale(rank, alpha)


def _foreign(at: Path, device: str | torch.device, dtype: torch.dtype | Literal["saved"] | None) -> Trained:
    model = interop.read(at)
    tokenizer = interop.read_tokenizer(model)
    params = _moved(model.load(), device, dtype)
    return Trained(model.cfg, params, tokenizer, at, 0, {}, interop.described(model, tokenizer))


def _moved(params: Params, device: str | torch.device, dtype: torch.dtype | Literal["saved"] | None) -> Params:
    def wanted(p: torch.Tensor) -> torch.dtype:
        if isinstance(dtype, torch.dtype):
            return dtype
        return torch.float32 if dtype is None and p.dtype in (torch.float16, torch.bfloat16) else p.dtype

    return {k: v.to(device=device, dtype=wanted(v)) for k, v in params.items()}


def locate(path: str | Path, which: Which = "best") -> Path:
    """What a path stands for: a checkpoint, a run's, or another tool's model. CheckpointError with the nearest name.

    `RUN@best`, `RUN@newest` and `RUN@1000` name one of a run's checkpoints.
    """
    path = Path(path)
    run, at, choice = path.name.rpartition("@")
    if at and run and not path.exists() and path.with_name(run).is_dir():
        if choice in ("best", "newest"):
            return locate(path.with_name(run), choice)  # type: ignore[arg-type]
        if choice.isdecimal():
            return locate(path.with_name(run) / "checkpoints" / f"{int(choice):08d}")
    if (elsewhere := interop.find(path)) is not None:
        return elsewhere
    if not path.exists():
        siblings = sorted(p.name for p in path.parent.iterdir() if p.is_dir()) if path.parent.is_dir() else []
        raise CheckpointError(f"there is no {path}{_nearest(path.name, siblings)}")
    folder = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    marked = checkpoint.best(folder) if which == "best" else None
    if marked is not None:
        try:
            checkpoint.verify(marked)
            return marked
        except CheckpointError:  # damaged since it was marked: the newest good one is said by `resolve`
            pass
    try:
        return checkpoint.resolve(path, "params")
    except CheckpointError as error:
        raise CheckpointError(f"{error}{_progress(folder.parent)}") from error


def _progress(run: Path) -> str:
    """How far a run without a checkpoint is, by the end of its log; empty where it has none."""
    log, config = run / "metrics.jsonl", run / "config.json"
    if not log.is_file() or not config.is_file():
        return ""
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - TAIL))
        steps = re.findall(rb'"step": (\d+)', file.read())
    every = json.loads(config.read_text(encoding="utf-8")).get("run", {}).get("save_every")
    if not steps:
        return ""
    saves = f" and it saves one each save_every={every} steps" if every else ""
    return f"; its log is at step {int(steps[-1])}{saves}: wait for the first, or train it anew with --force"


def _nearest(name: str, siblings: list[str]) -> str:
    """The folders that may have been meant: the one that is nearly called so, all of a few, or the nearest of many."""
    near = did_you_mean(name, siblings) if siblings else ""
    if len(siblings) <= SHOWN or "did you mean" in near:
        return near
    some = difflib.get_close_matches(name, siblings, SHOWN, 0.0)
    return f"; choose from the {len(siblings)} folders there, such as {', '.join(some)}"


def find(folder: str | Path) -> list[Found]:
    """Every model at or below a folder: runs by their name, others (in no run, other software's) by theirs.

    A path that is one file, or a name on the hub, is one model. Sorted.
    """
    root = Path(folder)
    if not root.is_dir() and (elsewhere := interop.find(root)) is not None:
        return [Found(root.as_posix() if elsewhere != root else root.name, elsewhere)]
    return sorted(_below(root, root))


def _below(folder: Path, root: Path) -> Iterator[Found]:
    if not folder.is_dir():
        if interop.is_foreign(folder):
            yield Found(_name(folder, root), folder)
        return
    inner = folder / "checkpoints"
    ours = (inner.is_dir() and checkpoint.is_any(inner)) or checkpoint.is_any(folder)
    if ours or (folder / "COMMITTED").is_file() or interop.is_foreign(folder):
        yield Found(_name(folder, root), folder)
    else:
        for child in folder.iterdir():
            if not child.is_symlink():  # a link may lead outside, or around
                yield from _below(child, root)


def _name(folder: Path, root: Path) -> str:
    return folder.relative_to(root).as_posix() if folder != root else folder.resolve().name
