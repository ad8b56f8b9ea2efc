"""GGUF files out: the Llama family, weights as F32, F16 or Q8_0, with the tokenizer and the chat template."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fnlm.checkpoint.files import raw, write_file
from fnlm.interop.export import Model, exported
from fnlm.interop.families import LLAMA
from fnlm.interop.gguf import ALIGNMENT, ARRAY, CONTROL, CUTS, MAGIC, STRING, is_file, ties
from fnlm.interop.homes import obstacles
from fnlm.interop.outward import ids_of, template_of, tokenizer_json
from fnlm.interop.ties import filled, join
from fnlm.interop.vocabulary import UNKNOWN
from fnlm.interop.written import must_be_free
from fnlm.tokenizers import Char

KINDS = {"fp32": 0, "fp16": 1, "q8_0": 8}
BLOCK, NORMAL, NO_SUCH, BYTE = 32, 1, 2, 6
UINT32, INT32, FLOAT32, BOOL = 4, 5, 6, 7


def to_gguf(model: Model, out: Path, kind: str = "fp16", force: bool = False) -> None:
    """Write the file, there when it is whole. Norms stay F32; a matrix that has no whole blocks is F16 instead of Q8_0.

    ValueError for a config or tokenizer that has no home there; CheckpointError where `out` exists, unless it is a GGUF
    file and `force`.
    """
    leaving = exported(model)
    about = described(leaving, KINDS[kind])
    must_be_free(out, force, is_file, "is no GGUF file, and is not replaced; choose another --out")
    whole = filled(leaving.params, leaving.cfg)
    made = {t.theirs: packed(join(t, whole, leaving.cfg), KINDS[kind]) for t in ties(leaving.cfg)}
    head = struct.pack("<4sIQQ", MAGIC, 3, len(made), len(about))
    head += b"".join(_text(name) + _value(value) for name, value in about.items())
    at = 0
    for name, (own, shape, data) in made.items():
        head += _text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *reversed(shape), own, at)
        at += _up(data.nbytes)
    out.parent.mkdir(parents=True, exist_ok=True)
    beside = out.with_name(f".{out.name}.tmp")
    parts = [memoryview(head.ljust(_up(len(head)), b"\0"))]
    for _, _, data in made.values():
        parts += [data, memoryview(b"\0" * (_up(data.nbytes) - data.nbytes))]
    try:
        write_file(beside, parts)
        beside.replace(out)
    finally:
        beside.unlink(missing_ok=True)


def packed(x: Tensor, kind: int) -> tuple[int, tuple[int, ...], memoryview]:
    """ggml's type, the shape, and the bytes."""
    shape, x = tuple(x.shape), x.float()
    if x.ndim < 2 or kind == 0:
        return 0, shape, raw(x)
    if kind == 1 or shape[-1] % BLOCK:
        return 1, shape, raw(x.to(torch.float16))
    return 8, shape, q8_0(x.numpy()).reshape(-1).data


