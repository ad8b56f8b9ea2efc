"""nanoGPT's ckpt.pt: a pickle, so it is read by explicit command only, and without running what it might hold."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fnlm.checkpoint.files import CheckpointError
from fnlm.config import ModelConfig
from fnlm.interop.described import Described
from fnlm.interop.foreign import Foreign
from fnlm.interop.ties import Tie, taken, tie
from fnlm.types import Params

COMPILED = "_orig_mod."  # what torch.compile puts in front of names


class Held(NamedTuple):
    """A tensor that is there already, or mapped from the file."""

    value: Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.value.shape)

    def read(self) -> Tensor:
        """A copy, so that the file can go."""
        return self.value.clone()


def read(path: Path) -> Foreign:
    """The model of a ckpt.pt; it has no tokenizer. CheckpointError for a file that is none."""
    args, state = _loaded(path)
    cfg = _config(Described(args, path))
    tensors = {name.removeprefix(COMPILED): Held(value) for name, value in state.items()}
    ignored = (".attn.bias", *(("lm_head.weight",) if cfg.tied else ()))  # the mask; the same as the embedding
    kept = {name: t for name, t in tensors.items() if not name.endswith(ignored)}

    def load() -> Params:
        return taken(kept, ties(cfg), cfg, str(path))

    return Foreign(cfg, load, str(path), "nanogpt", "GPT")


def _loaded(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    try:
        found = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (UnpicklingError, RuntimeError, ValueError, EOFError, KeyError) as error:
        said = str(error).strip().partition("\n")[0][:120]
        raise CheckpointError(f"{path} is not read as nanoGPT's checkpoint ({type(error).__name__}: {said})") from error
    args, state = (found.get(name) for name in ("model_args", "model")) if isinstance(found, dict) else (None, None)
    if not isinstance(args, dict) or not isinstance(state, dict):
        raise CheckpointError(f"{path} is not nanoGPT's: it has no model_args and model")
    if odd := [name for name, value in state.items() if not isinstance(value, Tensor)]:
        raise CheckpointError(f"{path}: {odd[0]} is no tensor")
    return args, state


def _config(c: Described) -> ModelConfig:
    return c.model(
        vocab_size=c.whole("vocab_size", 50304), n_layers=c.whole("n_layer"), n_heads=c.whole("n_head"),
        d_model=c.whole("n_embd"), seq_len=c.whole("block_size"), bias=bool(c.get("bias", True)), mlp="gelu",
    )  # fmt: skip


def ties(cfg: ModelConfig) -> Iterator[Tie]:
    """GPT-2's names, with weights (out, in) as torch.nn.Linear has them."""
    kinds = ("weight", "bias") if cfg.bias else ("weight",)
    yield Tie("transformer.wte.weight", ("embed.tokens.weight",))
    yield Tie("transformer.wpe.weight", ("embed.positions.weight",))
    for i in range(cfg.n_layers):
        block, own = f"transformer.h.{i}", f"blocks.{i}"
        yield from tie(f"{block}.ln_1", f"{own}.attn_norm", kinds)
        for kind in kinds:
            yield Tie(f"{block}.attn.c_attn.{kind}", tuple(f"{own}.attn.{x}.{kind}" for x in "qkv"))
        yield from tie(f"{block}.attn.c_proj", f"{own}.attn.out", kinds)
        yield from tie(f"{block}.ln_2", f"{own}.mlp_norm", kinds)
        yield from tie(f"{block}.mlp.c_fc", f"{own}.mlp.up", kinds)
        yield from tie(f"{block}.mlp.c_proj", f"{own}.mlp.down", kinds)
    yield from tie("transformer.ln_f", "norm", kinds)
