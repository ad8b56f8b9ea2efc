"""What speculation gains: one text alone, written plainly, with prompt lookup, and with a draft model.

    python benchmarks/speculate.py MODEL [--draft MODEL] [--tokens 128] [--rounds 3] [--dtype fp32|bf16] [--threads N]

MODEL is anything that `fnlm sample` takes; the draft has the same tokenizer. Greedy; `story` is the beginning of a
tale, `copy` a list that the prompt repeats (left out where the context has no room for it). Every round takes each
contestant once, in turn. Printed: tokens a second (medians), the ratio to plain, passes through the model, the share of
drafted tokens that were right, and whether the tokens are the plain ones. The last line is JSON. Ratios on a machine
that does nothing else.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time

import torch

import fnlm
from fnlm import trained
from fnlm.decode import Prepared, prepare
from fnlm.generate import encoded, end_ids, generate
from fnlm.machine import route_fp32_to_onednn
from fnlm.sampling import Settings
from fnlm.speculate import Begin, lookup, with_model
from fnlm.tokens import Token

LIST = "red apple, green pear, yellow lemon, blue plum, black berry, white grape, brown nut, pink peach"
PROMPTS = {"story": "Once upon a time there was a little", "copy": f"Say it again. {LIST}. Again: {LIST}. Again: red"}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def written(ready: Prepared, cfg: fnlm.ModelConfig, ids: list[int], n: int, by: Begin | None) -> list[Token]:
    settings = Settings(temperature=0, max_tokens=n, min_tokens=n)
    return [t for (t,) in generate(ready, cfg, [ids], settings, fnlm.key(0), eot_ids=frozenset({0}), draft=by)]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("--draft")
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtype", choices=list(DTYPES), default="fp32")
    parser.add_argument("--threads", type=int)
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    route_fp32_to_onednn()
    found = trained.load(args.model)
    ready = prepare(found.params, found.cfg, DTYPES[args.dtype])
    ways: dict[str, Begin | None] = {"plain": None, "lookup": lookup}
    if args.draft:
        other = trained.load(args.draft)
        ways["draft"] = with_model(
            prepare(other.params, other.cfg, DTYPES[args.dtype]), other.cfg, len(found.tokenizer.table)
        )
    out = {}
    for name, text in PROMPTS.items():
        ids = encoded(found.tokenizer, text)
        n = min(args.tokens, found.cfg.seq_len - len(ids))
        if n < 2:
            continue
        seconds: dict[str, list[float]] = {way: [] for way in ways}
        made: dict[str, list[Token]] = {}
        for _ in range(args.rounds):
            for way, by in ways.items():
                began = time.perf_counter()
                made[way] = written(ready, found.cfg, ids, n, by)
                seconds[way].append(time.perf_counter() - began)
        for way, tokens in made.items():
            speed = len(tokens) / statistics.median(seconds[way])
            plain = len(made["plain"]) / statistics.median(seconds["plain"])
            drafted, right = sum(t.drafted for t in tokens), sum(t.guessed for t in tokens)
            same = [t.id for t in tokens] == [t.id for t in made["plain"]]
            out[f"{name} {way}"] = row = {
                "tokens_per_second": round(speed, 1), "x_plain": round(speed / plain, 2), "passes": len(tokens) - right,
                "accepted": round(right / drafted, 2) if drafted else None, "same_tokens": same,
            }  # fmt: skip
            print(f"{name:6} {way:7}", row)
    print(json.dumps({"model": args.model, "dtype": args.dtype, "ends": sorted(end_ids(found.tokenizer)), **out}))


if __name__ == "__main__":
    main()
