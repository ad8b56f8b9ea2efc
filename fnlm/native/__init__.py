"""A decode step as one call of a small C library, compiled where it is used; without a compiler there is none."""

from fnlm.native.build import Status, status
from fnlm.native.model import Native, lower, step, takes

__all__ = ["Native", "Status", "lower", "status", "step", "takes"]
