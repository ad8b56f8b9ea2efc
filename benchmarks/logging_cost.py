"""What the log costs: rows of metrics.jsonl, lines on the terminal, norms by layer, as a share of the step time.

    python benchmarks/logging_cost.py [--preset ryan-12m] [--rows 4] [--rounds 15] [--threads 2]

A round takes one training step, a row of metrics as `fnlm train` logs it (to a file and as a line of text, which goes
nowhere), and one round of norms by layer with the copy of the parameters that they need. Medians; `share` is what one
row each --log-every steps and norms each --health-every steps cost a step, over its time. The last line is JSON.
"""

from __future__ import annotations

import argparse
import io
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import fnlm
from fnlm.loop.health import health, norms
from fnlm.presets import optimizer_of
from fnlm.track import JsonLines, Many, Progress


def timed(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def row(step: int, loss: torch.Tensor) -> dict[str, Any]:
    """As many figures as a training row has."""
    names = ("lr", "grad_norm", "clip_frac", "skipped", "batch_size", "tok_per_sec", "step_ms", "data_frac", "mfu")
    return {"step": step, "tokens": step * 2048, "train/loss": float(loss), **{f"x/{n}": 0.123456789 for n in names}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="ryan-12m")
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--log-every", type=int, default=10)
    parser.add_argument("--health-every", type=int, default=100)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    fnlm.tune_cpu()
    cfg, train = fnlm.PRESETS[args.preset], fnlm.TRAINING[args.preset]
    optimizer = optimizer_of(train, cfg)
    state = fnlm.init_state(fnlm.init_params(cfg, fnlm.key(0)), optimizer)
    take = fnlm.make_step(fnlm.make_lm_loss(cfg), optimizer, fnlm.Plan(train.precision))
    tokens = fnlm.random.randint(fnlm.key(1), (args.rows, cfg.seq_len + 1), 0, cfg.vocab_size)
    batch = fnlm.Batch(tokens[:, :-1], tokens[:, 1:], torch.ones(args.rows, cfg.seq_len))
    seconds: dict[str, list[float]] = {"step": [], "row": [], "norms": []}
    with tempfile.TemporaryDirectory() as folder, Progress(args.rounds, stream=io.StringIO()) as progress:
        log = Many([JsonLines(Path(folder) / "metrics.jsonl"), progress])
        loss = torch.zeros(())

        def one_step() -> None:
            nonlocal state, loss
            state, metrics = take(state, batch)
            loss = metrics["train/loss"]

        def one_health() -> None:
            gradients = norms(state.params)  # of tensors of the gradients' shapes
            copied = {name: p.clone() for name, p in state.params.items()}
            log.log({"step": 1, **health(gradients, copied, state.params)})

        for i in range(args.rounds + 2):
            seconds["step"].append(timed(one_step))
            seconds["row"].append(timed(lambda i=i: (progress.advance(i), log.log(row(i, loss)))))  # type: ignore[misc]
            seconds["norms"].append(timed(one_health))
        log.close()
    ms = {name: 1e3 * statistics.median(times[2:]) for name, times in seconds.items()}
    share = (ms["row"] / args.log_every + ms["norms"] / args.health_every) / ms["step"]
    told = {name: round(value, 3) for name, value in ms.items()}
    print(json.dumps({"logging_cost": {"preset": args.preset, "ms": told, "share": round(share, 6)}}))


if __name__ == "__main__":
    main()
