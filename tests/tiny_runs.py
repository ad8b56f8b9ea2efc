"""A corpus, data folders and runs small enough for tests; used by the tests of the loop and of the command line."""

from __future__ import annotations

import io
import os
import signal
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fnlm import data, loop
from fnlm.config import Compute, ModelConfig, TrainConfig
from fnlm.data import Dataset, Preparation
from fnlm.loop import Job, Outcome, RunConfig
from fnlm.loop.signals import Stop
from fnlm.track import JsonLines, Many, Progress

TEXT = "".join(
    f"{a} and {b} went to {c}. " for a in ("Mia", "Tom", "Eva") for b in ("Leo", "Ida") for c in ("bed", "sea")
)


def corpus(folder: Path, text: str = TEXT * 12, tokenizer: str = "char") -> Dataset:
    """Prepared data of a text; the same text again is validated with."""
    (folder / "a.txt").write_text(text, encoding="utf-8")
    (folder / "b.txt").write_text(text[: len(text) // 2], encoding="utf-8")
    paths = (str(folder / "a.txt"),), folder / "data", tokenizer, (str(folder / "b.txt"),)
    data.prepare(Preparation(*paths))
    return data.open(folder / "data")


def model(dataset: Dataset, **more: Any) -> ModelConfig:
    sizes = {"n_layers": 2, "n_heads": 2, "d_model": 16, "seq_len": 16, "positions": "rope"}
    return ModelConfig(**{"vocab_size": dataset.manifest["vocab_size"], **sizes, **more})


def training(**more: Any) -> TrainConfig:
    return TrainConfig(**{"steps": 12, "batch_size": 4, "lr": 1e-2, "precision": "fp32", **more})


def job(
    dataset: Dataset, folder: Path, train: TrainConfig | None = None, cfg: ModelConfig | None = None, **more: Any
) -> Job:
    """A run in `folder/run`; what is not a field of Job is one of RunConfig."""
    own = {name: more.pop(name) for name in ("params", "resume", "compute") if name in more}
    rest = {"eval_every": 4, "save_every": 4, "log_every": 1, "health_every": 0, "sample_every": 0, "sample_tokens": 4}
    run, cfg, train = RunConfig(**{**rest, **more}), cfg or model(dataset), train or training()
    compute = own.pop("compute", Compute())
    config = loop.described((cfg, train, run, compute), data=str(dataset.folder), kind="text")
    (folder / "run" / "samples").mkdir(parents=True, exist_ok=True)
    return Job(
        cfg=cfg, train=train, run=run, compute=compute, dataset=dataset, folder=folder / "run", config=config, **own
    )


def fit(job: Job, trackers: Sequence[Any] = ()) -> Outcome:
    """`loop.fit`, silent."""
    with Progress(job.train.steps, quiet=True, stream=io.StringIO()) as progress:
        return loop.fit(job, Many(trackers), progress)


def fit_until(job: Job, step: int) -> Path:
    """The checkpoint of a run that SIGTERM stops as soon as `step` is saved."""
    stopped = fit(job, [Signal("step", step)])
    assert (stopped.step, stopped.reason) == (step, "signal")
    return stopped.checkpoint


class Signal:
    """A tracker that sends this process SIGTERM when it is told of a step, and waits until the run has heard of it.

    The main thread hears of signals, and ranks that are other threads would go on meanwhile.
    """

    def __init__(self, key: str, value: object) -> None:
        self._key, self._value, self._sent = key, value, False

    def log(self, row: Mapping[str, Any]) -> None:
        if row.get(self._key) == self._value and not self._sent:
            self._sent = True
            stop = getattr(signal.getsignal(signal.SIGTERM), "__self__", None)
            os.kill(os.getpid(), signal.SIGTERM)
            while isinstance(stop, Stop) and stop.signal is None:
                time.sleep(0.001)

    def close(self) -> None:
        """Nothing to close."""


def rows(job: Job, *keys: str) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl that have all these keys."""
    return [row for row in JsonLines.read(job.folder / "metrics.jsonl") if all(k in row for k in keys)]


def state_of(path: Path) -> dict[str, Any]:
    """Every tensor of a checkpoint by name, whole, whoever wrote it."""
    from fnlm import checkpoint
    from fnlm.checkpoint.pieces import Pieces

    return Pieces(path, checkpoint.describe(path)).whole()


__all__ = ["Signal", "corpus", "fit", "fit_until", "job", "model", "rows", "state_of", "training"]
