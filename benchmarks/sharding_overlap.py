"""How much of a strategy's communication is hidden behind computing, on a link that takes as long as the backward pass.

    python benchmarks/sharding_overlap.py [--model gpt2-xl] [--mesh-size 8] [--rows 8] [--worked] [--rounds 5]

One rank's forward and backward pass, with nobody at the other end, on a wire whose collectives take latency + bytes
sent / bandwidth on a line of their own (fnlm/sharding/modelled.py). The bandwidth is such that all of a step's
communication takes as long as its backward pass. hidden = 1 - (time - time without communication) / communication.

Time is counted from the operations (--flops a second for products, --bytes a second for the rest), on tensors without
storage: any model, any machine, the same figures each time. With --worked it is what one thread of this machine works
and waits, for a small model: medians of interleaved rounds.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

import fnlm
from fnlm.sharded import axes_of, layout_of
from fnlm.sharding import Ranks, Strategy, mesh_for, planned, shard, strategy
from fnlm.sharding.modelled import Clock, Counting, Line, Worked, modelled
from fnlm.step import value_and_grad

LATENCY = 2e-5
FREE = (float("inf"), 0.0)
SCHEDULES: dict[str, dict[str, Any]] = {
    "as it comes": {},
    "no overlap": {"overlap": False, "prefetch": 0},
    "one bucket": {"bucket_bytes": 1 << 60},
}


def one_pass(
    cfg: fnlm.ModelConfig, how: Strategy, n: int, rows: int, clock: Clock, bandwidth: float, latency: float, real: bool
) -> tuple[float, float, float]:
    """Seconds of the forward, of forward and backward pass, and of all communication."""
    line = Line(clock, bandwidth, latency)
    mesh = modelled(planned(mesh_for(how, n)), line)
    layout = layout_of(cfg, how, mesh)
    if real:
        params = shard(fnlm.init_params(cfg, fnlm.key(0)), layout)
    else:
        params = {name: torch.empty(layout.local_shape(name), device="meta") for name in layout.shapes}
    where = "cpu" if real else "meta"
    tokens = torch.zeros(rows, cfg.seq_len, dtype=torch.long, device=where)
    batch = fnlm.Batch(tokens, tokens, torch.ones(tokens.shape, device=where))
    plain, ends = fnlm.make_lm_loss(cfg, axes=axes_of(layout)), []

    def loss(live: fnlm.Params, batch: fnlm.Batch, key: Any, use: Any) -> torch.Tensor:
        value = plain(live, batch, key, use)
        ends.append(clock.now())
        return value

    run = value_and_grad(loss, fnlm.Plan(ranks=Ranks(layout, local=True), keep_memory=real))
    begun = clock.now()
    run(params, batch)
    return ends[0] - begun, clock.now() - begun, line.busy


def counted(cfg: fnlm.ModelConfig, how: Strategy, n: int, rows: int, rates: tuple[float, float], link: Any) -> Any:
    """`one_pass` in counted time."""
    clock = Counting(*rates)
    with clock:
        return one_pass(cfg, how, n, rows, clock, *link, real=False)


def link_for(run: Callable[[Any], tuple[float, float, float]]) -> tuple[tuple[float, float], float, float]:
    """The link on which communication takes as long as the backward pass; that time, and that of no communication."""
    forward, alone, _ = run(FREE)
    _, _, nbytes = run((1.0, 0.0))  # at one byte a second, seconds are bytes
    _, _, calls = run((float("inf"), 1.0))
    backward = alone - forward
    return (nbytes / max(backward - calls * LATENCY, backward / 2), LATENCY), backward, alone


def by_count(cfg: fnlm.ModelConfig, how: Strategy, n: int, rows: int, rates: tuple[float, float]) -> dict[str, float]:
    link, backward, _ = link_for(lambda link: counted(cfg, how, n, rows, rates, link))
    out = {"gbit_s": link[0] * 8e-9, "backward_ms": backward * 1e3}
    for name, schedule in SCHEDULES.items():
        this = replace(how, **schedule)
        _, alone, _ = counted(cfg, this, n, rows, rates, FREE)
        _, time, talk = counted(cfg, this, n, rows, rates, link)
        out[name] = 1 - (time - alone) / talk
    return out


def by_work(cfg: fnlm.ModelConfig, how: Strategy, n: int, rows: int, rounds: int) -> dict[str, float]:
    def run(how: Strategy, link: tuple[float, float]) -> tuple[float, float, float]:
        return one_pass(cfg, how, n, rows, Worked(), *link, real=True)

    run(how, FREE)
    forward, alone, _ = map(statistics.median, zip(*(run(how, FREE) for _ in range(rounds)), strict=True))
    nbytes, calls = (counted(cfg, how, n, rows, (1.0, 1.0), link)[2] for link in ((1.0, 0.0), (float("inf"), 1.0)))
    link = (nbytes / (alone - forward - calls * LATENCY), LATENCY)
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in SCHEDULES}
    for _ in range(rounds):
        for name, schedule in SCHEDULES.items():
            this = replace(how, **schedule)
            _, time, talk = run(this, link)
            times[name].append((time - run(this, FREE)[1], talk))
    medians = {name: [statistics.median(x) for x in zip(*pairs, strict=True)] for name, pairs in times.items()}
    return {"gbit_s": link[0] * 8e-9, **{name: 1 - more / talk for name, (more, talk) in medians.items()}}


def main() -> None:
    ask = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ask.add_argument("--model", default="gpt2-xl")
    ask.add_argument("--mesh-size", type=int, default=8)
    ask.add_argument("--rows", type=int, default=8)
    ask.add_argument("--flops", type=float, default=4e14)
    ask.add_argument("--bytes", type=float, default=2e12)
    ask.add_argument("--strategies", default="ddp_bucketed,zero1,zero2,zero3")
    ask.add_argument("--worked", action="store_true")
    ask.add_argument("--rounds", type=int, default=5)
    asked = ask.parse_args()
    torch.set_num_threads(1)
    cfg = replace(fnlm.PRESETS[asked.model], dropout_embed=0.0, dropout_attn=0.0, dropout_residual=0.0)
    print(f"{asked.model}, {asked.mesh_size} ranks, {asked.rows} x {cfg.seq_len} tokens a rank")
    print(f"{'strategy':14}{'Gbit/s':>8}" + "".join(f"{name:>14}" for name in SCHEDULES))
    found = {}
    for name in asked.strategies.split(","):
        how = strategy(name)
        if asked.worked:
            row = by_work(cfg, how, asked.mesh_size, asked.rows, asked.rounds)
        else:
            row = by_count(cfg, how, asked.mesh_size, asked.rows, (asked.flops, asked.bytes))
        found[name] = row
        print(f"{name:14}{row['gbit_s']:8.1f}" + "".join(f"{row[s]:14.1%}" for s in SCHEDULES), flush=True)
    print(json.dumps({"model": asked.model, "worked": asked.worked, "hidden": found}))


if __name__ == "__main__":
    main()
