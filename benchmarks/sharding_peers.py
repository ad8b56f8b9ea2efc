"""A step of ddp_bucketed beside PyTorch's DDP, and of zero3 beside FSDP2 (fully_shard), on gloo processes.

    python benchmarks/sharding_peers.py [--ranks 2] [--rounds 12] [--shape ryan-12m] [--rows 4] [--seq-len 512]

Every process has one thread. All four contestants compute the same function of the same initial values on the same
batches: the peers' nn.Module holds the parameters and calls fnlm's own blocks, DDP as one module, FSDP2 with each block
and then the root sharded. AdamW (fused), the gradient's norm clipped to 1. Contestants take turns, a few steps each,
the order reversed every other round; a step's time is that of its slowest rank. In the end the losses must agree.
Printed: medians, the ratio to the peer (the median over rounds of ratios of medians), the same of the processor time of
rank 0, and a line of JSON. Ratios of time hold on a machine that does nothing else; those of processor time nearly so
on any, but they do not see what is waited for.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import fnlm
from fnlm import optim
from fnlm.benchmark_peers import Model, fsdp
from fnlm.machine import keep_freed_memory
from fnlm.sharded import layout_of, make_sharded_step, sharded_state
from fnlm.sharding import Mesh, connect

Step = Callable[[fnlm.Batch], float]
PAIRS = (("ddp_bucketed", "torch DDP"), ("zero3", "torch FSDP2"))
RATE, BETAS, DECAY, CLIP = 6e-4, (0.9, 0.95), 0.1, 1.0
STEPS = 3  # of a turn; the first is not counted


def theirs(params: fnlm.Params, cfg: fnlm.ModelConfig, sharded: bool) -> Step:
    """A step of DDP or of FSDP2 on this rank's rows."""
    whole = fsdp(params, cfg) if sharded else Model(params, cfg, lean=False)
    run: nn.Module = whole if sharded else DistributedDataParallel(whole, gradient_as_bucket_view=True)
    decayed = [p for p in whole.parameters() if p.ndim > 1]
    others = [p for p in whole.parameters() if p.ndim < 2]
    kinds = [{"params": decayed, "weight_decay": DECAY}, {"params": others, "weight_decay": 0.0}]
    update = torch.optim.AdamW(kinds, lr=RATE, betas=BETAS, fused=True)

    def step(batch: fnlm.Batch) -> float:
        value = run(batch)
        value.backward()
        nn.utils.clip_grad_norm_(whole.parameters(), CLIP)
        update.step()
        update.zero_grad(set_to_none=True)
        mean = value.detach() / dist.get_world_size()
        dist.all_reduce(mean)  # as ours: the loss of all ranks
        return float(mean)

    return step


def ours(params: fnlm.Params, cfg: fnlm.ModelConfig, how: str, mesh: Mesh) -> Step:
    """A step of one of our strategies on this rank's rows."""
    optimizer = optim.adamw(RATE, *BETAS, decay=DECAY, mask=fnlm.is_matrix, clip=CLIP)
    layout = layout_of(cfg, how, mesh)
    state = sharded_state(params, optimizer, layout)
    run = make_sharded_step(
        lambda axes: fnlm.make_lm_loss(cfg, axes=axes), optimizer, layout, fnlm.Plan(keep_memory=False), local=True
    )

    def step(batch: fnlm.Batch) -> float:
        nonlocal state
        state, metrics = run(state, batch)
        return float(metrics["train/loss"])

    return step


