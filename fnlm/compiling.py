"""torch.compile with a way back: what cannot be compiled here runs eagerly, and says once why."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import cache, wraps
from typing import Any, TypeVar

import torch

log = logging.getLogger(__name__)
R = TypeVar("R")


@cache
def compiled(fn: Callable[..., R]) -> Callable[..., R]:
    """`fn` as one graph, or `fn` itself from the first failure on, with one logged line that says why.

    An error that `fn` itself raises comes out as it is: the eager call is made before compilation is blamed.
    """
    fast: Callable[..., R] | None = fn
    tried = False

    @wraps(fn)
    def call(*args: Any, **kwargs: Any) -> R:
        nonlocal fast, tried
        if fast is None:
            return fn(*args, **kwargs)
        try:
            fast, tried = fast if tried else torch.compile(fn, dynamic=False), True
            return fast(*args, **kwargs)
        except Exception as why:  # noqa: BLE001  whatever a compiler throws, the eager call below decides
            result = fn(*args, **kwargs)
            fast = None
            name, reason = getattr(fn, "__name__", "function"), next(iter(str(why).strip().splitlines()), "")
            log.warning("compile: %s runs eagerly (%s: %s)", name, type(why).__name__, reason)
            return result

    return call
