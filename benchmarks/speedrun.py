"""The lowest loss on a character text within a budget of seconds, from process start to the last step.

    python benchmarks/speedrun.py tinyshakespeare.txt --seconds 65 [--seed 0] [field=value ...]

The first 90 % of the characters train, the rest validate: the loss is the mean over the whole validation split in
nats per character, in windows of seq_len side by side, no context carried over ("val"), and in windows that overlap by
half, of which only the second half counts ("sliding"). The schedule follows the clock, so a run ends within its budget
on any machine; `--steps` follows the step count instead, for comparing recipes on a busy machine.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path


def process_start() -> float:
    """When this process began, on the clock of time.perf_counter: the interpreter and imports count too (Linux)."""
    ticks = int(Path("/proc/self/stat").read_text().rsplit(")", 1)[1].split()[19])
    uptime = float(Path("/proc/uptime").read_text().split()[0])
    return time.perf_counter() - (uptime - ticks / os.sysconf("SC_CLK_TCK"))


START = process_start()

import torch  # noqa: E402  (the clock starts first)

import fnlm  # noqa: E402
from fnlm import optim  # noqa: E402


def load(path: Path) -> tuple[torch.Tensor, torch.Tensor, int]:
    """(train ids, validation ids, vocabulary size) of a text, characters in sorted order."""
    text = path.read_text(encoding="utf-8")
    index = {c: i for i, c in enumerate(sorted(set(text)))}
    ids = torch.tensor([index[c] for c in text])
    cut = len(ids) * 9 // 10
    return ids[:cut], ids[cut:], len(index)


def windows(ids: torch.Tensor, starts: torch.Tensor, t: int) -> fnlm.Batch:
    rows = ids[starts[:, None] + torch.arange(t + 1)]
    return fnlm.Batch(rows[:, :-1], rows[:, 1:], torch.ones(len(starts), t))


@torch.no_grad()
def evaluate(params: fnlm.Params, cfg: fnlm.ModelConfig, ids: torch.Tensor, stride: int) -> float:
    """Mean loss over every predicted position of `ids`, each exactly once."""
    t, n, total = cfg.seq_len, len(ids) - 1, 0.0
    live = {k: v.to(torch.bfloat16) for k, v in params.items()}
    done = 0
    starts = list(range(0, n - t, stride))
    for group in (starts[i : i + 64] for i in range(0, len(starts), 64)):
        batch = windows(ids, torch.tensor(group), t)
        fresh = torch.tensor([[s + j >= (0 if s == 0 else s + t - stride) for j in range(t)] for s in group])
        total += float(fnlm.lm_loss(live, batch._replace(weights=fresh.float()), cfg)) * int(fresh.sum())
        done += int(fresh.sum())
    last = windows(ids, torch.tensor([n - t]), t)
    rest = torch.arange(t)[None] >= t - (n - done)
    total += float(fnlm.lm_loss(live, last._replace(weights=rest.float()), cfg)) * int(rest.sum())
    assert done + int(rest.sum()) == n
    return total / n


def shape(f: float, train: fnlm.TrainConfig) -> float:
    """The learning rate's share of its peak at fraction f of the run: warm-up, plateau, straight to zero."""
    warm, cool = train.warmup / train.steps, (train.decay_steps or train.steps // 5) / train.steps
    return min(1.0, (f + 1e-4) / max(warm, 1e-9), (1 - f) / cool)


def recipe(train: fnlm.TrainConfig) -> fnlm.Transform:
    """Muon for the matrices inside blocks, AdamW for embeddings and head; one pace, set from the clock, for both."""
    muon = optim.scale_by_muon(steps=train.muon_steps, coefficients="polar", adjust="none")
    adam = optim.scale_by_adam(train.b1, train.b2)
    decay = optim.add_decayed_weights
    return optim.chain(
        parts=optim.partition(
            lambda name: "matrices" if fnlm.is_hidden_matrix(name) else "tables",
            matrices=optim.chain(muon=muon, decay=decay(train.weight_decay), rate=optim.scale(train.muon_lr)),
            tables=optim.chain(
                clip=optim.clip_by_global_norm(1.0),
                adam=adam,
                decay=decay(train.muon_table_decay),
                rate=optim.scale(train.lr),
            ),
        ),
        pace=optim.scale_by_value(0.0),
    )


def main() -> None:
    args = parse()
    torch.set_num_threads(args.threads)
    fnlm.tune_cpu()
    train_ids, val_ids, vocab = load(args.text)
    cfg = fnlm.override(fnlm.PRESETS[args.preset], vocab_size=vocab, **dict(pair(x) for x in args.fields))
    train = fnlm.override(fnlm.TRAINING[args.preset], **dict(pair(x) for x in args.train))
    optimizer = recipe(train)
    key = fnlm.key(args.seed)
    plan = fnlm.Plan(precision=train.precision)
    state = fnlm.init_state(fnlm.init_params(cfg, fnlm.fold_in(key, 0)), optimizer, plan, fnlm.fold_in(key, 1))
    step = fnlm.make_step(fnlm.make_lm_loss(cfg), optimizer, plan)

    per_epoch = (len(train_ids) - 1) // cfg.seq_len - 1
    began = previous = time.perf_counter()
    order, longest, done = torch.empty(0, dtype=torch.long), 0.0, 0
    while True:
        now = time.perf_counter()
        longest = max(longest * 0.9, now - previous)
        elapsed = done / args.steps if args.steps else (now - START + longest) / args.seconds
        if elapsed >= 1:
            break
        previous = now
        if len(order) < train.batch_size:
            epoch = fnlm.fold_in(key, 2 + done)
            shift = int(fnlm.random.randint(epoch, (1,), 0, cfg.seq_len))
            order = fnlm.random.permutation(epoch, per_epoch) * cfg.seq_len + shift
        starts, order = order[: train.batch_size], order[train.batch_size :]
        f = elapsed if args.steps else (now - START) / args.seconds
        state = state._replace(opt_state=optim.with_value(state.opt_state, "pace/value", shape(f, train)))
        state, _ = step(state, windows(train_ids, starts, cfg.seq_len))
        done += 1
    wall = time.perf_counter() - START
    seconds = wall - (began - START)
    result = {
        "preset": args.preset, "seed": args.seed,
        "val": round(evaluate(state.params, cfg, val_ids, cfg.seq_len), 4),
        "sliding": round(evaluate(state.params, cfg, val_ids, cfg.seq_len // 2), 4),
        "wall_s": round(wall, 2), "steps": done, "ms_per_step": round(seconds / max(done, 1) * 1e3, 1),
        "epochs": round(done * train.batch_size * cfg.seq_len / len(train_ids), 2), "parameters": fnlm.count(cfg),
    }  # fmt: skip
    print(json.dumps(result))


def pair(text: str) -> tuple[str, object]:
    name, _, value = text.partition("=")
    return name, json.loads(value) if name != "ngrams" else tuple(tuple(x) for x in json.loads(value))


def parse() -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("text", type=Path)
    p.add_argument("fields", nargs="*", help="model fields, JSON values")
    p.add_argument("--train", action="append", default=[], help="training field=value, JSON value")
    p.add_argument("--seconds", type=float, default=65.0)
    p.add_argument("--steps", type=int, default=0)
    p.add_argument("--preset", default="shakespeare-speedrun")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--threads", type=int, default=2)
    return p.parse_intermixed_args()


if __name__ == "__main__":
    main()
