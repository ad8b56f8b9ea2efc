"""`fnlm doctor --dist`: whether the ranks of torchrun find each other, on each axis of a mesh, and who does not."""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from fnlm.sharding import connect, parse_mesh
from fnlm.sharding.mesh import members, subsets

SECONDS = 5.0
NUMBERS = 1 << 18  # 1 MiB of float32
TIMES = 5
NEEDS = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def meeting(mesh: str | None) -> dict[str, Any]:
    """What this rank found: who is missing, and for each axis the milliseconds of an all-reduce of 1 MiB.

    ValueError outside torchrun, and for a wrong mesh.
    """
    if any(name not in os.environ for name in NEEDS):
        raise ValueError("--dist needs ranks; torchrun --nproc_per_node=N -m cli doctor --dist starts them")
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    shape = parse_mesh(mesh or f"data={world}", world)
    found: dict[str, Any] = {"rank": rank, "ranks": world, "mesh": shape, "missing": {}, "ms": {}}
    try:
        store = _store(rank, world)
    except dist.DistError as error:
        found["missing"]["rendezvous"] = [0]
        return found | {"why": str(error).splitlines()[0]}
    if late := _late(store, "here", rank, range(world)):
        found["missing"]["rendezvous"] = late
        _leave(store, rank, set(range(world)) - {*late})
        return found
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=timedelta(seconds=SECONDS))
    _try_axes(store, found)
    gc.collect()  # no group may outlive the processes' own
    dist.destroy_process_group()
    _leave(store, rank, set(range(world)))
    return found


def _try_axes(store: dist.Store, found: dict[str, Any]) -> None:
    """Each axis in turn, up to the first on which somebody is missing."""
    shape, rank = found["mesh"], found["rank"]
    mesh = connect(shape, timeout=SECONDS)
    for names in subsets(shape):
        name = "+".join(names)
        if late := _late(store, name, rank, members(shape, names, rank)):
            found["missing"][name] = late
            return
        axis = mesh.axis(*names)
        assert axis is not None
        found["ms"][name] = _milliseconds(axis.wire, axis.size)


def _store(rank: int, world: int) -> dist.Store:
    """Where ranks leave word; torchrun's own where it has one."""
    served = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = dist.TCPStore(
        address, port, world, rank == 0 and not served, timedelta(seconds=2 * SECONDS), wait_for_workers=False
    )
    return dist.PrefixStore("fnlm/doctor", store)


def _late(store: dist.Store, what: str, rank: int, expected: Any) -> list[int]:
    """The expected ranks that have not come here within the time."""
    store.set(f"{what}/{rank}", "1")
    end, waiting = time.monotonic() + SECONDS, list(expected)
    while waiting and time.monotonic() < end:
        waiting = [r for r in waiting if not store.check([f"{what}/{r}"])]
        time.sleep(0.02)
    return waiting


def _leave(store: dist.Store, rank: int, others: set[int]) -> None:
    """Rank 0 may serve the store: it goes last."""
    if rank == 0:
        _late(store, "done", rank, others)
    else:
        store.set(f"done/{rank}", "1")


def _milliseconds(wire: Any, size: int) -> float:
    x = torch.ones(NUMBERS)
    begun = time.perf_counter()
    for _ in range(TIMES):
        x.fill_(1.0)
        wire.all_reduce(x, "sum").wait()
    if not bool((x == size).all()):
        raise RuntimeError(f"an all-reduce of ones over {size} ranks gave {float(x.mean())}")
    return 1000 * (time.perf_counter() - begun) / TIMES


def meeting_text(found: dict[str, Any]) -> Iterator[str]:
    """The report for people."""
    for name, ms in found["ms"].items():
        yield f"{name}: all ranks came; an all-reduce of 1 MiB takes {ms:.1f} ms"
    for where, ranks in found["missing"].items():
        told = ", ".join(str(r) for r in ranks)
        yield f"{where}: rank {told} did not come within {SECONDS:.0f} s (told by rank {found['rank']})"
    if not found["missing"]:
        yield f"all {found['ranks']} ranks are well"
