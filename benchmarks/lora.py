"""What adapters cost beside full finetuning: parameters trained, bytes at rest, peak memory, and time of a step.

    python benchmarks/lora.py [--preset ryan-12m] [--ranks 4,8,16,64] [--rows 4] [--rounds 3] [--steps 6] [--threads 2]

Each contestant is a process of its own, one after the other, in rounds: the model with random weights, AdamW, bfloat16,
one batch of random tokens. `seconds` is the median step of the fastest round, `peak` the most memory that the process
held, `state` the optimizer's bytes, and `gap` the largest difference of logits between the merged parameters and those
in training (float32). The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from typing import Any

import torch

import fnlm
from fnlm import tree
from fnlm.config import TrainConfig
from fnlm.losses import make_lm_loss
from fnlm.presets import optimizer_of
from fnlm.trainable import subset_of


def contestant(preset: str, rank: int, rows: int, steps: int) -> dict[str, Any]:
    """Figures of one process; rank 0 is full finetuning."""
    fnlm.tune_cpu()
    cfg, train = fnlm.PRESETS[preset], TrainConfig(steps=1000, batch_size=rows, lora=rank or None)
    optimizer, plan, subset = optimizer_of(train, cfg), fnlm.Plan("bf16"), subset_of(cfg, train)
    own, resting = subset.parted(subset.begun(fnlm.init_params(cfg, fnlm.key(0)), fnlm.key(1)))
    take = fnlm.make_step(subset.loss(make_lm_loss(cfg), resting, torch.bfloat16), optimizer, plan)
    state = fnlm.init_state(own, optimizer, plan)
    del own
    tokens = fnlm.random.randint(fnlm.key(2), (rows, cfg.seq_len + 1), 0, cfg.vocab_size)
    batch = fnlm.Batch(tokens[:, :-1], tokens[:, 1:], torch.ones(rows, cfg.seq_len))
    times = []
    for _ in range(steps):
        start = time.perf_counter()
        state, metrics = take(state, batch)
        float(metrics["train/loss"])
        times.append(time.perf_counter() - start)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return {
        "trained": tree.size(state.params), "of": fnlm.count(cfg), "state": tree.nbytes(state.opt_state), "peak": peak,
        "seconds": statistics.median(times[1:]),
    }  # fmt: skip


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--preset", default="ryan-12m")
    p.add_argument("--ranks", default="4,8,16,64")
    p.add_argument("--rows", type=int, default=4)
    p.add_argument("--rounds", type=int, default=3)
    p.add_argument("--steps", type=int, default=6)
    p.add_argument("--threads", type=int, default=2)
    p.add_argument("--one", type=int, help=argparse.SUPPRESS)
    args = p.parse_args()
    torch.set_num_threads(args.threads)
    if args.one is not None:
        print(json.dumps(contestant(args.preset, args.one, args.rows, args.steps)))
        return
    found: dict[int, list[dict[str, Any]]] = {rank: [] for rank in (0, *map(int, args.ranks.split(",")))}
    for _ in range(args.rounds):
        for rank, rounds in found.items():
            done = subprocess.run([sys.executable, *sys.argv, "--one", str(rank)], capture_output=True, check=True)
            rounds.append(json.loads(done.stdout))
    rows = []
    for rank, rounds in found.items():
        best = min(rounds, key=lambda r: r["seconds"])
        rows.append({"rank": rank, **best, "peak": min(r["peak"] for r in rounds)})
        share, mb = 100 * best["trained"] / best["of"], 2**20
        print(
            f"{'full' if not rank else f'rank {rank}':8}  {best['trained']:>11,} trained ({share:.2f} %)  "
            f"state {best['state'] / mb:7.1f} MiB  peak {rows[-1]['peak'] / mb:6.0f} MiB  step {best['seconds']:.3f} s"
        )
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
