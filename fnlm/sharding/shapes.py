"""Operations on tensors without storage, remembered: a model of equal blocks asks for the same shapes many times."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_unflatten

Made = tuple[torch.Size, tuple[int, ...], torch.dtype]


class Remembered(TorchDispatchMode):
    """Within it, an operation that only makes new meta tensors is computed once for each set of arguments.

    Views and operations in place are left alone. Torch derives shapes in Python, which is most of the time of a plan.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.known: dict[Any, tuple[list[Made | None], Any]] = {}
        self.pure: dict[Any, bool] = {}

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func not in self.pure:
            self.pure[func] = _only_makes(func)
        asked = _key(func, args, kwargs) if self.pure[func] else None
        if asked is None:
            return func(*args, **kwargs)
        if asked not in self.known:
            out = func(*args, **kwargs)
            leaves, how = tree_flatten(out)
            if all(x is None or (isinstance(x, Tensor) and x.is_meta and not x.storage_offset()) for x in leaves):
                self.known[asked] = [None if x is None else (x.shape, x.stride(), x.dtype) for x in leaves], how
            return out
        leaves, how = self.known[asked]
        return tree_unflatten([None if x is None else _new(*x) for x in leaves], how)


def _new(size: torch.Size, stride: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.empty_strided(size, stride, dtype=dtype, device="meta")


def _only_makes(func: Any) -> bool:
    """Whether an operation neither returns nor changes what it was given."""
    return all(a.alias_info is None for a in (*func._schema.arguments, *func._schema.returns))


def _key(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What decides the result's shape; None where something is no meta tensor, number or word."""
    leaves, how = tree_flatten((args, kwargs))
    said: list[Any] = []
    for x in leaves:
        if isinstance(x, Tensor):
            if not x.is_meta:
                return None
            said.append((x.shape, x.stride(), x.dtype))
        else:
            said.append((type(x), x))
    try:
        hash(key := (func, how, tuple(said)))
    except TypeError:
        return None
    return key
