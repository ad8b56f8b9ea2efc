"""The figures of the steps since the last row of the log."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from fnlm.environment import peak_bytes, peak_flops
from fnlm.loop.clock import Clock
from fnlm.loop.job import Job
from fnlm.params import flops_per_token
from fnlm.presets import schedule_of
from fnlm.step import Metrics


class Ledger:
    """Takes each step's metrics; `row` sums them up and begins anew. `notes` and `remember` carry it over a resume.

    `unmade` counts the steps without an update: the schedule goes by updates. `loss` is the mean of the last row.
    """

    def __init__(self, job: Job, notes: dict[str, Any], ranks: int = 1) -> None:
        self.clock = Clock()
        self._job, self._rate = job, schedule_of(job.train, job.train.lr)
        peak = peak_flops(job.device, job.train.precision)
        self._peak = peak and peak * ranks
        self._losses: list[Tensor] = []
        self._clipped, self._norm = 0, torch.tensor(math.nan)
        self.remember(notes)

    def remember(self, notes: dict[str, Any]) -> None:
        """Take over what a checkpoint notes."""
        self.skipped, self.unmade = int(notes.get("left_out", 0)), int(notes.get("unmade", 0))
        self.loss = math.nan if notes.get("loss") is None else float(notes["loss"])

    def notes(self) -> dict[str, Any]:
        return {"left_out": self.skipped, "unmade": self.unmade, "loss": self.loss}

    def count(self, metrics: Metrics, refused: bool) -> None:
        """A step: its metrics, and whether the guard refused it."""
        made, clip = not int(metrics["train/skipped"]), self._job.train.clip
        self._norm = metrics.get("train/grad_norm", self._norm)
        self._clipped += made and clip is not None and bool(self._norm > clip)
        self.skipped += not made
        self.unmade += not made
        if not refused:
            self._losses.append(metrics["train/loss"])

    @property
    def empty(self) -> bool:
        """Whether no step came since the last row."""
        return not self._losses

    def row(self, step: int, batch_size: int, tokens: int) -> dict[str, Any]:
        """The training row after `step` steps and `tokens` tokens."""
        times, steps = self.clock.read(), max(1, len(self._losses))
        if self._losses:
            self.loss = float(torch.stack(self._losses).double().mean())
        flops = times.tokens_per_second * flops_per_token(self._job.cfg)
        row = {
            "tokens": tokens,
            "train/loss": self.loss,
            "train/lr": float(self._rate(max(0, step - 1 - self.unmade))),
            "train/grad_norm": float(self._norm),
            "train/clip_frac": None if self._job.train.clip is None else self._clipped / steps,
            "train/skipped": self.skipped,
            "train/batch_size": batch_size,
            "perf/tok_per_sec": times.tokens_per_second,
            "perf/step_ms": 1e3 * times.step,
            "perf/data_frac": times.data_share,
            "perf/mfu": flops / self._peak if self._peak else None,
            "mem/peak_bytes": peak_bytes(self._job.device),
        }
        self._losses, self._clipped = [], 0
        return row
