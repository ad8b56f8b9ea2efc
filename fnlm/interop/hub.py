"""Models by their name on Hugging Face's hub: from its cache on this machine, else fetched by `huggingface_hub`."""

from __future__ import annotations

import os
import re
from pathlib import Path

from fnlm.checkpoint.files import CheckpointError

SHORT = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")
ORGANISATION = "openai-community"
WANTED = ("*.json", "*.safetensors", "merges.txt", "*.jinja")
_NAME = re.compile(r"(?!runs/|data/|\.)[\w.-]+/[\w.-]+")


def is_name(path: str | Path) -> bool:
    """Whether what is no path may be a name: gpt2 and its sizes, or ORGANISATION/NAME where there is no such folder."""
    name = Path(path).as_posix()
    if name in SHORT:
        return True
    return _NAME.fullmatch(name) is not None and not Path(path).parent.exists()


def folder(path: str | Path) -> Path:
    """The folder with a model's files. CheckpointError where it is neither in the cache nor to be had."""
    name = Path(path).as_posix()
    full = f"{ORGANISATION}/{name}" if name in SHORT else name
    found = cached(full)
    if found is not None:
        return found
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise CheckpointError(
            f"there is no {name}, here or in the hub's cache; to fetch it from Hugging Face: pip install 'fnlm[hub]'"
        ) from error
    try:
        return Path(snapshot_download(full, allow_patterns=list(WANTED)))
    except (OSError, ValueError) as error:  # what its errors are, those of the network included
        said = str(error).strip().partition("\n")[0]
        raise CheckpointError(
            f"there is no {name} here, and fetching it from Hugging Face's hub failed ({type(error).__name__}: {said})"
        ) from error


def cached(name: str) -> Path | None:
    """Where the hub's cache has the model whole enough to name its architecture, or None."""
    home = Path(os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface")
    hub = Path(os.environ.get("HF_HUB_CACHE") or home / "hub")
    below = hub / f"models--{name.replace('/', '--')}"
    ref = below / "refs" / "main"
    found = below / "snapshots" / ref.read_text(encoding="utf-8").strip() if ref.is_file() else None
    return found if found is not None and (found / "config.json").is_file() else None
