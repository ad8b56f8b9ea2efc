"""Norms by layer: the gradients', the parameters', and how much an update changes."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fnlm.types import Params


def group_of(name: str) -> str:
    """The group of a parameter: "blocks.3", or "root" for what is in no block."""
    parts = name.split(".")
    return ".".join(parts[:2]) if parts[0] == "blocks" else "root"


def norms(tree: Params) -> dict[str, Tensor]:
    """The L2 norm of each group, 0-d float32."""
    groups: dict[str, list[Tensor]] = {}
    for name, tensor in tree.items():
        groups.setdefault(group_of(name), []).append(torch.linalg.vector_norm(tensor.detach(), dtype=torch.float32))
    return {group: torch.linalg.vector_norm(torch.stack(parts)) for group, parts in groups.items()}


def health(
    grads: dict[str, Tensor], before: Params, after: Params, norms: Callable[[Params], dict[str, Tensor]] = norms
) -> dict[str, float]:
    """Metrics by group: grad_norm, param_norm, and update_ratio = |after - before| / |before|."""
    resting = norms(before)
    moved = norms({name: after[name] - p for name, p in before.items()})
    row = {f"health/grad_norm/{group}": float(norm) for group, norm in grads.items()}
    row |= {f"health/param_norm/{group}": float(norm) for group, norm in resting.items()}
    ratios = {g: float(moved[g] / norm) if norm > 0 else None for g, norm in resting.items()}
    return row | {f"health/update_ratio/{group}": ratio for group, ratio in ratios.items() if ratio is not None}
