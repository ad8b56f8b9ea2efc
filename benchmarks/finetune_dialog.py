"""The ryan-12m shape, pretrained on texts for a while, then finetuned on dialogues: validation loss before and after.

    python benchmarks/finetune_dialog.py TEXT [TEXT ...] --dialogues TRAIN.txt --validation VAL.txt [--folder F]
           [--vocab 8000] [--steps 400] [--tune-steps 200] [--batch 16] [--length 256] [--device auto]

Five commands of fnlm's, which go on where they were when the same line is given again: a BPE and the texts, the
pretraining, the dialogues, full finetuning and adapters of rank 8, each with its curve. Both see the same batches.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path


def fnlm(*words: str | Path) -> None:
    """A command of fnlm's, as a process."""
    print("fnlm", *words, flush=True)
    subprocess.run([sys.executable, "-m", "cli", *map(str, words)], check=True)


def curve(run: Path) -> dict[int, float]:
    """The validation losses of a run by step."""
    rows = map(json.loads, (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    return {row["step"]: row["val/loss"] for row in rows if row.get("val/loss") is not None}


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("texts", nargs="+", type=Path)
    p.add_argument("--dialogues", type=Path, required=True)
    p.add_argument("--validation", type=Path, required=True)
    p.add_argument("--folder", type=Path, default=Path("runs/dialog"))
    p.add_argument("--vocab", type=int, default=8000)
    p.add_argument("--steps", type=int, default=400)
    p.add_argument("--tune-steps", type=int, default=200)
    p.add_argument("--batch", type=int, default=16)
    p.add_argument("--length", type=int, default=256)
    p.add_argument("--device", default="auto")
    args = p.parse_args()
    at, device, size = args.folder, f"device={args.device}", f"batch_size={args.batch}"
    texts, chats, base = at / "texts", at / "dialogues", at / "base"
    if not (texts / "manifest.json").is_file():
        fnlm("prepare", *args.texts, "--tokenizer", f"bpe:{args.vocab}", "--out", texts)
    if not (chats / "manifest.json").is_file():
        fnlm("prepare", args.dialogues, "--val", args.validation, "--tokenizer", texts, "--out", chats)
    common = (f"length={args.length}", size, "micro_batches=1", device, "--resume", "--quiet")
    fnlm("train", "ryan-12m", texts, "--out", base, f"steps={args.steps}", "warmup=40", *common)
    runs = {"full": ("lr=1e-4",), "lora=8": ("lora=8", "lr=1e-3")}
    curves = {"pretraining": curve(base)}
    for name, words in runs.items():
        out = at / name.replace("=", "-")
        steps = (f"steps={args.tune_steps}", "warmup=20", "min_lr=0", f"eval_every={max(1, args.tune_steps // 5)}")
        fnlm("finetune", base, chats, "--out", out, *steps, *words, *common)
        curves[name] = curve(out)
    for name, losses in curves.items():
        print(f"{name:12}", "  ".join(f"{step}: {loss:.3f}" for step, loss in losses.items()))
    print(json.dumps(curves))


if __name__ == "__main__":
    main()
