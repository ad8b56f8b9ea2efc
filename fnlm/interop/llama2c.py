"""llama2.c's .bin files: a header, then float32 tensors one after the other, those of all layers together."""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch

from fnlm.checkpoint.files import CheckpointError
from fnlm.config import ModelConfig
from fnlm.interop import vocabulary
from fnlm.interop.foreign import Foreign
from fnlm.interop.stored import Entry
from fnlm.interop.ties import Tie, taken
from fnlm.types import Params

HEADER, MAGIC, PADDED = 28, 0x616B3432, 256  # bytes; "ak42"; bytes of the header of version 1
MOST = 1 << 24  # of any size, in a header that is one


class Header(NamedTuple):
    """The sizes, and where the tensors begin; version 0 says by a negative vocabulary that the head is untied."""

    version: int
    dim: int
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    vocab: int
    seq_len: int
    tied: bool
    start: int


def header_of(path: Path) -> Header | None:
    """The header, or None for a file that has none; of version 2, whose weights are quantised, too."""
    with path.open("rb") as file:
        data = file.read(PADDED)
    if len(data) < HEADER + 9:
        return None
    magic, version = struct.unpack_from("<Ii", data)
    if magic == MAGIC:
        *sizes, tied = struct.unpack_from("<7iB", data, 8)
        found = Header._make((version, *sizes, bool(tied), PADDED))
    else:
        sizes = list(struct.unpack_from("<7i", data))
        found = Header._make((0, *sizes[:5], abs(sizes[5]), sizes[6], sizes[5] > 0, HEADER))
    plausible = all(0 < n < MOST for n in found[1:8]) and not found.dim % found.heads
    return found if plausible else None


def is_file(path: Path) -> bool:
    """Whether a .bin is llama2.c's: its size is what its header says."""
    if path.suffix != ".bin" or not path.is_file():
        return False
    found = header_of(path)
    return found is not None and (found.version > 1 or _end(found, _config(found)) == path.stat().st_size)


def read(path: Path) -> Foreign:
    """The model, with the tokenizer.bin beside it. CheckpointError for another version, or a file that is cut off."""
    found = header_of(path)
    if found is None:
        raise CheckpointError(f"{path} does not begin as llama2.c's files do")
    if found.version > 1:
        raise CheckpointError(f"{path} has version {found.version}, which is quantised; only 0 and 1 are read")
    cfg, size = _config(found), path.stat().st_size
    if _end(found, cfg) != size:
        raise CheckpointError(f"{path} has {size} bytes, by its header it must have {_end(found, cfg)}")
    tensors = {e.name: e for e in _entries(path, found, cfg)}

    def load() -> Params:
        return taken({t.theirs: tensors[t.theirs] for t in ties(cfg)}, ties(cfg), cfg, str(path))

    return Foreign(cfg, load, str(path), "llama2c", "Transformer", _tokenizer(path, cfg.vocab_size))


def _config(h: Header) -> ModelConfig:
    try:
        return ModelConfig(
            vocab_size=h.vocab, n_layers=h.layers, n_heads=h.heads, n_kv_heads=h.kv_heads, d_model=h.dim, d_ff=h.hidden,
            seq_len=h.seq_len, norm="rmsnorm", positions="rope", mlp="swiglu", tied=h.tied,
        )  # fmt: skip
    except ValueError as error:
        raise CheckpointError(f"a header of llama2.c's says what cannot be: {error}") from error


def _layout(h: Header, cfg: ModelConfig) -> list[tuple[str, int, tuple[int, ...]]]:
    """Name, copies (of layers, or 1) and shape, in the order of the file."""
    d, f, kv, n = cfg.d_model, cfg.ff_dim, cfg.kv_heads * cfg.head_dim, cfg.n_layers
    matrices = [("wq", n, (d, d)), ("wk", n, (kv, d)), ("wv", n, (kv, d)), ("wo", n, (d, d))]
    ffn = [("w1", n, (f, d)), ("w2", n, (d, f)), ("w3", n, (f, d))]
    att_norm, ffn_norm, norm = ("att_norm", n, (d,)), ("ffn_norm", n, (d,)), ("norm", 1, (d,))
    tokens, head = ("tokens", 1, (cfg.vocab_size, d)), [] if cfg.tied else [("head", 1, (cfg.vocab_size, d))]
    if h.version:
        return [att_norm, ffn_norm, norm, tokens, *matrices, *ffn, *head]
    tables = ("rope", 1, (2 * cfg.seq_len, cfg.head_dim // 2))
    return [tokens, att_norm, *matrices, ffn_norm, *ffn, norm, tables, *head]


def _entries(path: Path, h: Header, cfg: ModelConfig) -> Iterator[Entry]:
    at = h.start
    for name, copies, shape in _layout(h, cfg):
        for i in range(copies):
            yield Entry(path, f"{name}.{i}", torch.float32, shape, at)
            at += 4 * math.prod(shape)


def _end(h: Header, cfg: ModelConfig) -> int:
    return h.start + sum(4 * copies * math.prod(shape) for _, copies, shape in _layout(h, cfg))


def ties(cfg: ModelConfig) -> list[Tie]:
    """By the names above. RoPE turns neighbouring rows."""
    inner = {
        "att_norm": "attn_norm", "wq": "attn.q", "wk": "attn.k", "wv": "attn.v", "wo": "attn.out",
        "ffn_norm": "mlp_norm", "w1": "mlp.gate", "w2": "mlp.down", "w3": "mlp.up",
    }  # fmt: skip
    out = [Tie("tokens.0", ("embed.tokens.weight",)), Tie("norm.0", ("norm.weight",))]
    for i in range(cfg.n_layers):
        for name, own in inner.items():
            turned = name in ("wq", "wk")
            out.append(Tie(f"{name}.{i}", (f"blocks.{i}.{own}.weight",), "interleaved" if turned else "plain"))
    return out if cfg.tied else [*out, Tie("head.0", ("head.weight",))]


def _tokenizer(path: Path, size: int) -> str | None:
    """tokenizer.bin or tok512.bin beside the model: the longest token, then score, length and bytes of each."""
    for name in (f"tok{size}.bin", "tokenizer.bin"):
        if (path.with_name(name)).is_file():
            return _pieces(path.with_name(name), size)
    return None


def _pieces(path: Path, size: int) -> str:
    data, at = path.read_bytes(), 4
    pieces: list[str] = []
    scores: list[float] = []
    try:
        for _ in range(size):
            score, length = struct.unpack_from("<fi", data, at)
            text = data[at + 8 : at + 8 + length]
            if length < 0 or len(text) < length:
                raise CheckpointError(f"{path} is cut off; fetch it again")
            pieces.append(text.decode("utf-8").replace(" ", vocabulary.SPACE))
            scores.append(score)
            at += 8 + length
    except (struct.error, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} is not a tokenizer of llama2.c's with {size} tokens ({error})") from error
    pieces[1], pieces[2] = vocabulary.BEGIN, vocabulary.END
    return vocabulary.from_pieces(pieces, scores)
