"""A strategy is a small record: how parameters rest, how they come into use, and when gradients travel home.

    name                 at rest          in use             gradients
    single               whole            whole              stay
    ddp, ddp_flat,       whole            whole              all-reduce: torch's reducer, one by one,
      ddp_bucketed                                             or in buckets during the backward pass
    zero1                shards           all-gather         one reduce-scatter a step
    zero2                shards           all-gather         a reduce-scatter per micro-batch
    zero3                shards           all-gather twice   as zero2; a group is dropped between its uses
    hsdp                 shards, copied   as zero3 on shard  as zero3 on shard, then all-reduce over replica
    tensor_parallel      heads, columns   as they rest       stay; activations are summed inside each block
    context              whole            whole              all-reduce; each rank has some positions

A mesh with an axis `tensor` or `context` adds these to any row: `zero3` on `data=4,tensor=2` is a product.
Under `context` each block gathers the keys and values of all positions. A ring would hold fewer of them at once, at one
message per rank and block and an online softmax; with grouped queries they are small, and one gather serves every kind
of attention, its dropout and its bias as they are.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

import torch

from fnlm.config import did_you_mean
from fnlm.sharding.mesh import Mesh, Shape, check_world, describe

Dtype = Literal["fp32", "bf16", "fp16"]
DTYPES: dict[str, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


MOST = 25 << 20
"""The bytes of a bucket under bucket_bytes="auto": a quarter of the largest group that is not always here, or these."""


@dataclass(frozen=True)
class Strategy:
    """How parameters travel; see the table above. Fields after `reducer` are a schedule: they change no result."""

    name: str
    axes: tuple[str, ...] = ("data",)  # what a mesh must have; the first is the one a plain number of ranks means
    also: tuple[str, ...] = ("context", "tensor")  # what a mesh may have besides
    state: str | None = None  # the axis that splits what rests: parameters, gradients, optimizer state
    regather: bool = False  # drop gathered parameters after use, gather them again for the backward pass
    accumulate: Literal["local", "reduced"] = "local"  # micro-batches add up whole and travel once, or travel each
    reducer: Literal["own", "torch"] = "own"
    bucket_bytes: int | Literal["auto"] | None = "auto"  # at most, of a reduction; None: one for each parameter
    overlap: bool = True  # reduce while the backward pass runs
    prefetch: int = 1  # groups whose gathers are in flight ahead of their use, and whose reductions are behind
    reduce_dtype: Dtype | None = None  # of gradients on their way; None: that of the parameters at rest
    gather_dtype: Dtype | None = None  # of parameters on their way; None: the one they compute in
    sequence_parallel: bool = False  # between the tensor-parallel regions each rank keeps some positions only

    def __post_init__(self) -> None:
        size = self.bucket_bytes
        if size not in (None, "auto") and (isinstance(size, str) or size < 1):
            raise ValueError(f"bucket_bytes={size} must be 'auto' or at least 1; None sends each parameter alone")
        if self.prefetch < 0:
            raise ValueError(f"prefetch={self.prefetch} is negative; 0 gathers each group when it is used")
        for field in ("reduce_dtype", "gather_dtype"):
            if getattr(self, field) not in (None, *DTYPES):
                raise ValueError(f"{field}={getattr(self, field)!r} is unknown; choose from {', '.join(DTYPES)}")


STRATEGIES: dict[str, Strategy] = {
    row.name: row
    for row in (
        Strategy("single", axes=(), also=()),
        Strategy("ddp", reducer="torch", also=("tensor",)),
        Strategy("ddp_flat", bucket_bytes=None, overlap=False),
        Strategy("ddp_bucketed"),
        Strategy("zero1", state="data"),
        Strategy("zero2", state="data", accumulate="reduced"),
        Strategy("zero3", state="data", accumulate="reduced", regather=True),
        Strategy("hsdp", ("shard",), ("replica", "context", "tensor"), "shard", regather=True, accumulate="reduced"),
        Strategy("tensor_parallel", ("tensor",), ("data", "context")),
        Strategy("context", ("context",), ("data", "tensor")),
    )
}
ALIASES = {"zero": "zero1", "fsdp": "zero3", "tensor": "tensor_parallel"}
ROWS = ("replica", "shard", "data")
"""The axes that split the rows of a batch."""


FIELDS = ("bucket_bytes", "overlap", "prefetch", "reduce_dtype", "gather_dtype", "sequence_parallel", "regather")


def strategy(name: str | Strategy, **schedule: Any) -> Strategy:
    """A row of the table by its name or alias, with some fields of its schedule changed.

    As text too: `zero3:prefetch=2:overlap=false`. ValueError for an unknown name or field, and for a wrong value.
    """
    if isinstance(name, Strategy):
        return replace(name, **schedule) if schedule else name
    name, *words = name.split(":")
    row = STRATEGIES.get(ALIASES.get(name, name))
    if row is None:
        raise ValueError(f"strategy {name!r} is unknown{did_you_mean(name, [*STRATEGIES, *ALIASES])}")
    schedule = {field: _value(field, text) for field, _, text in (w.partition("=") for w in words)} | schedule
    for field in schedule:
        if field not in FIELDS:
            raise ValueError(f"{field!r} is no field of a schedule{did_you_mean(field, FIELDS)}")
    return replace(row, **schedule) if schedule else row


def _value(field: str, text: str) -> Any:
    """What a word gives to a field of a schedule."""
    numbers = ("bucket_bytes", "prefetch")
    words: dict[str, tuple[str, ...]] = dict.fromkeys(FIELDS, ("true", "false"))
    words |= {"prefetch": (), "bucket_bytes": ("auto", "none"), "reduce_dtype": (*DTYPES, "none"),
              "gather_dtype": (*DTYPES, "none")}  # fmt: skip
    if field in numbers and text.isdecimal():
        return int(text)
    if field in FIELDS and text not in words[field]:
        known = [*(("a number",) if field in numbers else ()), *words[field]]
        raise ValueError(f"{field}={text!r} is no value of a schedule; choose {' or '.join(known)}")
    return {"true": True, "false": False, "none": None}.get(text, text)


def mesh_for(row: Strategy, world: int, shape: Shape | None = None) -> Shape:
    """The mesh of a strategy on `world` ranks: the given one, checked, or all ranks along the strategy's own axis.

    ValueError where sizes do not multiply to the world, an axis is missing, or one is of no use to the strategy.
    """
    if shape is None:
        shape = {row.axes[0]: world} if row.axes else {}
    return check_axes(row, check_world(shape, world))


def check_axes(row: Strategy, shape: Shape) -> Shape:
    """The shape itself. ValueError where the strategy lacks an axis or has no use for one."""
    for name in row.axes:
        if name not in shape:
            raise ValueError(f"strategy {row.name} needs an axis {name}, mesh {describe(shape)} has none; add {name}=N")
    usable = (*row.axes, *row.also)
    for name, size in shape.items():
        if name not in usable and size > 1:
            remedy = f"its axes are {', '.join(usable)}" if usable else "it runs on one rank"
            raise ValueError(f"strategy {row.name} has no use for {name}={size}; {remedy}")
    if row.sequence_parallel and "tensor" not in shape:
        raise ValueError(f"sequence_parallel splits along tensor, mesh {describe(shape)} has none; add tensor=N")
    return shape


def row_axes(mesh: Mesh) -> tuple[str, ...]:
    """The axes of this mesh that split the rows of a batch."""
    return tuple(n for n in mesh.shape if n in ROWS)


def batch_axes(mesh: Mesh) -> tuple[str, ...]:
    """The axes of this mesh that split a batch, by rows or positions: gradients are partial sums over them."""
    return tuple(n for n in mesh.shape if n in (*ROWS, "context"))
