"""GGUF files of the Llama family (llama.cpp's format): metadata, tokenizer, and tensors made float again one by one."""

from __future__ import annotations

import math
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fnlm.checkpoint.files import CheckpointError
from fnlm.config import ModelConfig
from fnlm.interop import vocabulary
from fnlm.interop.described import Described
from fnlm.interop.foreign import Foreign
from fnlm.interop.ties import Tie, taken
from fnlm.types import Params

MAGIC, ALIGNMENT, MOST = b"GGUF", 32, 1 << 26  # entries of an array, bytes of a text
STRING, ARRAY = 8, 9
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
QUANTISED = {2: (32, 18), 3: (32, 20), 8: (32, 34)}  # Q4_0, Q4_1, Q8_0: numbers and bytes of a block
PLAIN = {0: torch.float32, 1: torch.float16, 30: torch.bfloat16}
CONTROL = 3
DIGITS = {"type": "Digits", "individual_digits": True}
BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
CUTS: dict[str, Any] = {  # by tokenizer.ggml.pre: how a text is cut before merging
    "gpt-2": BYTES,
    "default": BYTES,
    "smollm": {"type": "Sequence", "pretokenizers": [DIGITS, BYTES]},
}


class Block(NamedTuple):
    """A tensor of the file; `kind` is ggml's type."""

    file: Path
    kind: int
    shape: tuple[int, ...]
    start: int

    def read(self) -> Tensor:
        """The values, float32 where they are quantised. CheckpointError where the file ends too early."""
        n, size = math.prod(self.shape), size_of(self.kind, math.prod(self.shape))
        with self.file.open("rb") as file:
            file.seek(self.start)
            data = np.fromfile(file, np.uint8, size)
        if len(data) != size:
            raise CheckpointError(f"{self.file} is cut off; fetch it again")
        if self.kind in PLAIN:
            return torch.from_numpy(data).view(PLAIN[self.kind]).view(self.shape)
        values = DEQUANTISED[self.kind](data) if self.kind in DEQUANTISED else _by_package(data, self.kind)
        assert values.size == n
        return torch.from_numpy(np.ascontiguousarray(values, np.float32)).view(self.shape)


def size_of(kind: int, n: int) -> int:
    """The bytes of n numbers. CheckpointError for a type that is not known, or not without the `gguf` package."""
    if kind in PLAIN:
        return n * PLAIN[kind].itemsize
    block, size = QUANTISED.get(kind) or _package_sizes(kind)
    if n % block:
        raise CheckpointError(f"a tensor of {n} numbers is not made of blocks of {block}")
    return n // block * size


def _package_sizes(kind: int) -> tuple[int, int]:
    try:
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
    except ImportError as error:
        raise CheckpointError(
            f"tensors of ggml's type {kind} (K-quants and the like) need a package: pip install 'fnlm[gguf]'"
        ) from error
    try:
        block, size = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
    except (ValueError, KeyError) as error:
        raise CheckpointError(f"ggml's type {kind} is not supported") from error
    return int(block), int(size)


def _by_package(data: NDArray[np.uint8], kind: int) -> NDArray[np.float32]:
    from gguf import GGMLQuantizationType
    from gguf.quants import dequantize

    found: NDArray[np.float32] = dequantize(data, GGMLQuantizationType(kind))
    return found


def _q8_0(data: NDArray[np.uint8]) -> NDArray[np.float32]:
    rows = data.reshape(-1, 34)
    scale: NDArray[np.float32] = rows[:, :2].copy().view(np.float16).astype(np.float32)
    return scale * rows[:, 2:].copy().view(np.int8).astype(np.float32)


def _q4_0(data: NDArray[np.uint8]) -> NDArray[np.float32]:
    rows = data.reshape(-1, 18)
    scale: NDArray[np.float32] = rows[:, :2].copy().view(np.float16).astype(np.float32)
    return scale * (_nibbles(rows[:, 2:]) - 8)


