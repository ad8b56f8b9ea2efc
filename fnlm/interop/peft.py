"""The adapters of a run as Hugging Face's `peft` reads them: adapter_config.json and adapter_model.safetensors.

Their modules may hold several of ours: q, k and v of GPT-2 and GPT-NeoX are one. Three products of rank r are then one
of rank 3 r: the A's stand one below the other, and each B beside zeros for the others.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fnlm.checkpoint.files import safetensors, write_file
from fnlm.config import ModelConfig
from fnlm.interop.families import weights
from fnlm.interop.homes import home
from fnlm.interop.ties import Tie, join
from fnlm.interop.written import must_be_free
from fnlm.lora import WEIGHT, A, B
from fnlm.types import Params

CONFIG, MODEL, PREFIX = "adapter_config.json", "adapter_model.safetensors", "base_model.model."


class Module(NamedTuple):
    """One of theirs: its name, A (r, in) and B (out, r); `turned` where its weight lies (in, out)."""

    name: str
    a: Tensor
    b: Tensor
    turned: bool


def to_peft(
    cfg: ModelConfig, adapters: Params, rank: int, scale: float, base: str, out: Path, force: bool = False
) -> None:
    """Write the folder, there when it is whole. `base` is what the adapters are for: a folder or a name on the hub.

    ValueError for a config without a home at Hugging Face's; CheckpointError where `out` holds something, unless it is
    such a folder and `force`.
    """
    must_be_free(out, force, is_adapters, "holds no adapters, and is not replaced; choose another --out")
    found = list(modules(cfg, adapters))
    temporary = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    try:
        temporary.mkdir(parents=True)
        about = json.dumps(config_of(found, rank, scale, base), indent=2)
        (temporary / CONFIG).write_text(about + "\n", encoding="utf-8")
        tensors = {f"{PREFIX}{m.name}.lora_{which}.weight": x for m in found for which, x in (("A", m.a), ("B", m.b))}
        write_file(temporary / MODEL, safetensors({name: tensors[name] for name in sorted(tensors)}))
        if out.exists():
            shutil.rmtree(out)
        os.rename(temporary, out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def is_adapters(path: Path) -> bool:
    """Whether a folder holds adapters as `peft` lays them out."""
    return (path / CONFIG).is_file() and (path / MODEL).is_file()


def config_of(found: list[Module], rank: int, scale: float, base: str) -> dict[str, Any]:
    """adapter_config.json; what they add is times alpha / rank, by module where ranks differ."""
    other = {m.name: len(m.a) for m in found if len(m.a) != rank}
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": scale * rank,
        "rank_pattern": other,
        "alpha_pattern": {name: scale * n for name, n in other.items()},
        "target_modules": [m.name for m in found],
        "fan_in_fan_out": any(m.turned for m in found),
        "lora_dropout": 0.0,
        "bias": "none",
        "inference_mode": True,
    }


def modules(cfg: ModelConfig, adapters: Params) -> Iterator[Module]:
    """Their modules that have adapters."""
    family = home(cfg)
    for tie in weights(cfg, family):
        ours = [name.removesuffix(WEIGHT) for name in tie.ours if name.endswith(WEIGHT)]
        adapted = [name for name in ours if name + A in adapters]
        if adapted:
            yield _module(tie, ours, adapted, adapters, cfg)


def _module(tie: Tie, ours: list[str], adapted: list[str], adapters: Params, cfg: ModelConfig) -> Module:
    a = torch.cat([adapters[name + A] for name in adapted])
    ranks = [len(adapters[name + A]) for name in adapted]
    sizes = {"q": cfg.n_heads * cfg.head_dim, "k": cfg.kv_heads * cfg.head_dim, "v": cfg.kv_heads * cfg.head_dim}
    parts: Params = {}
    for name in ours:
        rows = len(adapters[name + B]) if name in adapted else sizes[name[-1]]
        wide = a.new_zeros(rows, sum(ranks))
        if name in adapted:
            at = sum(ranks[: adapted.index(name)])
            wide[:, at : at + adapters[name + B].shape[1]] = adapters[name + B]
        parts[name + WEIGHT] = wide
    turned = tie.layout == "transposed"
    b = join(tie._replace(layout="plain") if turned else tie, parts, cfg)
    return Module(tie.theirs.removesuffix(WEIGHT), a, b.contiguous(), turned)
