"""Trees of tensors: dicts, tuples and NamedTuples, walked by path. A path reads `opt_state/adam/mu/embed.weight`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from fnlm.types import Tree


def children(tree: Tree) -> list[tuple[str, Tree]]:
    """The named children of a node, in order; a tensor or None has none. Raises ValueError for any other leaf."""
    if isinstance(tree, dict):
        return list(tree.items())
    if isinstance(tree, tuple):
        names = getattr(tree, "_fields", [str(i) for i in range(len(tree))])
        return list(zip(names, tree, strict=True))
    if tree is None or isinstance(tree, Tensor):
        return []
    raise ValueError(f"a tree holds tensors, dicts, tuples and None, not {type(tree).__name__}")


def _rebuild(like: Tree, values: list[Tree]) -> Tree:
    if isinstance(like, dict):
        return dict(zip(like, values, strict=True))
    return type(like)(*values) if hasattr(like, "_fields") else tuple(values)


def leaves(tree: Tree, path: str = "") -> Iterator[tuple[str, Tensor]]:
    """Every tensor with its path, depth first."""
    if isinstance(tree, Tensor):
        yield path, tree
    for name, child in children(tree):
        yield from leaves(child, f"{path}/{name}" if path else name)


def flatten(tree: Tree) -> dict[str, Tensor]:
    """The tree as one flat dict from path to tensor."""
    return dict(leaves(tree))


def unflatten(flat: dict[str, Tensor], like: Tree, path: str = "") -> Tree:
    """The inverse of `flatten`: a tree shaped as `like`, with the tensors of `flat`; ValueError for a missing path."""
    if isinstance(like, Tensor):
        if path not in flat:
            raise ValueError(f"no tensor for {path!r}")
        return flat[path]
    kids = [unflatten(flat, child, f"{path}/{name}" if path else name) for name, child in children(like)]
    return None if like is None else _rebuild(like, kids)


def map(fn: Callable[..., Any], tree: Tree, *rest: Tree) -> Tree:
    """Apply `fn` to every tensor (and the tensors at the same places in `rest`); the structure stays."""
    if isinstance(tree, Tensor):
        return fn(tree, *rest)
    if tree is None:
        return None
    others = [dict(children(r)) for r in rest]
    return _rebuild(tree, [map(fn, child, *(o[name] for o in others)) for name, child in children(tree)])


def select(tree: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The entries below a dotted prefix, with the prefix taken off: `select(params, "blocks.3")`."""
    return {k[len(prefix) + 1 :]: v for k, v in tree.items() if k.startswith(prefix + ".")}


def size(tree: Tree) -> int:
    """The number of elements of all tensors."""
    return sum(t.numel() for _, t in leaves(tree))


def nbytes(tree: Tree) -> int:
    """The bytes of all tensors."""
    return sum(t.numel() * t.element_size() for _, t in leaves(tree))


def equal(a: Tree, b: Tree) -> bool:
    """Same paths, shapes, dtypes and bits."""
    x, y = flatten(a), flatten(b)
    return x.keys() == y.keys() and all(x[k].dtype == y[k].dtype and torch.equal(x[k], y[k]) for k in x)