def rank_main(job: dict[str, Any], rank: int, store: str) -> None:
    """One rank: rank 0 prints what was measured."""
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module")  # nothing is changed in place here
    world = job["ranks"]
    dist.init_process_group(
        "gloo", store=dist.FileStore(store, world), rank=rank, world_size=world, timeout=timedelta(seconds=300)
    )
    cfg = replace(fnlm.PRESETS[job["shape"]], seq_len=job["seq_len"], dropout_embed=0.0, dropout_residual=0.0)
    keep_freed_memory()  # for all of them
    mesh, params = connect({"data": world}), fnlm.init_params(cfg, fnlm.key(0))
    field = {name: ours(params, cfg, name, mesh) for name in ("ddp_bucketed", "zero3")}
    field |= {"torch DDP": theirs(params, cfg, False), "torch FSDP2": theirs(params, cfg, True)}
    times: dict[str, list[list[float]]] = {name: [] for name in field}
    works: dict[str, list[list[float]]] = {name: [] for name in field}
    losses: dict[str, float] = {}
    done = dict.fromkeys(field, 0)
    for turn in range(job["rounds"]):
        for name in list(field)[:: 1 if turn % 2 else -1]:
            found, worked = [], []
            for _ in range(STEPS):
                batch = rows_of(done[name], rank, job["rows"], cfg)
                done[name] += 1
                dist.barrier()
                begun, work = time.perf_counter(), time.process_time()
                losses[name] = field[name](batch)
                worked.append(time.process_time() - work)
                spent = torch.tensor([time.perf_counter() - begun])
                dist.all_reduce(spent, dist.ReduceOp.MAX)
                found.append(float(spent))
            times[name].append(found[1:])
            works[name].append(worked[1:])
    if rank == 0:
        print(json.dumps({"times": times, "works": works, "losses": losses}))
    del field
    dist.destroy_process_group()


def rows_of(step: int, rank: int, rows: int, cfg: fnlm.ModelConfig) -> fnlm.Batch:
    where = torch.Generator().manual_seed(1000 * step + rank)
    tokens = torch.randint(cfg.vocab_size, (rows, cfg.seq_len + 1), generator=where)
    return fnlm.Batch(tokens[:, :-1], tokens[:, 1:], torch.ones(rows, cfg.seq_len))


def report(told: dict[str, Any], job: dict[str, Any]) -> dict[str, Any]:
    times, losses = told["times"], told["losses"]
    apart = max(losses.values()) - min(losses.values())
    print(f"{job['shape']}, {job['ranks']} gloo processes of one thread, {job['rows']} x {job['seq_len']} tokens each")
    medians = {name: statistics.median(t for turn in turns for t in turn) for name, turns in times.items()}
    found: dict[str, Any] = {"job": job, "ms": {k: 1e3 * v for k, v in medians.items()}, "losses_apart": apart}
    for mine, peer in PAIRS:
        ratios, work = (
            [
                statistics.median(a) / statistics.median(b)
                for a, b in zip(told[kind][mine], told[kind][peer], strict=True)
            ]
            for kind in ("times", "works")
        )
        found[mine], found[f"{mine}_work"] = statistics.median(ratios), statistics.median(work)
        print(
            f"{mine:13}{1e3 * medians[mine]:8.1f} ms   {peer:12}{1e3 * medians[peer]:8.1f} ms   "
            f"ratio {found[mine]:.3f} [{min(ratios):.2f}, {max(ratios):.2f}], of processor time "
            f"{found[f'{mine}_work']:.3f} [{min(work):.2f}, {max(work):.2f}]"
        )
    print(f"losses of the last step apart by {apart:.1e}")
    return found


def main() -> None:
    ask = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ask.add_argument("--ranks", type=int, default=2)
    ask.add_argument("--rounds", type=int, default=12)
    ask.add_argument("--shape", default="ryan-12m")
    ask.add_argument("--rows", type=int, default=4)
    ask.add_argument("--seq-len", type=int, default=512)
    job = vars(ask.parse_args())
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, __file__, "--as-rank", json.dumps(job), f"{folder}/store"]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
        ranks = [
            subprocess.Popen([*command, str(i)], env=environment, stdout=subprocess.PIPE, text=True)
            for i in range(job["ranks"])
        ]
        said = [rank.communicate()[0] for rank in ranks]
    if any(rank.returncode for rank in ranks):
        raise SystemExit("a rank failed; see above")
    print(json.dumps(report(json.loads(said[0].splitlines()[-1]), job)))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--as-rank"]:
        rank_main(json.loads(sys.argv[2]), int(sys.argv[4]), sys.argv[3])
    else:
        main()
