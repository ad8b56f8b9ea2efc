"""Weights as one safetensors file, or as several with an index, as Hugging Face's tools write and read them."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from fnlm.checkpoint.files import safetensors, write_file
from fnlm.interop.stored import INDEX, WEIGHTS

UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "ki": 2**10, "mi": 2**20, "gi": 2**30}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([kmg]i?)?b?", re.IGNORECASE)


def size_of(text: str) -> int:
    """Bytes of a size such as 500MB, 2GB or 1.5GiB. ValueError for what is none, or none at all."""
    found = _SIZE.fullmatch(text.strip())
    size = int(float(found[1]) * UNITS[(found[2] or "").lower()]) if found else 0
    if size < 1:
        raise ValueError(f"{text!r} is not a size such as 500MB, 2GB or 1.5GiB")
    return size


def parts(tensors: Mapping[str, Tensor], most: int | None) -> list[dict[str, Tensor]]:
    """The tensors in order, in parts of at most `most` bytes; one that is larger has a part to itself."""
    out: list[dict[str, Tensor]] = [{}]
    room = most
    for name, tensor in tensors.items():
        if room is not None and most is not None and out[-1] and tensor.nbytes > room:
            out.append({})
            room = most
        out[-1][name] = tensor
        room = None if room is None else room - tensor.nbytes
    return out


def write(folder: Path, tensors: Mapping[str, Tensor], most: int | None = None) -> None:
    """model.safetensors, or where that would be larger than `most` bytes, its parts and their index."""
    found = parts(tensors, most)
    if len(found) == 1:
        write_file(folder / WEIGHTS, safetensors(found[0]))
        return
    placed: dict[str, str] = {}
    for i, part in enumerate(found, 1):
        name = f"model-{i:05d}-of-{len(found):05d}.safetensors"
        write_file(folder / name, safetensors(part))
        placed |= dict.fromkeys(part, name)
    total = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": placed}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
