"""What checkpoints cost: how long `Saver.save` holds the loop, and how much slower steps are while a thread writes.

    python benchmarks/save_stall.py [--preset ryan-12m] [--rows 4] [--every 250] [--rounds 8] [--threads 2] [--dir D]

A round is a few steps in quiet, a save of the whole state (parameters, AdamW's moments), and steps until the thread
has written it and two more. `stall_ms` is the median time in `save`; `extra_ms` the median of what the steps during the
writing took beyond the round's quiet median; `share` is (stall + extra) / (`every` quiet steps), the cost of a save
each `every` steps. The first save, which allocates the host's copy, is told apart. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import torch

import fnlm
from fnlm import tree
from fnlm.checkpoint import Saver
from fnlm.presets import optimizer_of

QUIET = 6
"""Steps of a round before its save."""


class Loop:
    """Training steps on one batch, timed."""

    def __init__(self, preset: str, rows: int) -> None:
        self.cfg, train = fnlm.PRESETS[preset], fnlm.TRAINING[preset]
        optimizer = optimizer_of(train, self.cfg)
        self.state = fnlm.init_state(fnlm.init_params(self.cfg, fnlm.key(0)), optimizer)
        self.take = fnlm.make_step(fnlm.make_lm_loss(self.cfg), optimizer, fnlm.Plan(train.precision))
        tokens = fnlm.random.randint(fnlm.key(1), (rows, self.cfg.seq_len + 1), 0, self.cfg.vocab_size)
        self.batch = fnlm.Batch(tokens[:, :-1], tokens[:, 1:], torch.ones(rows, self.cfg.seq_len))

    def step(self) -> float:
        start = time.perf_counter()
        self.state, metrics = self.take(self.state, self.batch)
        float(metrics["train/loss"])
        return time.perf_counter() - start


class Round(NamedTuple):
    """Seconds: a quiet step, the stall, what the steps during the writing took beyond, and until it was written."""

    quiet: float
    stall: float
    extra: float
    writing: float


def one_round(loop: Loop, saver: Saver) -> Round:
    quiet = statistics.median([loop.step() for _ in range(QUIET)])
    start = time.perf_counter()
    saver.save(loop.state, config={"model": asdict(loop.cfg)})
    stall = time.perf_counter() - start
    during, written, after = [], 0.0, 0
    while after < 2:
        during.append(loop.step())
        if all(job.done() for job in saver._pending):
            written, after = written or time.perf_counter() - start, after + 1
    saver.wait()
    return Round(quiet, stall, sum(during) - quiet * len(during), written)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="ryan-12m")
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--every", type=int, default=250)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--dir", type=Path, help="Where to save. [default: a temporary folder]")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    fnlm.tune_cpu()
    loop = Loop(args.preset, args.rows)
    loop.step()
    with tempfile.TemporaryDirectory(dir=args.dir) as folder, Saver(folder) as saver:
        first, *rounds = [one_round(loop, saver) for _ in range(args.rounds + 1)]
    for i, r in enumerate(rounds):
        print(f"{i}: " + ", ".join(f"{name} {1e3 * value:.1f} ms" for name, value in r._asdict().items()))
    quiet, stall, extra, writing = (statistics.median(column) for column in zip(*rounds, strict=True))
    size = sum(t.nbytes for t in tree.flatten(loop.state).values())
    report = {
        "preset": args.preset, "rows": args.rows, "threads": args.threads, "state_mib": round(size / 2**20),
        "step_ms": round(1e3 * quiet, 2), "first_stall_ms": round(1e3 * first.stall, 1),
        "stall_ms": round(1e3 * stall, 2), "extra_ms": round(1e3 * extra, 2), "written_after_ms": round(1e3 * writing),
        "stall_ms_a_step": round(1e3 * stall / args.every, 4), "every": args.every,
        "share": round((stall + extra) / (args.every * quiet), 5),
    }  # fmt: skip
    print(json.dumps({"save_stall": report}))


if __name__ == "__main__":
    main()
