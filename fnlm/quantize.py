"""Matrices as int8 with a scale for each row: half the bytes of bfloat16, for decoding, which reads them all per token.

The products take activations as they are. What is not a matrix of a block or the head stays: embeddings, norms, biases.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fnlm.types import Params

SCALE = ".scale"
_LEVELS = 127
_KEPT = ("embed.",)  # looked up, not multiplied


@torch.no_grad()
def quantize(params: Params) -> Params:
    """Each matrix (N, K) as int8, nearest to w / scale, beside `NAME.scale` (N,): its row's largest |w| / 127.

    A tied head gets a copy of its own, `head.weight`; the embedding that is looked up stays as it was. Rows of zeros
    have scale 0. What is quantized already stays. Symmetric, by row (Dettmers et al. 2022, 2.1, without outliers).
    """
    matrices = dict(params)
    if "head.weight" not in params:
        matrices["head.weight"] = params["embed.tokens.weight"]
    out: Params = {}
    for name, w in matrices.items():
        if not _is_matrix(name, w):
            out[name] = w
            continue
        scale = w.abs().amax(1).float() / _LEVELS
        steps = w.float() / scale.clamp(min=torch.finfo(torch.float32).tiny)[:, None]
        out[name] = steps.round_().to(torch.int8)
        out[name.removesuffix(".weight") + SCALE] = scale.to(w.dtype)
    return out


@torch.no_grad()
def dequantize(params: Params) -> Params:
    """The same with matrices of the scales' type again, for `forward` (a tied model's is then untied)."""
    out: Params = {}
    for name, w in params.items():
        scale = params.get(name.removesuffix(".weight") + SCALE)
        if not name.endswith(SCALE):
            out[name] = w if scale is None else w.to(scale.dtype) * scale[:, None]
    return out


def _is_matrix(name: str, w: Tensor) -> bool:
    return name.endswith(".weight") and w.ndim == 2 and w.is_floating_point() and not name.startswith(_KEPT)
