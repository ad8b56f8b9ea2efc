"""Reading a checkpoint: every byte checked, into a described target, with every difference explained."""

from __future__ import annotations

import logging
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fnlm import tree
from fnlm.checkpoint import layout
from fnlm.checkpoint.files import CheckpointError, Misfit
from fnlm.checkpoint.packing import dtype_name
from fnlm.checkpoint.pieces import Box, Pieces
from fnlm.config import ModelConfig, did_you_mean
from fnlm.types import Params, TrainState, Tree

_AVERAGE = "/ema/average/"  # in the path of a tensor of `optim.ema_params`
ROWS = 20  # of a table of differences
_log = logging.getLogger(__name__)


def restore(
    path: str | Path, like: TrainState, partial: bool = False, part: Box | None = None
) -> tuple[TrainState, dict[str, Any]]:
    """The state of a checkpoint and its `extra`: shaped as `like`, bit for bit as saved, on the devices of `like`.

    A run's folder stands for its newest good checkpoint. `like` may lie on the meta device: only its shapes and dtypes
    are used. CheckpointError with a table where names, shapes or dtypes differ. `partial=True` takes what fits and
    keeps the tensors of `like` for the rest; the table is logged, and `extra["skipped"]` lists the paths.
    `part`: of each tensor only this box is read, and its bytes are not checked: `verify` does that once, for all ranks.
    """
    path = layout.resolve(path)
    about = layout.describe(path)
    wanted = tree.flatten({"params": like.params, "opt_state": like.opt_state})
    rows = _differences(about["tensors"], wanted)
    if rows and not partial:
        raise Misfit(_table(path, about, rows) + _remedy(about))
    pieces = Pieces(path, about)
    saved = pieces.whole() if part is None else pieces.boxes(part)
    odd = {name for _, name, _ in rows}
    flat = {k: saved[k].to(_device(t)) if k not in odd else _kept(k, t) for k, t in wanted.items()}
    both = {"params": like.params, "opt_state": like.opt_state}
    params, opt_state = tree.unflatten(flat, both).values()
    key = torch.tensor(about["key"], dtype=torch.int64, device=_device(like.key))
    extra = about["extra"]
    if rows:
        _log.warning("%s", _table(path, about, rows))
        extra = {**extra, "skipped": sorted(odd)}
    return TrainState(torch.tensor(about["step"]), params, opt_state, key), extra


def load_params(path: str | Path, average: bool = False) -> tuple[ModelConfig, Params, dict[str, Any]]:
    """The model of a checkpoint, or of a run's newest: its config, its parameters in forward order, and `extra`.

    `average`: the moving average of the parameters in their place, where the optimizer state has one (`ema`).
    """
    path = layout.resolve(path, "params")
    about = layout.describe(path)
    config = layout.read_json(path, layout.CONFIG)
    if "model" not in config:
        raise CheckpointError(f"{path / layout.CONFIG} has no 'model'; save with config={{'model': asdict(cfg), ...}}")
    params = {k.removeprefix("params/"): v for k, v in Pieces(path, about, "params/").whole().items()}
    if average and any(_AVERAGE in k for k in about["tensors"]):
        averaged = {k.split(_AVERAGE)[1]: v for k, v in Pieces(path, about).whole().items() if _AVERAGE in k}
        params = {k: averaged[k].to(p.dtype) if k in averaged else p for k, p in params.items()}
    return model_config(config["model"]), params, about["extra"]


def fitted(there: Params, like: Params, where: str | Path, partial: bool = False) -> Params:
    """The parameters `there` in the order of `like`, which may lie on the meta device.

    CheckpointError with a table where names or shapes differ; `partial=True` keeps the tensors of `like` there.
    """
    saved = {f"params/{k}": {"shape": list(t.shape), "dtype": dtype_name(t)} for k, t in there.items()}
    rows = _differences(saved, {f"params/{k}": t for k, t in like.items()})
    about = {"tensors": saved, "what": "params"}
    if rows and not partial:
        raise CheckpointError(f"{_table(Path(where), about, rows)}\nleave out what changes the model, or --partial")
    if rows:
        _log.warning("%s", _table(Path(where), about, rows))
    odd = {name.removeprefix("params/") for _, name, _ in rows}
    return {k: _kept(k, t) if k in odd else there[k] for k, t in like.items()}


def model_config(values: dict[str, Any]) -> ModelConfig:
    """A ModelConfig from JSON. CheckpointError for a field that this version does not have."""
    names = [f.name for f in fields(ModelConfig)]
    for name in values:
        if name not in names:
            raise CheckpointError(f"config.json: ModelConfig has no field {name!r}{did_you_mean(name, names)}")
    lists: dict[str, Any] = {"ngrams": tuple(map(tuple, values["ngrams"]))} if "ngrams" in values else {}
    return ModelConfig(**{**values, **lists})


def _differences(saved: dict[str, Any], wanted: dict[str, Tensor]) -> list[tuple[str, str, str]]:
    """(kind, path, explanation) of all that keeps the saved tensors from being the wanted ones."""
    rows = [("missing", k, f"wanted {_said(t)}") for k, t in wanted.items() if k not in saved]
    rows += [("extra", k, f"saved {_shape(e['shape'])} {e['dtype']}") for k, e in saved.items() if k not in wanted]
    for k, entry in saved.items():
        if k in wanted and (entry["shape"], entry["dtype"]) != (list(wanted[k].shape), dtype_name(wanted[k])):
            kind = "shape" if entry["shape"] != list(wanted[k].shape) else "dtype"
            rows.append((kind, k, f"saved {_shape(entry['shape'])} {entry['dtype']}, wanted {_said(wanted[k])}"))
    return rows


def _said(tensor: Tensor) -> str:
    return f"{_shape(list(tensor.shape))} {dtype_name(tensor)}"


def _shape(shape: list[int]) -> str:
    return "x".join(map(str, shape)) or "scalar"


def _table(path: Path, about: dict[str, Any], rows: list[tuple[str, str, str]]) -> str:
    width = max(len(name) for _, name, _ in rows[:ROWS])
    lines = [f"  {kind:7}  {name:{width}}  {text}" for kind, name, text in rows[:ROWS]]
    lines += [f"  and {len(rows) - ROWS} more"] if len(rows) > ROWS else []
    count = len(about["tensors"])
    return "\n".join([f"{path} does not fit: {len(rows)} differences, {count} tensors saved", *lines])


def _remedy(about: dict[str, Any]) -> str:
    if about["what"] == "params":
        return "\nit was saved with what='params', without the optimizer: start from it with load_params"
    return "\nuse the model and optimizer it was saved with, or --partial (partial=True) to keep only what fits"


def _device(tensor: Tensor) -> torch.device:
    return torch.device("cpu") if tensor.device.type == "meta" else tensor.device


def _kept(name: str, tensor: Tensor) -> Tree:
    if tensor.device.type == "meta":
        raise CheckpointError(
            f"{name} is not in the checkpoint, and `like` has no values for it: it is on the meta device"
        )
    return tensor.detach().clone()
