"""The bytes of tensors alive at once: counted by storage, on any device, whatever the allocator does with them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Peak(TorchDispatchMode):
    """Within it, `peak` is the most bytes of tensors made inside that were alive at once; `ignore`: not counted.

    Only what is made in this thread is seen: on a CPU, also the backward pass; elsewhere give that to this thread by
    torch.autograd.set_multithreading_enabled(False).
    """

    def __init__(self, ignore: Iterable[Tensor] = ()) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live: dict[StorageWeakRef, int] = {}
        self.peak = self.now = 0
        self.ignore = {StorageWeakRef(t.untyped_storage()) for t in ignore}

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            if isinstance(t, Tensor):
                self._see(t)
        return out

    def _see(self, t: Tensor) -> None:
        storage = t.untyped_storage()
        ref = StorageWeakRef(storage)
        if ref in self.live or ref in self.ignore:
            return
        self.live[ref] = storage.nbytes()
        self.now += storage.nbytes()
        if self.now > self.peak:
            for gone in [r for r in self.live if r.expired()]:
                self.now -= self.live.pop(gone)
            self.peak = max(self.peak, self.now)
