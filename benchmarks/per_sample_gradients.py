"""The cost of one gradient per sample, vmap(grad), over that of one batch gradient: shakespeare-char-cpu, float32.

    python benchmarks/per_sample_gradients.py [--threads 2] [--rounds 15]

Interleaved in one process: each round times the batch gradient (torch.autograd on the public loss, plain and with the
CPU kernels), vmap(grad) of the same loss over the rows, and a loop over the rows. Medians, as JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable

import torch
from torch.func import grad, vmap

import fnlm


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=15)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    fnlm.tune_cpu()
    cfg, train = fnlm.PRESETS["shakespeare-char-cpu"], fnlm.TRAINING["shakespeare-char-cpu"]
    params = fnlm.init_params(cfg, fnlm.key(0))
    shape = (train.batch_size, cfg.seq_len + 1)
    rows = fnlm.random.randint(fnlm.key(1), shape, 0, cfg.vocab_size)
    batch = fnlm.Batch(rows[:, :-1], rows[:, 1:], torch.ones(shape[0], cfg.seq_len))

    def one(params: fnlm.Params, tokens: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        return fnlm.lm_loss(params, fnlm.Batch(tokens[None], targets[None], weights[None]), cfg)

    def batch_gradient(kernels: str) -> Callable[[], object]:
        run = fnlm.value_and_grad(fnlm.make_lm_loss(cfg, fnlm.Compute(kernels=kernels)))  # type: ignore[arg-type]
        return lambda: run(params, batch)

    contestants: dict[str, Callable[[], object]] = {
        "batch gradient": batch_gradient("plain"),
        "batch gradient, CPU kernels": batch_gradient("auto"),
        "vmap(grad)": lambda: vmap(grad(one), in_dims=(None, 0, 0, 0))(params, *batch),
        "loop": lambda: [grad(one)(params, *(x[i] for x in batch)) for i in range(shape[0])],
    }
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(args.rounds + 2):
        for name, run in contestants.items():
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
    ms = {name: statistics.median(times[2:]) * 1e3 for name, times in seconds.items()}
    ratios = [a / b for a, b in zip(seconds["vmap(grad)"][2:], seconds["batch gradient"][2:], strict=True)]
    print(
        json.dumps(
            {"ms": {k: round(v, 2) for k, v in ms.items()}, "vmap over batch": round(statistics.median(ratios), 3)}
        )
    )


if __name__ == "__main__":
    main()
