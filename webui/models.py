"""The models below the served folders: known by name, described without being loaded, loaded when asked for."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import threading
import time
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import torch

from fnlm import checkpoint, environment, interop, params, tokenizers, trained
from fnlm.checkpoint import layout
from fnlm.config import ModelConfig
from fnlm.data import Dialogue, dialogue_of, is_chat
from fnlm.decode import Prepared, prepare
from fnlm.lora import is_adapter
from fnlm.machine import has_fast_bf16, return_freed_memory
from fnlm.quantize import Bits, quantize
from fnlm.tokenizers import Tokenizer
from webui import checkpoints

Stamp = tuple[tuple[str, int], ...]
Kind = Literal["chat", "text"]
Precision = Literal["auto", "fp32", "bf16"]
FRESH = 1.0  # seconds for which a search through the folders is believed
LARGE = 30_000_000  # parameters, from which reading them is what takes the time, and half as many bytes pay
_log = logging.getLogger(__name__)


class About(NamedTuple):
    """What there is to say of a model before it is loaded; `loss` in nats a token, of validation where there is one."""

    name: str
    kind: Kind
    parameters: int
    step: int
    loss: float | None
    context: int
    saved: int

    @property
    def chat(self) -> bool:
        """Whether it was trained on conversations."""
        return self.kind == "chat"


class Reader(NamedTuple):
    """What reads a prompt for a model, without the model."""

    tokenizer: Tokenizer
    context: int
    dialogue: Dialogue


class Loaded(NamedTuple):
    """A model in memory; `weights` are prepared for decoding."""

    cfg: ModelConfig
    weights: Prepared
    tokenizer: Tokenizer
    step: int

    @property
    def size(self) -> int:
        """Bytes of its parameters."""
        parts = [self.weights.root, *self.weights.blocks]
        return sum(p.numel() * p.element_size() for part in parts for p in part.values())


class Models:
    """Models by name, for any thread; `get` may take long.

    Those loaded have at most `memory` bytes together (half of what is free at the start), else the one used longest
    ago is let go. `precision` "auto": bfloat16 on a GPU or a CPU that multiplies it quickly, for large models.
    `quantize`: their matrices in so many bits, the rest in bfloat16.
    """

    def __init__(
        self,
        folders: Sequence[str | Path],
        memory: int | None = None,
        device: str = "cpu",
        precision: Precision = "auto",
        quantize: Bits | None = None,
    ):
        self.folders = [Path(folder) for folder in folders]
        self.device, self.precision, self.quantize = device, precision, quantize
        self.memory = environment.memory_available(device) // 2 if memory is None else memory
        self._loading = threading.Lock()
        self._readers: dict[str, tuple[Stamp, Reader]] = {}
        self._lock = threading.Lock()
        self._found: tuple[float, dict[str, Path]] = (-math.inf, {})
        self._about: dict[Path, tuple[Stamp, About]] = {}
        self._measured = checkpoints.Measured()
        self._loaded: OrderedDict[str, tuple[Stamp, Loaded]] = OrderedDict()

    def paths(self) -> dict[str, Path]:
        """Where each model lies. A name that two folders share is preceded by the folder's."""
        with self._lock:
            when, found = self._found
            if time.monotonic() - when > FRESH:
                found = search(self.folders)
                self._found = (time.monotonic(), found)
            return found

    def where(self, name: str) -> Path:
        """The path of a model, or of a run's checkpoint by NAME@STEP or NAME@newest. KeyError for an unknown name."""
        paths = self.paths()
        return paths[name] if name in paths else checkpoints.named(name, paths)

    def about(self, asked: object = None) -> dict[str, About]:
        """Every model, and the checkpoint that is `asked` for; one that cannot be read is logged and left out."""
        paths = self.paths()
        if isinstance(asked, str) and asked not in paths:
            with contextlib.suppress(KeyError):
                paths = {**paths, asked: self.where(asked)}
        said = ((name, self._describe(name, path)) for name, path in paths.items())
        return {name: about for name, about in said if about is not None}

    def saved(self, name: str) -> list[About]:
        """The committed checkpoints of a run, the one committed last first; none of what is no run."""
        found = checkpoints.saved(self.where(name))
        said = (self._describe(f"{name}@{step}", path) for step, path in found.items())
        return [about for about in said if about is not None]

    def get(self, name: str) -> Loaded:
        """The model, as the run's best (else newest) checkpoint has it now. KeyError for an unknown name."""
        with self._loading:
            kept = self.ready(name)
            if kept is not None:
                return kept
            path = self.where(name)
            now = stamp(path)
            model = self._load(name, path)
            with self._lock:
                self._loaded[name] = (now, model)
                self._loaded.move_to_end(name)
                while len(self._loaded) > 1 and sum(m.size for _, m in self._loaded.values()) > self.memory:
                    _log.info("let go of %s", self._loaded.popitem(last=False)[0])
        return_freed_memory()  # what reading took, and models that nobody holds any more
        return model

    def ready(self, name: str) -> Loaded | None:
        """The model, if it is loaded and nothing newer was committed. KeyError for an unknown name."""
        path = self.where(name)
        with self._lock:
            kept = self._loaded.get(name)
            if kept is None or kept[0] != stamp(path):
                return None
            self._loaded.move_to_end(name)
            return kept[1]

    def holds(self, model: Loaded) -> bool:
        """Whether this is what new requests get."""
        with self._lock:
            return any(kept is model for _, kept in self._loaded.values())

    def reader(self, name: str) -> Reader:
        """The tokenizer and the context of a model that need not be loaded. KeyError for an unknown name."""
        path = self.where(name)
        now, kept = stamp(path), self._readers.get(name)
        if kept is None or kept[0] != now:
            kept = self._readers[name] = (now, read(path))
        return kept[1]

    def _load(self, name: str, path: Path) -> Loaded:
        try:
            model = trained.load(path, device=self.device, dtype="saved")
        except (ValueError, OSError) as error:
            with self._lock:
                kept = self._loaded.get(name)
            if kept is None:
                raise
            _log.warning("%s: the newer checkpoint cannot be read, the one in memory is kept: %s", name, error)
            return kept[1]
        dtype = dtype_of("bf16" if self.quantize else self.precision, self.device, params.count(model.cfg))
        said = f"int{self.quantize}" if self.quantize else str(dtype).removeprefix("torch.")
        _log.info("loaded %s, step %d, %s", name, model.step, said)
        weights = model.params
        if self.quantize:
            weights = quantize({name: p.to(dtype) for name, p in weights.items()}, self.quantize)
        return Loaded(model.cfg, prepare(weights, model.cfg, dtype, donate=True), model.tokenizer, model.step)

    def _describe(self, name: str, path: Path) -> About | None:
        try:
            now = stamp(path)
            kept = self._about.get(path)
            if kept is None or kept[0] != now:
                kept = self._about[path] = (now, describe(name, path))
        except (ValueError, KeyError, TypeError, OSError) as error:
            _log.warning("%s is left out: %s", name, error)
            return None
        measured = self._measured.loss(path, kept[1].step)
        return kept[1]._replace(name=name, loss=kept[1].loss if measured is None else measured)


