"""Ranks as processes: which one this is, and how they join; torchrun and `fnlm train --nproc` start them alike."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from fnlm.sharding.heartbeat import Heartbeat
from fnlm.sharding.meeting import meet
from fnlm.sharding.mesh import Mesh, Shape, connect

LOST = 75
"""The exit code of a rank that ends because another one has."""


class Lost(ValueError):
    """Another rank ended, or did not answer in time."""

    exit_code = LOST


class Place(NamedTuple):
    """Which process this is: of all, and of those on this machine."""

    rank: int
    world: int
    local_rank: int
    local_world: int


def place(environment: Mapping[str, str] = os.environ) -> Place | None:
    """What torchrun has written into the environment; None for a process that it did not start."""
    if "RANK" not in environment or "WORLD_SIZE" not in environment:
        return None
    rank, world = int(environment["RANK"]), int(environment["WORLD_SIZE"])
    return Place(rank, world, int(environment.get("LOCAL_RANK", rank)), int(environment.get("LOCAL_WORLD_SIZE", world)))


def device_for(here: Place, device: torch.device) -> tuple[torch.device, str, bool]:
    """The device of this rank, the backend, and whether ranks share a GPU: then they only simulate, over gloo."""
    if device.type != "cuda":
        return device, "gloo", False
    if torch.cuda.device_count() >= here.local_world:
        return torch.device("cuda", here.local_rank), "nccl", False
    return torch.device("cuda", here.local_rank % torch.cuda.device_count()), "gloo", True


@contextmanager
def joined(here: Place, shape: Shape, device: torch.device, backend: str, timeout: float) -> Iterator[Mesh]:
    """The mesh of all processes, for as long as the context lasts; each enters it with the same shape.

    Raises Lost where a rank ends, or does not answer within `timeout` seconds.
    """
    if device.type == "cuda":
        torch.cuda.set_device(device)
    limit, heart = timedelta(seconds=timeout), None
    try:
        store, _, _ = next(rendezvous("env://", here.rank, here.world, timeout=limit))
        met = meet(dist.PrefixStore("fnlm", store), here.rank, here.world, timeout)  # type: ignore[attr-defined]
        store = dist.PrefixStore(met, store)  # type: ignore[attr-defined]
        heart = Heartbeat(dist.PrefixStore("fnlm", store), here.rank, here.world)  # type: ignore[attr-defined]
        dist.init_process_group(
            backend, store=store, rank=here.rank, world_size=here.world, timeout=limit,
            device_id=device if backend == "nccl" else None,
        )  # fmt: skip
        yield connect(shape, timeout)
    except RuntimeError as error:
        if not is_lost(error):
            raise
        why = str(error).splitlines()[0][:200]
        told = f"rank {here.rank} of {here.world}: {who(heart)} did not answer within {timeout:g} s ({why})"
        raise Lost(told) from error
    finally:
        if heart is not None:
            heart.stop()
    dist.destroy_process_group()


def who(heart: Heartbeat | None) -> str:
    """Those that are gone, in words."""
    gone = heart.gone() if heart is not None else []
    if gone is None:
        return "rank 0, where all meet, or the network ended, or"
    return f"rank {', '.join(map(str, gone))} ended, or" if gone else "another rank ended, or"


def is_lost(error: BaseException) -> bool:
    """Whether an error of torch.distributed says that somebody is not there any more."""
    if isinstance(error, dist.DistError):
        return True
    words = ("gloo/", "Connection closed", "Connection reset", "Timed out", "timed out", "NCCL", "Broken pipe",
             "pair closure")  # fmt: skip
    return any(word in str(error) for word in words)