def _q4_1(data: NDArray[np.uint8]) -> NDArray[np.float32]:
    rows = data.reshape(-1, 20)
    both: NDArray[np.float32] = rows[:, :4].copy().view(np.float16).astype(np.float32)
    return both[:, :1] * _nibbles(rows[:, 4:]) + both[:, 1:]


def _nibbles(rows: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Low halves of all bytes first, then the high ones."""
    return np.concatenate([rows & 15, rows >> 4], 1).astype(np.float32)


DEQUANTISED: dict[int, Callable[[NDArray[np.uint8]], NDArray[np.float32]]] = {2: _q4_0, 3: _q4_1, 8: _q8_0}


def is_file(path: Path) -> bool:
    """Whether a file begins as GGUF does."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(4) == MAGIC


def read(path: Path) -> Foreign:
    """The model, its tokenizer and its chat template. CheckpointError, in a line, for what cannot be read."""
    try:
        with path.open("rb") as file:
            about, tensors = _header(file, path)
    except (struct.error, UnicodeDecodeError, KeyError) as error:
        what = f"{type(error).__name__}: {error}"
        raise CheckpointError(f"{path} is damaged: its header cannot be read ({what})") from error
    cfg = _config(Described(about, path), tensors)
    ignored = {"output.weight"} if cfg.tied else set()
    kept = {name: t for name, t in tensors.items() if name not in ignored}

    def load() -> Params:
        return taken(kept, ties(cfg), cfg, str(path))

    template = about.get("tokenizer.chat_template")
    return Foreign(cfg, load, str(path), "gguf", "llama", _tokenizer(about, path), template)


def _header(file: BinaryIO, path: Path) -> tuple[dict[str, Any], dict[str, Block]]:
    magic, version, count, keys = struct.unpack("<4sIQQ", file.read(24))
    if magic != MAGIC or version not in (2, 3):
        raise CheckpointError(f"{path} is no GGUF file of version 2 or 3")
    if count > MOST or keys > MOST:
        raise CheckpointError(f"{path} is damaged: {count} tensors and {keys} keys")
    about = {}
    for _ in range(keys):
        name = _string(file)
        about[name] = _value(file, _one(file, "I"))
    infos = [_info(file) for _ in range(count)]
    step = int(about.get("general.alignment", ALIGNMENT)) or ALIGNMENT
    base, size = -(-file.tell() // step) * step, path.stat().st_size
    tensors = {name: Block(path, kind, shape, base + at) for name, shape, kind, at in infos}
    for name, t in tensors.items():
        if t.start + size_of(t.kind, math.prod(t.shape)) > size:
            raise CheckpointError(f"{path} is cut off: {size} bytes, and {name} ends later; fetch it again")
    return about, tensors


def _info(file: BinaryIO) -> tuple[str, tuple[int, ...], int, int]:
    name, n = _string(file), _one(file, "I")
    if n > 4:
        raise CheckpointError(f"{name} has {n} dimensions")
    shape = tuple(reversed([_one(file, "Q") for _ in range(n)]))
    return name, shape, _one(file, "I"), _one(file, "Q")


def _one(file: BinaryIO, code: str) -> Any:
    return struct.unpack(f"<{code}", file.read(struct.calcsize(f"<{code}")))[0]


def _string(file: BinaryIO) -> str:
    n = _one(file, "Q")
    if n > MOST:
        raise CheckpointError(f"{file.name} is damaged: a text of {n} bytes")
    data = file.read(n)
    if len(data) < n:
        raise CheckpointError(f"{file.name} is cut off in its header; fetch it again")
    return data.decode("utf-8")


def _value(file: BinaryIO, kind: int) -> Any:
    if kind == STRING:
        return _string(file)
    if kind != ARRAY:
        return _one(file, SCALARS[kind])
    inner, n = _one(file, "I"), _one(file, "Q")
    if n > MOST or inner == ARRAY:
        raise CheckpointError(f"{file.name} is damaged: an array of {n}")
    if inner == STRING:
        return [_string(file) for _ in range(n)]
    code = SCALARS[inner]
    return list(struct.unpack(f"<{n}{code}", file.read(n * struct.calcsize(f"<{code}"))))


def _config(c: Described, tensors: dict[str, Block]) -> ModelConfig:
    kind = c.get("general.architecture")
    if kind != "llama":
        raise CheckpointError(f"{c.path}: architecture {kind!r} is not supported; supported in GGUF: llama")
    if "rope_freqs.weight" in tensors:
        raise CheckpointError(f"{c.path} has rope_freqs.weight, which is not supported; read its Hugging Face folder")
    c = Described({k.removeprefix("llama."): v for k, v in c.values.items()}, c.path)
    c.must(expert_count=0)
    heads, embed = c.whole("attention.head_count"), tensors.get("token_embd.weight")
    scaling = c.chosen("rope.scaling.type", "none", {"none": "none", "linear": "linear"})
    if embed is None or len(embed.shape) != 2:
        raise CheckpointError(f"{c.path} has no token_embd.weight")
    return c.model(
        vocab_size=embed.shape[0], n_layers=c.whole("block_count"), n_heads=heads, d_model=c.whole("embedding_length"),
        n_kv_heads=c.whole("attention.head_count_kv", heads), d_ff=c.whole("feed_forward_length"), norm="rmsnorm",
        d_head=c.whole("attention.key_length", c.whole("embedding_length") // heads), mlp="swiglu", positions="rope",
        seq_len=c.whole("context_length"), norm_eps=c.number("attention.layer_norm_rms_epsilon", 1e-5),
        rope_theta=c.number("rope.freq_base", 10000.0), rope_scaling=scaling, tied="output.weight" not in tensors,
        rope_factor=c.number("rope.scaling.factor", 1.0) if scaling == "linear" else 1.0,
    )  # fmt: skip


def ties(cfg: ModelConfig) -> list[Tie]:
    """llama.cpp's names. RoPE turns neighbouring rows of q and k."""
    inner = {
        "attn_norm": "attn_norm", "attn_q": "attn.q", "attn_k": "attn.k", "attn_v": "attn.v", "attn_output": "attn.out",
        "ffn_norm": "mlp_norm", "ffn_gate": "mlp.gate", "ffn_up": "mlp.up", "ffn_down": "mlp.down",
    }  # fmt: skip
    out = [Tie("token_embd.weight", ("embed.tokens.weight",)), Tie("output_norm.weight", ("norm.weight",))]
    for i in range(cfg.n_layers):
        for name, own in inner.items():
            layout: Any = "interleaved" if name in ("attn_q", "attn_k") else "plain"
            out.append(Tie(f"blk.{i}.{name}.weight", (f"blocks.{i}.{own}.weight",), layout))
    return out if cfg.tied else [*out, Tie("output.weight", ("head.weight",))]


def _tokenizer(about: dict[str, Any], path: Path) -> str | None:
    kind, tokens = about.get("tokenizer.ggml.model"), about.get("tokenizer.ggml.tokens")
    if kind is None or not isinstance(tokens, list):
        return None
    if kind == "llama":
        begin, end = (int(about.get(f"tokenizer.ggml.{x}_token_id", i)) for i, x in ((1, "bos"), (2, "eos")))
        return vocabulary.from_pieces(tokens, about["tokenizer.ggml.scores"], begin, end)
    before = about.get("tokenizer.ggml.pre", "default")
    if kind != "gpt2" or before not in CUTS:
        raise CheckpointError(
            f"{path}: tokenizer {kind!r} cut as {before!r} is not supported; known: llama, gpt2 as {', '.join(CUTS)}"
        )
    types = about.get("tokenizer.ggml.token_type", [])
    special = {token: i for i, (token, t) in enumerate(zip(tokens, types, strict=False)) if t == CONTROL}
    merges = about.get("tokenizer.ggml.merges", [])
    return vocabulary.from_merges({token: i for i, token in enumerate(tokens)}, merges, special, CUTS[before])
