"""The bytes of tensors alive at once: counted by storage, on any device, whatever the allocator does with them."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor, UntypedStorage
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Peak(TorchDispatchMode):
    """Within it, `peak` is the most bytes of tensors made inside that were alive at once, `now` those that are.

    `ignore`: not counted. `compute(operation, args, kwargs)` carries operations out, where it is given.

    Only what is made in this thread is seen: on a CPU, also the backward pass; elsewhere give that to this thread by
    torch.autograd.set_multithreading_enabled(False).
    """

    def __init__(self, ignore: Iterable[Tensor] = (), compute: Callable[..., Any] | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._compute = compute
        self.peak = self.now = 0
        self._bytes: dict[int, int] = {}  # by address, which is free for another storage only after `gone`
        self._watches: dict[int, weakref.ref[UntypedStorage]] = {}
        for t in ignore:
            self._watch(t.untyped_storage(), 0)

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """No: that would import the compiler for every plan, and nothing is compiled within."""
        return False

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs) if self._compute is None else self._compute(func, args, kwargs)
        for t in (out,) if isinstance(out, Tensor) else tree_leaves(out):
            if isinstance(t, Tensor):
                self._see(t)
        return out

    def _see(self, t: Tensor) -> None:
        storage = t.untyped_storage()
        if storage._cdata not in self._bytes:
            self._watch(storage, storage.nbytes())
            self.peak = max(self.peak, self.now)

    def _watch(self, storage: UntypedStorage, nbytes: int) -> None:
        at = storage._cdata

        def gone(_: object) -> None:
            self.now -= self._bytes.pop(at)
            self._watches.pop(at)

        self._bytes[at], self._watches[at] = nbytes, weakref.ref(storage, gone)
        self.now += nbytes
