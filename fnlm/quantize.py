"""Matrices as int8 or int4 with scales: a half or a quarter of bfloat16's bytes, for decoding, which reads them all.

The products take activations as they are. What is not a matrix of a block or the head stays: embeddings, norms, biases.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from fnlm.linear import GROUP, unpacked
from fnlm.types import Params

Bits = Literal[8, 4]
SCALE = ".scale"
_LEVELS = 127
_TINY = torch.finfo(torch.float32).tiny
_KEPT = ("embed.",)  # looked up, not multiplied


@torch.no_grad()
def quantize(params: Params, bits: Bits = 8) -> Params:
    """Each matrix (N, K) in steps, nearest to w / scale, beside its scales, `NAME.scale`.

    8 bits: int8, a scale for each row (N,), its largest |w| / 127 (Dettmers et al. 2022, 2.1, without outliers).
    4 bits: uint8 (N, K/2), two steps of -8 to 7 in a byte, a scale for each 32 entries (N, K/32), chosen so that the
    largest of them is -8 steps; entry i of 32 is in the low half of byte i, i + 16 in the high one. The head, and what
    32 does not divide, get 8 bits. A tied head gets a copy of its own, `head.weight`; the embedding that is looked up
    stays as it was. Zeros have scale 0. What is quantized already stays. ValueError for other bits.
    """
    if bits not in (4, 8):
        raise ValueError(f"bits={bits} must be 8 or 4")
    matrices = dict(params)
    if "head.weight" not in params:
        matrices["head.weight"] = params["embed.tokens.weight"]
    out: Params = {}
    for name, w in matrices.items():
        if not _is_matrix(name, w):
            out[name] = w
            continue
        small = bits == 4 and w.shape[1] % GROUP == 0 and name != "head.weight"
        out[name], scale = _in_groups(w) if small else _in_rows(w)
        out[name.removesuffix(".weight") + SCALE] = scale.to(w.dtype)
    return out


def _in_rows(w: Tensor) -> tuple[Tensor, Tensor]:
    scale = w.abs().amax(1).float() / _LEVELS
    steps = w.float() / scale.clamp(min=_TINY)[:, None]
    return steps.round_().to(torch.int8), scale


def _in_groups(w: Tensor) -> tuple[Tensor, Tensor]:
    groups = w.float().unflatten(1, (-1, GROUP))
    largest = groups.gather(2, groups.abs().argmax(2, keepdim=True))
    scale = (largest / -8).to(w.dtype).float()  # as it is kept
    steps = (groups / scale.where(scale.abs() > _TINY, 1)).round_().clamp_(-8, 7).add_(8).to(torch.uint8)
    low, high = steps.chunk(2, 2)
    return (low | high << 4).flatten(1), scale.squeeze(2)


@torch.no_grad()
def dequantize(params: Params) -> Params:
    """The same with matrices of the scales' type again, for `forward` (a tied model's is then untied)."""
    out: Params = {}
    for name, w in params.items():
        scale = params.get(name.removesuffix(".weight") + SCALE)
        if not name.endswith(SCALE):
            out[name] = w if scale is None else unpacked(w, scale, scale.dtype)
    return out


def _is_matrix(name: str, w: Tensor) -> bool:
    return name.endswith(".weight") and w.ndim == 2 and w.is_floating_point() and not name.startswith(_KEPT)
