"""What telling documents apart costs a training step, and how fast each step of cleaning is.

    python benchmarks/data_cleaning.py [--text stories.txt] [--preset ryan-12m] [--rows 4] [--rounds 9] [--threads 2]

Steps with documents together and apart take turns, on windows of documents of 200 tokens: medians, and their ratio.
Cleaning: each step alone on the documents of --text (parted by <|endoftext|>), or on made-up ones, in one process: MB
of text a second, the best of three rounds. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import torch

import fnlm
from fnlm.cleaning import Cleaner, steps_of
from fnlm.data.sources import find, pieces
from fnlm.data.streams import joined
from fnlm.presets import optimizer_of

STEPS = ("exact", "minhash", "gopher", "language=en", "pii")


def step_ms(preset: str, rows: int, rounds: int) -> dict[str, float]:
    """Medians of a step's time, both ways in turn."""
    cfg, train = fnlm.PRESETS[preset], fnlm.TRAINING[preset]
    tokens = fnlm.random.randint(fnlm.key(1), (rows, cfg.seq_len + 1), 1, cfg.vocab_size)
    tokens[:, ::200] = 0
    batch = fnlm.Batch(tokens[:, :-1], tokens[:, 1:], torch.ones(rows, cfg.seq_len))
    computes = {"together": fnlm.Compute(), "apart": fnlm.Compute(document_end=0)}
    optimizer = optimizer_of(train, cfg)
    states = {name: fnlm.init_state(fnlm.init_params(cfg, fnlm.key(0)), optimizer) for name in computes}
    takes = {n: fnlm.make_step(fnlm.make_lm_loss(cfg, c), optimizer, fnlm.Plan("bf16")) for n, c in computes.items()}
    seconds: dict[str, list[float]] = {name: [] for name in computes}
    for _ in range(rounds + 2):
        for name, take in takes.items():
            start = time.perf_counter()
            states[name], _ = take(states[name], batch)
            seconds[name].append(time.perf_counter() - start)
    return {name: 1000 * statistics.median(found[2:]) for name, found in seconds.items()}


def documents(text: str | None) -> list[str]:
    if text:
        return list(joined(pieces(find([text])), text))
    words = ["the", "of", "and", *(f"w{i}" for i in range(997))]
    picks = fnlm.random.randint(fnlm.key(2), (2000, 300), 0, len(words)).tolist()
    return [" ".join(words[i] for i in row) for row in picks]


def mb_per_second(step: str, texts: list[str]) -> float:
    best = float("inf")
    for _ in range(3):
        with tempfile.TemporaryDirectory() as folder, Cleaner(steps_of([step], Path(folder))) as cleaner:
            start = time.perf_counter()
            cleaner.clean(texts)
            best = min(best, time.perf_counter() - start)
    return sum(len(text.encode()) for text in texts) / best / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text")
    parser.add_argument("--preset", default="ryan-12m")
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    fnlm.tune_cpu()
    ms = step_ms(args.preset, args.rows, args.rounds)
    ratio = ms["apart"] / ms["together"]
    print(f"{args.preset}: together {ms['together']:.1f} ms, apart {ms['apart']:.1f} ms a step, ratio {ratio:.3f}")
    texts = documents(args.text)
    rates = {step: mb_per_second(step, texts) for step in STEPS}
    for step, rate in rates.items():
        print(f"{step:12} {rate:8.1f} MB/s")
    print(json.dumps({"step_ms": ms, "ratio": ratio, "mb_per_second": rates}))


if __name__ == "__main__":
    main()
