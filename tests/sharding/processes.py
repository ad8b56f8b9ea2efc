"""One rank of a run under torch.distributed, gloo on one machine: prints one line for each case of test_gloo.py."""

from __future__ import annotations

import gc
import json
import os
import sys
from datetime import timedelta

import torch
import torch.distributed as dist

from fnlm.sharding import connect, parse_mesh, strategy
from tests.sharding import test_subset
from tests.sharding.cases import adamw, alone, config, distance, together


def main(rank: int, world: int, store: str, cases: list[list[object]]) -> None:
    torch.set_num_threads(1)
    where = dist.FileStore(store, world)
    dist.init_process_group("gloo", store=where, rank=rank, world_size=world, timeout=timedelta(seconds=30))
    cfg = config(bias=False)
    want = alone(cfg, adamw())
    meshes = {text: connect(parse_mesh(text, world), timeout=30) for text in dict.fromkeys(str(c[0]) for c in cases)}
    for text, how, schedule, micro in cases:
        if part := dict(schedule).get("part"):  # type: ignore[call-overload]
            ours = test_subset.together(meshes[str(text)], str(how), "gpt2", part, int(str(micro)))
            gap = distance(test_subset.reference("gpt2", part), ours)
            print(json.dumps([text, how, schedule, micro, gap]), flush=True)
            continue
        got = together(meshes[str(text)], strategy(str(how), **dict(schedule)), cfg, adamw(), int(str(micro)))  # type: ignore[call-overload]
        print(json.dumps([text, how, schedule, micro, distance(want, got)]), flush=True)
    meshes.clear()
    gc.collect()
    dist.destroy_process_group()


if __name__ == "__main__":
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], json.loads(sys.argv[4]))
