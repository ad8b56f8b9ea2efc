"""What parameters and gradients cost on the wire, by formula: the collectives of one step, before any rank exists."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from fnlm.sharding.layout import Layout
from fnlm.sharding.strategy import DTYPES
from fnlm.sharding.wires import Book, Call


def parameter_calls(layout: Layout, micro_batches: int = 1, rest: int = 4, compute: int = 4) -> Book:
    """The collectives by which parameters come into use and gradients home in one step, as a rank's wires would count.

    `rest` and `compute`: bytes of an element at rest and where it computes. Not in it: what a split model sums inside
    its blocks, the optimizer's exchanges, and the few bytes of losses and norms.
    """
    s, state, copies = layout.strategy, layout.state, layout.copies
    travel = DTYPES[s.gather_dtype].itemsize if s.gather_dtype else compute
    summed = DTYPES[s.reduce_dtype].itemsize if s.reduce_dtype else rest
    calls: Book = []
    for i, (group, pack) in enumerate(layout.groups.items()):
        if state is not None:
            gather = Call("all_gather", state.name, state.size, pack.parts * pack.width * travel)
            kept = not s.regather or group == layout.group_names[0]
            twice = layout.regathers(group) and i >= layout.lowest
            calls += [gather] * (1 if kept else micro_batches * (2 if twice else 1))
    for bucket in layout.buckets * (micro_batches if s.accumulate == "reduced" else 1):
        if state is not None:
            calls.append(Call("reduce_scatter", state.name, state.size, bucket.parts * bucket.width * summed))
        if copies is not None:
            calls.append(Call("all_reduce", copies.name, copies.size, bucket.width * summed))
    return calls


def sent(book: Iterable[Call]) -> dict[str, float]:
    """The bytes that leave one rank, by axis, where each collective goes around a ring."""
    parts: Counter[tuple[str, int]] = Counter()
    for call in book:  # whole numbers, as sums of fractions depend on their order
        parts[call.axis, call.size] += (2 if call.op == "all_reduce" else 1) * call.nbytes * (call.size - 1)
    out: dict[str, float] = {}
    for (axis, size), n in parts.items():
        out[axis] = out.get(axis, 0.0) + n / size
    return out
