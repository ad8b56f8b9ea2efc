"""The models below the served folders: known by name, described without being loaded, loaded when asked for."""

from __future__ import annotations

import json
import logging
import math
import os
import threading
import time
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from fnlm import checkpoint, trained
from fnlm.checkpoint import layout
from fnlm.config import ModelConfig
from fnlm.decode import Prepared, prepare
from fnlm.tokenizers import Tokenizer

Stamp = tuple[tuple[str, int], ...]
FRESH = 1.0  # seconds for which a search through the folders is believed
_log = logging.getLogger(__name__)


class About(NamedTuple):
    """What there is to say of a model before it is loaded; `loss` in nats a token, of validation where there is one."""

    name: str
    chat: bool
    parameters: int
    step: int
    loss: float | None
    context: int
    saved: int


class Loaded(NamedTuple):
    """A model in memory; `weights` are prepared for decoding."""

    cfg: ModelConfig
    weights: Prepared
    tokenizer: Tokenizer
    step: int


class Models:
    """Models by name. `get` is for the one thread that owns them; the rest may be called from any.

    At most `keep` stay loaded; beyond that the one used longest ago is let go.
    """

    def __init__(self, folders: Sequence[str | Path], keep: int = 3, device: str = "cpu"):
        self.folders = [Path(folder) for folder in folders]
        self.keep, self.device = keep, device
        self._lock = threading.Lock()
        self._found: tuple[float, dict[str, Path]] = (-math.inf, {})
        self._about: dict[Path, tuple[Stamp, About]] = {}
        self._loaded: OrderedDict[str, tuple[Stamp, Loaded]] = OrderedDict()

    def paths(self) -> dict[str, Path]:
        """Where each model lies. A name that two folders share is preceded by the folder's."""
        with self._lock:
            when, found = self._found
            if time.monotonic() - when > FRESH:
                found = search(self.folders)
                self._found = (time.monotonic(), found)
            return found

    def about(self) -> dict[str, About]:
        """Every model that can be read; one that cannot is logged and left out."""
        said = ((name, self._describe(name, path)) for name, path in self.paths().items())
        return {name: about for name, about in said if about is not None}

    def get(self, name: str) -> Loaded:
        """The model, as the run's best (else newest) checkpoint has it now. KeyError for an unknown name."""
        path = self.paths()[name]
        now = stamp(path)
        kept = self._loaded.get(name)
        if kept is None or kept[0] != now:
            self._loaded[name] = (now, self._load(name, path, kept))
        self._loaded.move_to_end(name)
        while len(self._loaded) > self.keep:
            self._loaded.popitem(last=False)
        return self._loaded[name][1]

    def _load(self, name: str, path: Path, kept: tuple[Stamp, Loaded] | None) -> Loaded:
        try:
            model = trained.load(path, device=self.device)
        except (ValueError, OSError) as error:
            if kept is None:
                raise
            _log.warning("%s: the newer checkpoint cannot be read, the one in memory is kept: %s", name, error)
            return kept[1]
        _log.info("loaded %s, step %d", name, model.step)
        return Loaded(model.cfg, prepare(model.params, model.cfg), model.tokenizer, model.step)

    def _describe(self, name: str, path: Path) -> About | None:
        try:
            now = stamp(path)
            kept = self._about.get(path)
            if kept is None or kept[0] != now:
                kept = self._about[path] = (now, describe(name, path))
        except (ValueError, KeyError, TypeError, OSError) as error:
            _log.warning("%s is left out: %s", name, error)
            return None
        return kept[1]


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
    folder = checkpoints_of(path)
    files = [path / layout.COMMITTED, folder / layout.BEST, *folder.glob(f"*/{layout.COMMITTED}")]
    return tuple(sorted((str(f), f.stat().st_mtime_ns) for f in files if f.is_file()))


def checkpoints_of(path: Path) -> Path:
    """The folder with a run's checkpoints, or of checkpoints itself."""
    return path / "checkpoints" if (path / "checkpoints").is_dir() else path


def current(path: Path) -> Path:
    """The checkpoint that would be loaded, without reading it: itself, the best one, or else the newest."""
    if (path / layout.COMMITTED).is_file():
        return path
    folder = checkpoints_of(path)
    return checkpoint.best(folder) or layout.committed(folder)[0].path


def describe(name: str, path: Path) -> About:
    """A model's size, step and loss from its checkpoint's small files. Raises CheckpointError for a damaged one."""
    at = current(path)
    tree, config = checkpoint.describe(at), json.loads((at / layout.CONFIG).read_text(encoding="utf-8"))
    sizes = [math.prod(t["shape"]) for k, t in tree["tensors"].items() if k.startswith("params/")]
    extra = tree["extra"]
    loss = next((extra[k] for k in ("val_loss", "loss") if isinstance(extra.get(k), (int, float))), None)
    saved = int((at / layout.COMMITTED).stat().st_mtime)
    context = config["model"]["seq_len"]
    return About(name, config.get("kind") == "chat", sum(sizes), tree["step"], loss, context, saved)
