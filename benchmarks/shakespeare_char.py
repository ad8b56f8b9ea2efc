"""nanoGPT's small CPU recipe on a character text, with our step and, where its path is given, with nanoGPT's model.

    python benchmarks/shakespeare_char.py tinyshakespeare.txt [--against NANOGPT] [--steps 2000] [--precision bf16]

4 layers, 4 heads, width 128, 64 characters, batches of 12 random windows, AdamW from 1e-3 to 1e-4. Both see the same
batches in the same order. The loss is the mean over the whole validation split (the last tenth), windows side by side.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from speedrun import evaluate, load, windows

import fnlm
from fnlm.presets import optimizer_of, schedule_of

PRESET = "shakespeare-char-cpu"


def batches(ids: torch.Tensor, cfg: fnlm.ModelConfig, train: fnlm.TrainConfig) -> Iterator[fnlm.Batch]:
    for step in range(train.steps):
        key = fnlm.fold_in(fnlm.key(train.seed), step)
        yield windows(ids, fnlm.random.randint(key, (train.batch_size,), 0, len(ids) - cfg.seq_len), cfg.seq_len)


def ours(ids: torch.Tensor, cfg: fnlm.ModelConfig, train: fnlm.TrainConfig) -> Callable[[torch.Tensor], float]:
    optimizer = optimizer_of(train, cfg)
    plan = fnlm.Plan(precision=train.precision)
    state = fnlm.init_state(fnlm.init_params(cfg, fnlm.key(train.seed)), optimizer, plan)
    step = fnlm.make_step(fnlm.make_lm_loss(cfg), optimizer, plan)
    for batch in batches(ids, cfg, train):
        state, _ = step(state, batch)
    return lambda val: evaluate(state.params, cfg, val, cfg.seq_len)


def theirs(folder: Path, ids: torch.Tensor, cfg: fnlm.ModelConfig, train: fnlm.TrainConfig) -> Callable[..., float]:
    spec = importlib.util.spec_from_file_location("nanogpt_model", folder / "model.py")
    assert spec is not None
    assert spec.loader is not None
    module: Any = importlib.util.module_from_spec(spec)
    sys.modules["nanogpt_model"] = module
    spec.loader.exec_module(module)
    torch.manual_seed(train.seed)
    shape = {"n_layer": cfg.n_layers, "n_head": cfg.n_heads, "n_embd": cfg.d_model, "block_size": cfg.seq_len}
    model = module.GPT(module.GPTConfig(**shape, vocab_size=cfg.vocab_size, bias=False, dropout=0.0))
    optimizer = model.configure_optimizers(train.weight_decay, train.lr, (train.b1, train.b2), "cpu")
    rate = schedule_of(train, train.lr)
    for i, batch in enumerate(batches(ids, cfg, train)):
        for group in optimizer.param_groups:
            group["lr"] = float(rate(i))
        model(batch.tokens, batch.targets.contiguous())[1].backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), train.clip or 1e9)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    @torch.no_grad()
    def loss(val: torch.Tensor) -> float:
        starts = torch.arange(0, len(val) - 1 - cfg.seq_len, cfg.seq_len)
        parts = [windows(val, group, cfg.seq_len) for group in starts.split(64)]
        return sum(float(model(p.tokens, p.targets.contiguous())[1]) * len(p.tokens) for p in parts) / len(starts)

    return loss


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", type=Path)
    parser.add_argument("--against", type=Path)
    parser.add_argument("--steps", type=int, default=fnlm.TRAINING[PRESET].steps)
    parser.add_argument("--precision", default=fnlm.TRAINING[PRESET].precision)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    train_ids, val_ids, vocab = load(args.text)
    cfg = fnlm.override(fnlm.PRESETS[PRESET], vocab_size=vocab)
    warmup = min(fnlm.TRAINING[PRESET].warmup, args.steps)
    train = fnlm.override(fnlm.TRAINING[PRESET], steps=args.steps, precision=args.precision, warmup=warmup)
    field: dict[str, Callable[[], Callable[[torch.Tensor], float]]] = {"fnlm": lambda: ours(train_ids, cfg, train)}
    if args.against:
        field["nanogpt"] = lambda: theirs(args.against, train_ids, cfg, train)
    for name, run in field.items():
        start = time.perf_counter()
        evaluated = run()
        seconds = time.perf_counter() - start
        print(
            json.dumps(
                {"who": name, "val": round(evaluated(val_ids), 4), "steps": args.steps, "seconds": round(seconds, 1)}
            )
        )


if __name__ == "__main__":
    main()
