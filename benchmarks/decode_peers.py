"""Decoding beside transformers and llama.cpp on the same weights, in one interleaved run.

    python benchmarks/decode_peers.py --peers PYTHON --model PATH [--threads 2] [--rounds 5] [--work FOLDER]

PYTHON has torch, transformers, gguf and llama-cpp-python. PATH is what `fnlm import` takes (a GGUF file of SmolLM2,
say; it is exported to the others once, into FOLDER), or `gpt2`, that shape with random weights. Every contestant is a
process of its own that stays; in each round each has its turn, so that what disturbs one disturbs all. Greedy.

    decode   tokens a second after a prompt of 32: 127 / (seconds of 128 tokens - seconds of one)
    first    seconds to the first token after a prompt of 512
    eight    tokens a second, all told, of eight prompts of 7 to 120 with 64 tokens each; ours as `fnlm serve` does
    turns    the same, one after another

Medians over rounds after one that is not counted; ratios; and the share of the measured read bandwidth that the weights
of each token take. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
CONTESTANTS = (
    "fnlm bf16", "fnlm fp32", "fnlm int8", "fnlm int4", "hf bf16", "hf fp32", "llama bf16", "llama q8_0",
)  # fmt: skip
BYTES = {"fp32": 4.0, "bf16": 2.0, "int8": 1.0, "q8_0": 1.0625, "int4": 0.5625}  # of a weight
LENGTHS = (7, 23, 40, 56, 72, 88, 104, 120)


class Contestant:
    """A process that writes when it is told to."""

    def __init__(self, name: str, python: str, model: str, threads: int):
        self.name, (who, kind) = name, name.split()
        command = [python, str(HERE / "decode_worker.py"), who, kind, model, str(threads)]
        env = {**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONPATH": str(HERE.parent)}
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env)
        self.answer()

    def answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.name} ended with {self.process.wait()}")
        return dict(json.loads(line))

    def ask(self, **what: Any) -> float:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(what) + "\n")
        self.process.stdin.flush()
        return float(self.answer()["seconds"])


def prompt(seed: int, n: int) -> list[int]:
    return [(seed * 31 + i * 7) % 250 + 20 for i in range(n)]


def turn(contestant: Contestant, eight: bool) -> dict[str, float]:
    """All figures of one contestant, once."""
    short = [prompt(0, 32)]
    one, many = contestant.ask(prompts=short, tokens=1), contestant.ask(prompts=short, tokens=128)
    found = {"decode": 127 / (many - one), "first": contestant.ask(prompts=[prompt(1, 512)], tokens=1)}
    if eight and not contestant.name.startswith("llama"):
        ragged = [prompt(i, n) for i, n in enumerate(LENGTHS)]
        found["eight"] = 512 / contestant.ask(prompts=ragged, tokens=64)
        found["turns"] = 512 / sum(contestant.ask(prompts=[p], tokens=64) for p in ragged)
    return found


def exported(model: str, peers: str, work: Path) -> dict[str, str]:
    """What each contestant loads."""
    hf, gguf = work / "hf", work / "model.gguf"
    if model == "gpt2":
        if not gguf.exists():
            subprocess.run([peers, str(HERE / "decode_worker.py"), "gpt2-file", "-", str(gguf), "1"], check=True)
        return {"fnlm": "gpt2", "hf": "gpt2", "llama": str(gguf)}
    export = [sys.executable, "-m", "cli", "export", model, "--no-parity", "--out"]
    for out, *options in ((hf, "--dtype", "bf16"), (gguf, "--to", "gguf", "--dtype", "fp32")):
        if not Path(out).exists():
            subprocess.run([*export, str(out), *map(str, options)], check=True, cwd=HERE.parent)
    return {"fnlm": model, "hf": str(hf), "llama": str(gguf)}


def parameters(model: str) -> int:
    import fnlm
    from fnlm import params, trained

    cfg = fnlm.PRESETS[model] if model in fnlm.PRESETS else trained.load(model).cfg
    return params.count(cfg)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "fnlm-peers")
    parser.add_argument("--only", default=",".join(CONTESTANTS), help="contestants, with commas between them")
    args = parser.parse_args()
    work = args.work / Path(args.model).stem
    work.mkdir(parents=True, exist_ok=True)
    paths = exported(args.model, args.peers, work)
    contestants = [
        Contestant(n, sys.executable if n.startswith("fnlm") else args.peers, paths[n.split()[0]], args.threads)
        for n in args.only.split(",")
    ]
    rounds: list[dict[str, dict[str, float]]] = []
    read: list[float] = []
    for _ in range(args.rounds + 1):
        read.append(2**29 / contestants[0].ask(read=2**29) / 1e9)
        rounds.append({c.name: turn(c, c.name not in ("fnlm int4", "hf fp32")) for c in contestants})
        print(".", end="", flush=True, file=sys.stderr)
    table = {
        c.name: {what: statistics.median(r[c.name][what] for r in rounds[1:]) for what in rounds[0][c.name]}
        for c in contestants
    }
    show(table, parameters(args.model), statistics.median(read))


def show(table: dict[str, dict[str, float]], size: int, read: float) -> None:
    print(f"\n{size:,} parameters; read bandwidth {read:.1f} GB/s")
    print(f"{'':12}{'decode':>9}{'of limit':>10}{'first':>9}{'eight':>9}{'turns':>9}")
    for name, row in table.items():
        share = row["decode"] * size * BYTES[name.split()[1]] / read / 1e9
        rest = "".join(f"{row[k]:9.0f}" if k in row else f"{'-':>9}" for k in ("eight", "turns"))
        print(f"{name:12}{row['decode']:9.1f}{share:10.2f}{row['first']:9.3f}{rest}")
    for a, b, what in (
        ("fnlm bf16", "hf bf16", "decode"), ("fnlm bf16", "hf fp32", "decode"), ("fnlm fp32", "hf fp32", "decode"),
        ("fnlm bf16", "llama bf16", "decode"), ("fnlm int8", "llama q8_0", "decode"),
        ("fnlm bf16", "hf bf16", "eight"), ("fnlm bf16", "hf bf16", "first"), ("fnlm bf16", "llama bf16", "first"),
    ):  # fmt: skip
        if a in table and b in table:
            print(f"{what:7} {a} / {b}: {table[a][what] / table[b][what]:.2f}")
    if "eight" in table.get("fnlm bf16", {}):
        print(f"eight at once / in turn: {table['fnlm bf16']['eight'] / table['fnlm bf16']['turns']:.2f}")
    print(json.dumps({"parameters": size, "read": round(read, 1), **table}))


if __name__ == "__main__":
    main()
