"""How fast texts are written: one at a time by `fnlm.generate`, and together by the server's batch.

    python benchmarks/decode.py [--shapes demo,ryan-12m,gpt2] [--threads N] [--tokens 64] [--rounds 3] [--texts 8]

Random parameters; prompts of 32 tokens, each text of --tokens more, drawn at temperature 0.8. Every round takes each
contestant once, in turn: `alone` is one text in float32; `turns` --texts of them, one token of each in turn, each with
a cache of its own; `batch-1` and `batch` one and --texts through webui.batch, in the type that `fnlm serve` takes here
(and the oneDNN products that it turns on for large models); `int8-1` and `int8` the same with `--quantize`. Then the
longest gap between two tokens of one text while a prompt as long as the context allows joins. Medians over rounds; the
last line is JSON. Ratios on a machine that does nothing else.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable

import torch

import fnlm
from fnlm import random
from fnlm.decode import Prepared, prepare
from fnlm.generate import generate
from fnlm.machine import route_fp32_to_onednn
from fnlm.quantize import quantize
from fnlm.sampling import Settings
from fnlm.tokenizers import named
from fnlm.types import Params
from webui.batch import CHUNK, SHORT, Batch
from webui.models import dtype_of
from webui.writing import Writer, chosen

SMALL = 5_000_000  # parameters; below, one thread is faster
PROMPT = 32


def prompt(seed: int, n: int = PROMPT) -> list[int]:
    return [(seed * 31 + i * 7) % 250 for i in range(n)]


def in_turns(ready: Prepared, cfg: fnlm.ModelConfig, texts: int, tokens: int) -> float:
    """Seconds for `texts` texts, a token of each in turn."""
    settings = Settings(max_tokens=tokens, min_tokens=tokens)
    began = time.perf_counter()
    running = [generate(ready, cfg, [prompt(i)], settings, random.key(i), eot_ids=frozenset({0})) for i in range(texts)]
    for steps in zip(*running, strict=True):
        assert len(steps) == texts
    return time.perf_counter() - began


def together(ready: Prepared, cfg: fnlm.ModelConfig, texts: int, tokens: int, long: int = 0) -> tuple[float, float]:
    """Seconds for as many in one batch, and the longest gap of the first while one of `long` tokens joins midway."""
    tokenizer = named("byte")
    batch = Batch(ready, cfg, max(1, min(8, texts + bool(long))))
    settings = Settings(max_tokens=tokens, min_tokens=tokens)
    running, last, gap = {}, 0.0, 0.0
    began = time.perf_counter()
    for i in range(texts):
        running[batch.join(prompt(i))] = Writer(tokenizer, prompt(i), settings, i, cfg.vocab_size)
    first = next(iter(running.values()))
    while running:
        if long and first.step == 4:
            more = prompt(texts, long)
            running[batch.join(more)] = Writer(tokenizer, more, Settings(max_tokens=2), texts, cfg.vocab_size)
            long = 0
        new = {slot: w.next for slot, w in running.items() if w.next is not None}
        if new:
            slots, logits = batch.advance(new)
            push(running, slots, logits)
            now = time.perf_counter()
            gap, last = max(gap, now - last if last else 0.0), now
        for slot, row in batch.fill(SHORT if new else CHUNK):
            push(running, [slot], row[None])
        for slot in [slot for slot, w in running.items() if w.finish]:
            batch.leave(slot)
            del running[slot]
    return time.perf_counter() - began, gap


def push(running: dict, slots: list, logits: torch.Tensor) -> None:
    ids, scores = chosen([running[slot] for slot in slots], logits)
    for slot, token, score in zip(slots, ids, scores, strict=True):
        running[slot].push(token, score)


def measured(name: str, args: argparse.Namespace) -> dict[str, object]:
    cfg = fnlm.PRESETS[name]
    params: Params = fnlm.init_params(cfg, fnlm.key(0))
    size = sum(p.numel() for p in params.values())
    torch.set_num_threads(1 if size < SMALL else args.threads)
    dtype = dtype_of("auto", "cpu", size)
    wide, own = prepare(params, cfg), prepare(params, cfg, dtype)
    small = prepare(quantize({k: p.bfloat16() for k, p in params.items()}), cfg)
    n, tokens = args.texts, min(args.tokens, cfg.seq_len - PROMPT - 1)
    contestants: dict[str, Callable[[], float]] = {
        "alone": lambda: tokens / in_turns(wide, cfg, 1, tokens),
        "turns": lambda: n * tokens / in_turns(wide, cfg, n, tokens),
        "batch-1": lambda: tokens / together(own, cfg, 1, tokens)[0],
        "batch": lambda: n * tokens / together(own, cfg, n, tokens)[0],
        "int8-1": lambda: tokens / together(small, cfg, 1, tokens)[0],
        "int8": lambda: n * tokens / together(small, cfg, n, tokens)[0],
        "gap": lambda: together(own, cfg, 1, tokens, min(1500, cfg.seq_len - 8))[1],
    }
    rounds: dict[str, list[float]] = {c: [] for c in contestants}
    for _ in range(args.rounds + 1):
        for contestant, run in contestants.items():
            torch.backends.mkldnn.matmul.fp32_precision = "none"
            if contestant not in ("alone", "turns") and size >= SMALL:
                route_fp32_to_onednn()
            rounds[contestant].append(run())
    row: dict[str, object] = {c: round(statistics.median(r[1:]), 4) for c, r in rounds.items()}
    return {"shape": name, "parameters": size, "dtype": str(dtype).removeprefix("torch."), **row}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default="demo,ryan-12m,gpt2")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--texts", type=int, default=8)
    args = parser.parse_args()
    rows = [measured(name, args) for name in args.shapes.split(",")]
    for row in rows:
        alone, turns, one, all_, gap = (float(str(row[c])) for c in ("alone", "turns", "batch-1", "batch", "gap"))
        print(f"{row['shape']} ({row['dtype']})", end=": ")
        print(f"one text {alone:.0f} -> {one:.0f} tokens/s ({one / alone:.2f} x)", end=", ")
        print(f"{args.texts} texts {turns:.0f} -> {all_:.0f} ({all_ / turns:.2f} x)", end=", ")
        print(f"int8 {float(str(row['int8-1'])) / alone:.2f} x and {float(str(row['int8'])) / turns:.2f} x", end=", ")
        print(f"longest gap {1000 * gap:.0f} ms")
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