def q8_0(x: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Blocks of 32: the scale that lets the greatest be 127, as float16, and whole numbers."""
    rows = x.reshape(-1, BLOCK)
    scale = np.abs(rows).max(1, keepdims=True) / 127
    whole = np.round(np.divide(rows, scale, out=np.zeros_like(rows), where=scale > 0)).astype(np.int8)
    return np.concatenate([scale.astype(np.float16).view(np.uint8), whole.view(np.uint8)], 1)


def described(model: Model, kind: int) -> dict[str, tuple[int, Any]]:
    """The metadata as (type, value). ValueError that names what GGUF's llama does not have."""
    cfg = model.cfg
    lacking = obstacles(cfg, LLAMA) + ([f"bias={cfg.bias}"] if cfg.bias else [])
    if cfg.rope_scaling not in ("none", "linear"):
        lacking.append(f"rope_scaling={cfg.rope_scaling!r}")
    if lacking:
        raise ValueError(f"GGUF is written for the Llama family, where there is no {' and no '.join(lacking)}")
    sizes = {
        "context_length": cfg.seq_len, "embedding_length": cfg.d_model, "block_count": cfg.n_layers,
        "feed_forward_length": cfg.ff_dim, "attention.head_count": cfg.n_heads, "vocab_size": cfg.vocab_size,
        "attention.head_count_kv": cfg.kv_heads, "rope.dimension_count": cfg.head_dim,
        "attention.key_length": cfg.head_dim, "attention.value_length": cfg.head_dim,
    }  # fmt: skip
    numbers = {"attention.layer_norm_rms_epsilon": cfg.norm_eps, "rope.freq_base": cfg.rope_theta}
    out: dict[str, tuple[int, Any]] = {"general.architecture": (STRING, "llama")}
    out |= {f"llama.{name}": (UINT32, value) for name, value in sizes.items()}
    out |= {f"llama.{name}": (FLOAT32, value) for name, value in numbers.items()}
    if cfg.rope_scaling == "linear":
        out |= {"llama.rope.scaling.type": (STRING, "linear"), "llama.rope.scaling.factor": (FLOAT32, cfg.rope_factor)}
    types = {0: 0, 1: 1, 8: 7}  # of the whole file
    return out | {"general.file_type": (UINT32, types[kind])} | vocabulary_of(model)


def vocabulary_of(model: Model) -> dict[str, tuple[int, Any]]:
    """The tokenizer's part. ValueError for one that GGUF cannot describe."""
    if isinstance(model.tokenizer, Char):
        raise ValueError("GGUF has no tokenizer of characters; train one of bytes or bpe")
    spec = json.loads(tokenizer_json(model.tokenizer))
    ids = spec["model"]["vocab"] | {t["content"]: t["id"] for t in spec["added_tokens"]}
    tokens = [f"[unused{i}]" for i in range(model.cfg.vocab_size)]
    kinds = [NO_SUCH] * len(tokens)
    for token, i in ids.items():
        tokens[i] = token
        kinds[i] = BYTE if spec["model"].get("byte_fallback") and token.startswith("<0x") else NORMAL
    for i in model.tokenizer.special.values():
        kinds[i] = CONTROL
    out: dict[str, tuple[int, Any]] = {
        "tokenizer.ggml.tokens": (STRING, tokens),
        "tokenizer.ggml.token_type": (INT32, kinds),
        "tokenizer.ggml.add_bos_token": (BOOL, bool(model.tokenizer.prefix)),
    }
    merges = [pair.split(" ") if isinstance(pair, str) else pair for pair in spec["model"]["merges"]]
    out |= _pieces(tokens, kinds, merges) if spec["model"].get("byte_fallback") else _byte_level(spec, merges)
    names = {"bos_token_id": "bos", "eos_token_id": "eos", "pad_token_id": "padding"}
    found = ids_of(model.tokenizer, model.is_chat).items()
    out |= {f"tokenizer.ggml.{names[name]}_token_id": (UINT32, i) for name, i in found if i is not None}
    template = template_of(model.config, model.tokenizer, model.is_chat)
    if template is not None:
        plain = template.replace("{% generation %}", "").replace("{% endgeneration %}", "")
        out["tokenizer.chat_template"] = (STRING, plain)
    return out


def _byte_level(spec: dict[str, Any], merges: list[list[str]]) -> dict[str, tuple[int, Any]]:
    """By how it cuts a text before merging; two descriptions that cut alike may differ in what they leave out."""
    before = spec["pre_tokenizer"]
    named = next((name for name, cut in CUTS.items() if _cut(cut) == _cut(before)), None)
    if named is None:
        raise ValueError("GGUF is written for tokenizers that cut a text as gpt-2's or smollm's do; this one does not")
    both = {"model": (STRING, "gpt2"), "pre": (STRING, named), "merges": (STRING, [" ".join(pair) for pair in merges])}
    return {f"tokenizer.ggml.{name}": value for name, value in both.items()}


def _cut(before: Any) -> Any:
    if isinstance(before, dict):
        return {k: _cut(v) for k, v in before.items() if k != "trim_offsets"}
    return [_cut(x) for x in before] if isinstance(before, list) else before


def _pieces(tokens: list[str], kinds: list[int], merges: list[list[str]]) -> dict[str, tuple[int, Any]]:
    """A score for each piece: the sooner it is merged, the higher."""
    ranks: dict[str, int] = {}
    for rank, (a, b) in enumerate(merges):
        ranks.setdefault(a + b, rank)
    scores = [
        -float(ranks.get(token, len(merges))) if kind == NORMAL else 0.0
        for token, kind in zip(tokens, kinds, strict=True)
    ]
    unknown = {"tokenizer.ggml.unknown_token_id": (UINT32, tokens.index(UNKNOWN))} if UNKNOWN in tokens else {}
    return {"tokenizer.ggml.model": (STRING, "llama"), "tokenizer.ggml.scores": (FLOAT32, scores), **unknown}


def _up(n: int) -> int:
    return -(-n // ALIGNMENT) * ALIGNMENT


def _text(text: str) -> bytes:
    data = text.encode("utf-8")
    return struct.pack("<Q", len(data)) + data


def _value(value: tuple[int, Any]) -> bytes:
    kind, content = value
    if isinstance(content, list):
        return struct.pack("<IIQ", ARRAY, kind, len(content)) + b"".join(_all(kind, content))
    return struct.pack("<I", kind) + b"".join(_all(kind, [content]))


def _all(kind: int, contents: list[Any]) -> Iterator[bytes]:
    if kind == STRING:
        yield from map(_text, contents)
    else:
        yield struct.pack(f"<{len(contents)}{ {UINT32: 'I', INT32: 'i', FLOAT32: 'f', BOOL: '?'}[kind] }", *contents)