def dtype_of(precision: Precision, device: str, parameters: int) -> torch.dtype:
    """The type of the parameters that serves."""
    if precision == "auto":
        wide = device == "cpu" and parameters < LARGE
        return torch.float32 if wide or not has_fast_bf16(device) else torch.bfloat16
    return torch.bfloat16 if precision == "bf16" else torch.float32


def read(path: Path) -> Reader:
    """A model's tokenizer and context. Raises CheckpointError where they cannot be read."""
    if interop.is_foreign(path):
        model = interop.read(path)
        tokenizer = interop.read_tokenizer(model)
        return Reader(tokenizer, model.cfg.seq_len, dialogue_of(interop.described(model, tokenizer), tokenizer))
    at = trained.locate(path)
    config, tokenizer = json.loads((at / layout.CONFIG).read_text(encoding="utf-8")), tokenizers.load(at)
    return Reader(tokenizer, int(config["model"]["seq_len"]), dialogue_of(config, tokenizer))


def search(folders: Sequence[Path]) -> dict[str, Path]:
    """All models below the folders by name; names are valid Unicode and each is there once."""
    found: dict[str, Path] = {}
    for folder in folders:
        for model in trained.find(folder):
            name = plain(model.name)
            if name in found and found[name].resolve() != model.path.resolve():
                name = plain(f"{folder.resolve().name}/{name}")
            known, number = name, 2
            while known in found and found[known].resolve() != model.path.resolve():
                known, number = f"{name}-{number}", number + 1
            found.setdefault(known, model.path)
    return found


def plain(name: str) -> str:
    """A file name as text that can be sent: bytes that are not UTF-8 become U+FFFD."""
    return os.fsencode(name).decode("utf-8", errors="replace")


def stamp(path: Path) -> Stamp:
    """What changes whenever a checkpoint of the run is committed, marked or taken away; costs no reading."""
    folder = checkpoints.folder_of(path)
    if interop.is_foreign(path):
        return ((str(path), path.stat().st_mtime_ns),)
    files = [path / layout.COMMITTED, folder / layout.BEST, *folder.glob(f"*/{layout.COMMITTED}")]
    return tuple(sorted((str(f), f.stat().st_mtime_ns) for f in files if f.is_file()))


def current(path: Path) -> Path:
    """The checkpoint that would be loaded, without reading it: itself, the best one, or else the newest."""
    if (path / layout.COMMITTED).is_file():
        return path
    folder = checkpoints.folder_of(path)
    return checkpoint.best(folder) or layout.committed(folder)[0].path


def describe(name: str, path: Path) -> About:
    """A model's size, step and loss from its checkpoint's small files. Raises CheckpointError for a damaged one."""
    if interop.is_foreign(path):
        return _foreign(name, path)
    at = current(path)
    tree, config = checkpoint.describe(at), json.loads((at / layout.CONFIG).read_text(encoding="utf-8"))
    sizes = [math.prod(t["shape"]) for k, t in tree["tensors"].items() if k.startswith("params/") and not is_adapter(k)]
    extra = tree["extra"]
    loss = next((extra[k] for k in ("val_loss", "loss") if isinstance(extra.get(k), (int, float))), None)
    saved = int((at / layout.COMMITTED).stat().st_mtime)
    context = config["model"]["seq_len"]
    came = config.get("interop", {}).get("template") is not None
    kind = kind_of(config.get("kind") == "chat" or (came and is_chat(config, tokenizers.load(at))))
    return About(name, kind, sum(sizes), tree["step"], loss, context, saved)


def _foreign(name: str, path: Path) -> About:
    """The same of a model that other software wrote. Raises CheckpointError for one that cannot be read."""
    model = interop.read(path)
    tokenizer = interop.read_tokenizer(model)
    chat = is_chat(interop.described(model, tokenizer), tokenizer)
    saved = int(path.stat().st_mtime)
    return About(name, kind_of(chat), params.count(model.cfg), 0, None, model.cfg.seq_len, saved)


def kind_of(chat: bool) -> Kind:
    """What a model was last trained on, in a word."""
    return "chat" if chat else "text"
