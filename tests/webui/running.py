"""A run on disk that looks as if it were training: rows, samples, checkpoints, as many as a test wants."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from tests.webui.tiny import save


def line(**row: Any) -> str:
    return json.dumps({"time": round(time.time(), 3), **row}) + "\n"


def learn(run: Path, steps: range, **more: Any) -> None:
    """Rows of training for these steps, as the loop writes them."""
    run.mkdir(parents=True, exist_ok=True)
    with (run / "metrics.jsonl").open("a", encoding="utf-8") as file:
        for step in steps:
            row = {"train/loss": 5.0 / (1 + step / 50), "train/lr": 1e-3, "train/grad_norm": 1.0, "tokens": 64 * step}
            file.write(line(step=step, **row, **{"perf/tok_per_sec": 1000.0}, **more))


def tell(run: Path, **row: Any) -> None:
    with (run / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write(line(**row))


def begin(run: Path, kind: str = "text", steps: int = 200) -> Path:
    """A run with rows up to step 100, two checkpoints, an evaluation and a sample."""
    learn(run, range(10, 110, 10))
    (run / "config.json").write_text(json.dumps({"train": {"steps": steps}, "kind": kind}))
    for step in (50, 100):
        save(run, kind, step=step, seed=step)
        tell(run, step=step, **{"val/loss": 3.0 - step / 100})
        write(run, step, f"Once⏵ upon step {step}\n{'-' * 40}\nTwice⏵ at {step}\n")
    return run


def write(run: Path, step: int, text: str) -> None:
    (run / "samples").mkdir(exist_ok=True)
    (run / "samples" / f"{step:08d}.txt").write_text(text, encoding="utf-8")
