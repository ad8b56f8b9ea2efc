"""Host memory that a state is copied into while it is saved."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


class HostMemory:
    """One copy of some tensors, kept from save to save: used memory is faster to write to than new memory."""

    def __init__(self) -> None:
        self._own: dict[str, Tensor] = {}

    def copied(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Copies of the tensors, in the memory of those that had the same path before."""
        for path, tensor in tensors.items():
            own = self._own.get(path)
            if own is None or (own.shape, own.dtype) != (tensor.shape, tensor.dtype):
                own = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
                self._own[path] = own
            own.copy_(tensor.detach(), non_blocking=True)
        if any(t.is_cuda for t in tensors.values()):
            torch.cuda.synchronize()
        return {path: self._own[path] for path in tensors}
