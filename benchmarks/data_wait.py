"""The share of the step time spent waiting for data: `data.batches` on a memory map, beside one batch used again.

    python benchmarks/data_wait.py [--threads 2] [--tokens 50000000] [--rounds 5] [--shapes NAME,NAME] [--data FOLDER]

The tokens are random uint16 in a file made for the occasion, or the train split of a prepared FOLDER. A round takes
--steps steps of each shape with batches from the file and as many with one batch that is there already, in turns, the
order reversed every other round; the first of each is not counted. `wait_share` is the median over rounds of (time in
next()) / (time in next() + time in the step); `slower` what the thread that makes batches costs the steps: the median
of the step's median with the file over that with one batch. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Iterator
from itertools import repeat
from pathlib import Path

import numpy as np
import torch

import fnlm
from fnlm import data
from fnlm.presets import optimizer_of

SHAPES = {"shakespeare-char-cpu": (12, 40), "ryan-12m": (4, 8)}
"""Rows of a batch, as `fnlm bench step` has them, and steps a round."""


def random_split(folder: Path, tokens: int, vocab_size: int) -> data.Split:
    file = folder / f"{vocab_size}.bin"
    ids = np.random.default_rng(0).integers(0, min(vocab_size, 65536), tokens, dtype=np.uint16)
    ids.tofile(file)
    return data.Split(np.memmap(file, "<u2", "r"), None, 1, tokens, vocab_size)


class Shape:
    """A preset with a state to train, and two sources of batches."""

    def __init__(self, name: str, split: data.Split) -> None:
        cfg, train = fnlm.PRESETS[name], fnlm.TRAINING[name]
        optimizer = optimizer_of(train, cfg)
        self.rows, self.steps = SHAPES[name]
        self.state = fnlm.init_state(fnlm.init_params(cfg, fnlm.key(0)), optimizer)
        self.step = fnlm.make_step(fnlm.make_lm_loss(cfg), optimizer, fnlm.Plan(train.precision))
        key = fnlm.key(1)
        self.sources: dict[str, Iterator[fnlm.Batch]] = {
            "file": data.batches(split, cfg.seq_len, self.rows, key),
            "one": repeat(data.batch_at(split, cfg.seq_len, self.rows, key, 0)),
        }

    def round(self, source: str) -> tuple[float, float]:
        """The share of waiting, and the median step, of some steps after a first one."""
        batches, waits, steps = self.sources[source], [], []
        for _ in range(self.steps + 1):
            start = time.perf_counter()
            batch = next(batches)
            got = time.perf_counter()
            self.state, metrics = self.step(self.state, batch)
            float(metrics["train/loss"])
            waits.append(got - start)
            steps.append(time.perf_counter() - got)
        waited, worked = sum(waits[1:]), sum(steps[1:])
        return waited / (waited + worked), statistics.median(steps[1:])


def measured(shape: Shape, rounds: int) -> dict[str, float]:
    shares, ratios, times = [], [], []
    for i in range(rounds):
        order = list(shape.sources)[:: -1 if i % 2 else 1]
        found = {source: shape.round(source) for source in order}
        shares.append(found["file"][0])
        times.append(found["file"][1])
        ratios.append(found["file"][1] / found["one"][1])
    return {
        "step_ms": round(1e3 * statistics.median(times), 2),
        "wait_share": round(statistics.median(shares), 5),
        "worst_round": round(max(shares), 5),
        "slower": round(statistics.median(ratios), 4),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=50_000_000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--shapes", default=",".join(SHAPES))
    parser.add_argument("--data", type=Path, metavar="FOLDER")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    fnlm.tune_cpu()
    report = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in args.shapes.split(","):
            vocab = fnlm.PRESETS[name].vocab_size
            split = data.open(args.data).train if args.data else random_split(Path(folder), args.tokens, vocab)
            report[name] = measured(Shape(name, split), args.rounds)
            print(f"{name}: {report[name]}")
    print(json.dumps({"data_wait": report, "threads": args.threads, "tokens": args.tokens}))


if __name__ == "__main__":
    main()
