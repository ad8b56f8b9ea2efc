"""N ranks as N threads of one process, for tests and for trying a mesh without another machine."""

from __future__ import annotations

import threading
from collections.abc import Callable
from math import prod
from typing import TypeVar

import torch

from fnlm.sharding.mesh import Mesh, Shape, build, describe
from fnlm.sharding.wires import Abandoned, Room, Threads

R = TypeVar("R")


def simulate(ranks: int | Shape, fn: Callable[[Mesh], R], timeout: float = 60.0, lasting: bool = False) -> list[R]:
    """fn(mesh) on every rank of a mesh (an int n: data=n); the results in the order of the ranks.

    The first error that is no consequence of another one is raised. TimeoutError where ranks do not end in `timeout`
    seconds without a collective (`lasting`: never); one that not all ranks come to ends after the same time, and says
    who is missing.
    """
    shape = {"data": ranks} if isinstance(ranks, int) else ranks
    world = prod(shape.values())
    rooms: dict[tuple[int, ...], Room] = {}
    results: dict[int, R] = {}
    errors: list[tuple[int, BaseException]] = []

    def mesh_of(rank: int) -> Mesh:
        def wire(_: tuple[str, ...], ranks: list[int]) -> Threads:
            return Threads(rooms.setdefault(tuple(ranks), Room(len(ranks), timeout)), ranks.index(rank))

        return build(shape, rank, wire)

    def body(mesh: Mesh) -> None:
        try:
            with torch.autograd.set_multithreading_enabled(False):  # a backward pass stays in its rank's thread
                results[mesh.rank] = fn(mesh)
        except BaseException as error:  # noqa: BLE001  (raised again by the caller's thread)
            errors.append((mesh.rank, error))
            for room in rooms.values():
                room.leave(f"rank {mesh.rank} failed: {error}")

    meshes = [mesh_of(r) for r in range(world)]
    threads = [threading.Thread(target=body, args=(m,), daemon=True, name=f"rank {m.rank}") for m in meshes]
    for t in threads:
        t.start()
    for t in threads:
        t.join(None if lasting else 2 * timeout)
    first = next((e for _, e in errors if not isinstance(e, Abandoned)), errors[0][1] if errors else None)
    if first is not None:
        raise first
    if any(t.is_alive() for t in threads):
        raise TimeoutError(f"ranks of mesh {describe(shape)} did not end within {2 * timeout} s")
    return [results[r] for r in range(world)]
