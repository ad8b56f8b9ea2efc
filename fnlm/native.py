"""A decode step as one call of the C library `step`: a prepared model as it reads it, and the step.

Large matrices are read where they lie; what is small (norms, biases, the tables of RoPE) is copied as float32.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fnlm import clib
from fnlm.attention import Rotation, alibi_slopes, scale
from fnlm.clib.rows import ACTIVATIONS
from fnlm.config import ModelConfig
from fnlm.types import Params

FLOAT, BF16, INT8, INT4 = range(4)
KINDS = {torch.float32: FLOAT, torch.bfloat16: BF16, torch.int8: INT8, torch.uint8: INT4}


def _record(name: str, *groups: tuple[Any, str]) -> type[ctypes.Structure]:
    """A C struct with fields of these types and names, in order."""
    fields = [(field, kind) for kind, names in groups for field in names.split()]
    return type(name, (ctypes.Structure,), {"_fields_": fields})


_Matrix = _record("Matrix", (ctypes.c_void_p, "w scale bias"), (ctypes.c_int64, "n k kind half"))
_Affine = _record("Affine", (ctypes.c_void_p, "w b"))
_Block = _record("Block", (_Affine, "attn_norm q_norm k_norm mlp_norm"), (_Matrix, "qkv out gate up down"))
_Model = _record(
    "Model",
    (ctypes.c_void_p, "blocks"),
    (_Affine, "norm"),
    (_Matrix, "head"),
    (ctypes.c_void_p, "cos sin slopes"),
    (ctypes.c_int64, "layers d heads kv_heads head_dim ff rms mlp parallel qk_norm rope window"),
    (ctypes.c_double, "eps scale logits softcap"),
)
_Cache = _record("Cache", (ctypes.c_int64, "bf16 layer head pos"))


class Native(NamedTuple):
    """A model for the library: its struct, and what the struct points at, so that it stays."""

    model: ctypes.Structure
    kept: tuple[object, ...]


def lower(root: Params, blocks: Sequence[Params], rotation: Rotation | None, cfg: ModelConfig) -> Native | None:
    """What `step` takes, of the parts of `Prepared`; None where the library is not there or does not know the types.

    `rotation` in float32, (S, R) each.
    """
    owner = _Owner()
    if clib.library("step").library is None or not all(_fits(p) for p in [root, *blocks]):
        return None
    head = "head" if "head.weight" in root else "embed.tokens"
    array = (_Block * len(blocks))(*(_block(p, owner) for p in blocks))
    half = cfg.rope_dim // 2
    cos, sin = (None, None) if rotation is None else (rotation[0][:, :half], rotation[1][:, half:])
    slopes = alibi_slopes(cfg.n_heads, torch.device("cpu")) if cfg.positions == "alibi" else None
    model = _Model(
        blocks=ctypes.cast(array, ctypes.c_void_p), norm=_affine(root, "norm", owner),
        head=_matrix(root, head, owner), cos=owner.floats(cos), sin=owner.floats(sin), slopes=owner.floats(slopes),
        layers=cfg.n_layers, d=cfg.d_model, heads=cfg.n_heads, kv_heads=cfg.kv_heads, head_dim=cfg.head_dim,
        ff=cfg.ff_dim, rms=cfg.norm == "rmsnorm", mlp=ACTIVATIONS[cfg.mlp], parallel=cfg.parallel_residual,
        qk_norm=cfg.qk_norm, rope=0 if rotation is None else cfg.rope_dim, window=cfg.window or 0,
        eps=cfg.norm_eps, scale=scale(cfg), softcap=cfg.logit_softcap or 0,
        logits=cfg.mup_base / cfg.d_model if cfg.init == "mup" else 1,
    )  # fmt: skip
    return Native(model, (array, owner.kept))


def step(
    native: Native,
    x: Tensor,
    texts: Sequence[tuple[Tensor, Tensor]],
    which: Sequence[int],
    positions: Sequence[int],
    wanted: int,
) -> Tensor:
    """Logits (wanted, V), float32, of the last of n tokens whose embeddings are x (n, D), each after its own text.

    Token i goes to positions[i] of the k and v (L, H_kv, S, K) of texts[which[i]], which are written; all lie alike in
    memory. Tokens of one text come in any order, with none left out. All that a token's logits depend on is its text:
    not the others, nor how many there are.
    """
    library = clib.library("step").library
    assert library is not None
    n, like = len(which), texts[0][0]
    assert all(p.stride() == like.stride() and p.dtype == like.dtype for text in texts for p in text)
    x = x.float().contiguous()
    logits = torch.empty((wanted, native.model.head.n), dtype=torch.float32)
    cache = _Cache(like.dtype == torch.bfloat16, *like.stride()[:3])
    number, pointer, threads = ctypes.c_int64, ctypes.c_void_p, torch.get_num_threads()
    at = [(k.data_ptr(), v.data_ptr()) for k, v in texts]
    keys, values = ((pointer * n)(*(at[i][part] for i in which)) for part in (0, 1))
    failed = library.fnlm_step(
        ctypes.byref(native.model), ctypes.byref(cache), pointer(x.data_ptr()), keys, values,
        (number * n)(*positions), number(n), number(wanted), pointer(logits.data_ptr()), number(threads),
    )  # fmt: skip
    if failed:
        raise MemoryError("a decode step needs some megabytes of working memory, which are not there")
    return logits


def takes(k: Tensor, v: Tensor) -> bool:
    """Whether `step` can write into this cache."""
    return k.dtype in (torch.float32, torch.bfloat16) and k.device.type == "cpu" and k.stride() == v.stride()


class _Owner:
    """Keeps what pointers point at."""

    def __init__(self) -> None:
        self.kept: list[Tensor] = []

    def floats(self, x: Tensor | None) -> int | None:
        """The address of a copy in float32."""
        return None if x is None else self.address(x.float().contiguous())

    def address(self, x: Tensor) -> int:
        self.kept.append(x)
        return x.data_ptr()


def _fits(p: Params) -> bool:
    matrices = [w for name, w in p.items() if w.ndim == 2 and name.endswith(".weight")]
    known = all(w.dtype in KINDS for w in matrices) and all(w.dtype != torch.float64 for w in p.values())
    return known and all(w.device.type == "cpu" for w in p.values())


def _affine(p: Params, name: str, owner: _Owner) -> ctypes.Structure:
    return _Affine(owner.floats(p.get(f"{name}.weight")), owner.floats(p.get(f"{name}.bias")))


def _matrix(p: Params, name: str, owner: _Owner) -> ctypes.Structure:
    if (w := p.get(f"{name}.weight")) is None:
        return _Matrix()
    own, factors = KINDS[w.dtype], p.get(f"{name}.scale")
    half = own == INT4 and factors is not None and factors.dtype == torch.bfloat16
    put = owner.address(factors.contiguous()) if half and factors is not None else owner.floats(factors)
    n, k = w.shape[0], w.shape[1] * (2 if own == INT4 else 1)
    return _Matrix(owner.address(w.contiguous()), put, owner.floats(p.get(f"{name}.bias")), n, k, own, half)


def _block(p: Params, owner: _Owner) -> ctypes.Structure:
    norms = (_affine(p, name, owner) for name in ("attn_norm", "attn.q_norm", "attn.k_norm", "mlp_norm"))
    matrices = ("attn.qkv", "attn.out", "mlp.gate", "mlp.up", "mlp.down")
    return _Block(*norms, *(_matrix(p, name, owner) for name in matrices))
