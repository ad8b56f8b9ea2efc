"""What goes into a checkpoint: tensors by file, and what JSON can hold of the rest."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from fnlm import tree
from fnlm.checkpoint import layout
from fnlm.checkpoint.files import CheckpointError, Parts, safetensors
from fnlm.checkpoint.layout import What
from fnlm.types import NameMask, TrainState


class Outline(NamedTuple):
    """A checkpoint without its tensors: what tree.json says, and the files beside it."""

    step: int
    what: What
    about: dict[str, Any]
    files: dict[str, Parts]


class Packed(NamedTuple):
    """A checkpoint before it is written: the contents of each file, as they will be."""

    step: int
    what: What
    files: dict[str, Parts]


def pack(
    state: TrainState,
    config: dict[str, Any],
    tokenizer: Path | None = None,
    extra: dict[str, Any] | None = None,
    what: What = "all",
    frozen: NameMask | None = None,
) -> Packed:
    """The files of a checkpoint; tensors on the CPU are not copied, so they must stay as they are until `commit`."""
    tensors = flat(state, what)
    head = outline(state, {k: tuple(t.shape) for k, t in tensors.items()}, config, tokenizer, extra, what)
    groups = by_file(tensors, frozen)
    groups.setdefault(layout.PARAMS, {})
    if what == "all":
        groups.setdefault(layout.OPT_STATE, {})
    files = {name: safetensors(group) for name, group in groups.items()}
    return Packed(head.step, what, {**files, layout.TREE: as_json(head.about, "extra"), **head.files})


def outline(
    state: TrainState,
    shapes: Mapping[str, tuple[int, ...]],
    config: dict[str, Any],
    tokenizer: Path | None = None,
    extra: dict[str, Any] | None = None,
    what: What = "all",
) -> Outline:
    """All of a checkpoint but its tensors; `shapes` are those of the whole tensors, by path."""
    about = {
        "format": layout.WHOLE,
        "what": what,
        "step": int(state.step),
        "key": state.key.tolist(),
        "extra": plain(extra or {}, "extra.extra"),
        "tensors": {k: {"shape": list(shapes[k]), "dtype": dtype_name(t)} for k, t in flat(state, what).items()},
    }
    files = {layout.CONFIG: as_json(config, "config")}
    if tokenizer is not None:
        files[layout.TOKENIZER] = [memoryview(Path(tokenizer).read_bytes())]
    return Outline(int(state.step), what, about, files)


def flat(state: TrainState, what: What = "all") -> dict[str, Tensor]:
    """The tensors of a state by path; CheckpointError where two have the same, or `what` is unknown."""
    if what not in ("all", "params"):
        raise CheckpointError(f"what={what!r} is unknown; choose 'all' or 'params'")
    named = {"params": state.params, **({"opt_state": state.opt_state} if what == "all" else {})}
    pairs = list(tree.leaves(named))
    if len(found := dict(pairs)) < len(pairs):
        raise CheckpointError("two tensors of the state have the same path; choose keys without '/'")
    return found


def by_file(tensors: Mapping[str, Tensor], frozen: NameMask | None = None) -> dict[str, dict[str, Tensor]]:
    """The tensors of each file under the name that they have in it."""
    out: dict[str, dict[str, Tensor]] = {}
    for path, tensor in tensors.items():
        out.setdefault(file_of(path, frozen), {})[key_of(path)] = tensor
    return out


def file_of(path: str, frozen: NameMask | None = None) -> str:
    """The file that a path belongs to."""
    if not path.startswith("params/"):
        return layout.OPT_STATE
    return layout.FROZEN if frozen is not None and frozen(key_of(path)) else layout.PARAMS


def key_of(path: str) -> str:
    """The name of a tensor in its file: a parameter's own, of others the path."""
    return path.removeprefix("params/")


def dtype_name(tensor: Tensor) -> str:
    """`float32`, as tree.json writes it."""
    return str(tensor.dtype).removeprefix("torch.")


def as_json(value: Any, name: str) -> Parts:
    """The contents of a JSON file; CheckpointError for what JSON cannot hold."""
    text = json.dumps(plain(value, name), ensure_ascii=False, allow_nan=False, indent=1)
    return [memoryview(f"{text}\n".encode())]


def plain(value: Any, at: str) -> Any:
    """What JSON can hold of a value; numbers that are not finite become None."""
    if isinstance(value, Tensor) and value.ndim == 0:
        value = value.item()
    if is_dataclass(value) and not isinstance(value, type):
        value = asdict(value)
    if isinstance(value, dict):
        return {str(k): plain(v, f"{at}.{k}") for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v, f"{at}[{i}]") for i, v in enumerate(value)]
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if value is None or isinstance(value, (str, int)):
        return value
    if isinstance(value, Path):
        return str(value)
    raise CheckpointError(f"{at} is a {type(value).__name__}, which JSON cannot hold; make it a number or a string")
