"""What happens between two steps: watched, logged, saved, evaluated, sampled, stopped.

What a step learns is decided elsewhere (`fnlm.step`, `fnlm.optim`). All that the next step depends on is in the
checkpoint: the state, the settings, and what the guard remembers. A killed run goes on as if it had not been.
"""

from __future__ import annotations

import math
from collections.abc import Generator
from contextlib import closing
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from fnlm import checkpoint, data, random
from fnlm.data import Sizes
from fnlm.evaluate import Evaluation
from fnlm.loop import folder as files
from fnlm.loop.guard import Guard
from fnlm.loop.health import health
from fnlm.loop.job import Begin, Outcome, Reason, averaged, keys_of
from fnlm.loop.keeping import AnySaver, Keeper
from fnlm.loop.ledger import Ledger
from fnlm.loop.samples import PARTED, Sampler
from fnlm.loop.signals import Stop
from fnlm.loop.team import Alone
from fnlm.track import JsonLines, Progress, Tracker
from fnlm.types import Batch, Params

SHOWN = 160  # characters of a sample on the terminal


def due(step: int, every: int | None) -> bool:
    """Whether a count of steps is a multiple of `every`; 0 and None: never."""
    return bool(every) and step > 0 and step % (every or 1) == 0


def pieces(batch: Batch, rows: int, device: torch.device) -> list[Batch]:
    """A step's batch on its device, in micro-batches of at most `rows` rows."""
    parts = zip(*(x.to(device, non_blocking=True).split(rows) for x in batch), strict=True)
    return [Batch(*part) for part in parts]


class Session:
    """One call of `fit`: the state, and what is remembered around it."""

    def __init__(
        self,
        team: Alone,
        begin: Begin,
        saver: AnySaver,
        stop: Stop,
        tracker: Tracker,
        progress: Progress,
    ) -> None:
        job = team.job
        self.team, self.job, self.state, self.saver, self.stop = team, job, begin.state, saver, team.stopping(stop)
        self.tracker, self.progress = tracker, progress
        self.take = team.step(self._judge)
        self.sizes = Sizes(job.train.ramp, job.train.batch_size * job.train.micro_batches)
        _, self.order, _, self.sample_key = keys_of(job.train)
        self.guard, self.ledger = Guard(job.run.guard_z), Ledger(job, begin.notes, team.world)
        self.clock = self.ledger.clock
        self.sampler = Sampler(job.cfg, job.run, job.dataset, job.folder / files.SAMPLES)
        self.refused: str | None = None
        self.watched: tuple[dict[str, Tensor], Params] | None = None
        self.val: Evaluation | None = None
        self.keeper = Keeper(job, saver, lambda message: self._event("save failed", message))
        self._remember(begin.notes)
        self.began = perf_counter() - float(begin.notes.get("seconds", 0.0))

    def _remember(self, notes: dict[str, Any]) -> None:
        """Take over what a checkpoint notes beside the state."""
        self.guard.restore(notes.get("guard", {}))
        self.in_a_row, self.worse = int(notes.get("in_a_row", 0)), int(notes.get("worse", 0))
        self.rollbacks, self.best = int(notes.get("rollbacks", 0)), notes.get("best")

    def _notes(self) -> dict[str, Any]:
        """What goes into a checkpoint beside the state."""
        own = {name: getattr(self, name) for name in ("in_a_row", "worse", "rollbacks", "best")}
        told = {"guard": self.guard.state(), "tokens": self.tokens, "seconds": perf_counter() - self.began}
        return {**own, **self.ledger.notes(), **told, "val_loss": self.val.loss if self.val else None}

    @property
    def step(self) -> int:
        return int(self.state.step)

    @property
    def last(self) -> int:
        """The step to end after."""
        return self.job.train.steps if self.job.until is None else min(self.job.until, self.job.train.steps)

    @property
    def tokens(self) -> int:
        """Those seen since the beginning."""
        return self.sizes.first(self.step) * self.job.cfg.seq_len

    def run(self) -> Outcome:
        """All steps that are left, and how it ended."""
        if self.job.resume is not None:
            self._event("resumed", f"resumed from {self.job.resume}")
            if ended := self._catch_up():
                return ended
        elif self.job.params is not None:
            self._before()
        with closing(self._batches()) as batches:
            self.clock.paused()
            for batch in batches:
                self.clock.waited()
                if ended := self._once(batch):
                    return ended
        return self._pause(last=True) or self._end("finished")

    def _batches(self) -> Generator[Batch, None, None]:
        job = self.job
        return data.batches(job.dataset.train, job.cfg.seq_len, self.sizes, self.order, self.step, self.last)

    def _once(self, batch: Batch) -> Outcome | None:
        """A step and what follows it."""
        parts = pieces(batch, self.job.train.batch_size, self.job.device)
        self.refused = None
        self.state, metrics = self.take(self.state, parts if len(parts) > 1 else parts[0])
        self.clock.stepped(batch.tokens.numel())
        self.progress.advance(self.step)
        self.ledger.count(metrics, bool(self.refused))
        self.in_a_row = self.in_a_row + 1 if self.refused else 0
        ended = self._after_refusal() if self.refused else None
        if due(self.step, self.job.run.log_every) or self.step == 1:
            self._log()
        if self.watched:
            grads, before = self.watched
            self._row(health(grads, before, self.state.params, self.team.norms))
            self.watched = None
        if ended is None and self.stop():
            ended = self._stopped()
        return ended or (self._pause() if self.step < self.last else None)

    def _judge(self, value: Tensor, norm: Tensor, grads: Params, params: Params) -> bool:
        """Between gradients and optimizer: whether to take the step (`fnlm.step.Judge`)."""
        if due(self.step, self.job.run.health_every) or (self.job.run.health_every and self.step == 0):
            self.watched = self.team.norms(grads), {name: p.clone() for name, p in params.items()}
        if self.job.run.guard != "off":
            self.refused = self.guard.reason(*self.team.agreed(value, norm))
        return self.refused is None

    def _after_refusal(self) -> Outcome | None:
        """What the guard was told to do about the step just refused, with the samples to blame in the log."""
        run, bad = self.job.run, self.step - 1
        numbers = data.sample_ids(self.job.dataset.train, self.job.cfg.seq_len, self.sizes, self.order, bad).tolist()
        starts = data.window_starts(self.job.dataset.train, self.job.cfg.seq_len, self.sizes, self.order, bad).tolist()
        message = f"step {bad}: {self.refused}; its update was left out"
        self._event("spike", message, batch=bad, samples=numbers, first_tokens=starts)
        if run.guard == "stop":
            return self._end("not finite", f"{message}, and guard=stop ends the run; --resume goes on behind it")
        if self.in_a_row > run.guard_limit:
            return self._end(
                "not finite", f"{self.in_a_row} updates in a row were left out, the last as {self.refused}"
            )
        return self._roll_back(bad) if run.guard == "rollback" else None

    def _roll_back(self, bad: int) -> Outcome | None:
        """To the last checkpoint, and past all batches up to the bad one (Chowdhery et al. 2022, §5.1)."""
        self.saver.wait()
        share = (0, 1) if self.team.world == 1 else (0, 0)  # ranks read its bytes together, in `restore`
        path = checkpoint.newest_good(self.saver.folder, before=bad + 1, share=share)
        if path is None:
            return self._end("not finite", f"step {bad}: {self.refused}, and there is no checkpoint to go back to")
        if self.rollbacks >= self.job.run.guard_limit:
            return self._end("not finite", f"step {bad}: {self.refused}, after {self.rollbacks} rollbacks")
        rollbacks, skipped = self.rollbacks + 1, self.ledger.skipped
        state, notes = self.team.restore(path, self.state)
        self._remember(notes)
        self.ledger.remember(notes)
        self.rollbacks, self.ledger.skipped = rollbacks, skipped
        self.ledger.unmade += bad + 1 - int(state.step)
        self._event("rollback", f"back to step {int(state.step)}; batches {int(state.step)} to {bad} are passed over")
        self.state = state._replace(step=torch.tensor(bad + 1))
        return None

    def _pause(self, last: bool = False) -> Outcome | None:
        """Save, evaluate and sample, where it is time; an evaluation comes after a save, which it can mark as best."""
        run, n = self.job.run, self.step
        evaluating = last or due(n, run.eval_every)
        if evaluating or due(n, run.save_every):
            self._save(last)
        if due(n, run.snapshot_every):
            self.keeper.snapshot(self.state, self._notes())
        ended = self._evaluate() if evaluating else None
        if ended is None and (last or due(n, run.sample_every)):
            self._sample()
        self.clock.paused()
        return ended

    def _save(self, last: bool = False) -> None:
        self.keeper.save(self.state, self._notes(), last)

    def _catch_up(self) -> Outcome | None:
        """The evaluation of the step that was resumed at: it comes after the save, and may be missing."""
        if self.step >= self.last:
            return None
        rows = JsonLines.read(self.job.folder / files.METRICS) if self.team.lead else []
        known = [row["val/loss"] for row in rows if row.get("step") == self.step and row.get("val/loss") is not None]
        loss = self.team.said(known[-1] if known else None)
        if loss is not None:
            return self._compare(loss)
        return self._evaluate() if due(self.step, self.job.run.eval_every) else None

    def _before(self) -> None:
        """The validation loss and samples of the model that training starts from; a signal is seen to after a step."""
        val = self.team.evaluate(averaged(self.state), self.stop)
        if val.complete:
            self._row({"val/loss": val.loss, "val/ppl": val.perplexity, "val/bpb": val.bits_per_byte})
            self._sample()

    def _evaluate(self) -> Outcome | None:
        """Measure the validation loss; note the best; end where patience is over, or a signal came."""
        val = self.team.evaluate(averaged(self.state), self.stop)
        if not val.complete:
            return self._stopped()
        self.val = val
        self._row({"val/loss": val.loss, "val/ppl": val.perplexity, "val/bpb": val.bits_per_byte})
        return self._compare(val.loss)

    def _compare(self, loss: float) -> Outcome | None:
        better = math.isfinite(loss) and (self.best is None or loss < self.best)
        if better:
            self.best, self.worse = loss, 0
            self.keeper.mark_best()
        else:
            self.worse += 1
        patience = self.job.run.patience
        if patience is not None and self.worse >= patience:
            return self._end("early stop", f"{self.worse} evaluations without a better one than {self.best:.4f}")
        return None

    def _sample(self) -> None:
        params = self.team.whole(averaged(self.state))
        if params is None:
            return
        try:
            text = self.sampler.write(params, random.fold_in(self.sample_key, self.step), self.step)
        except ValueError as error:
            return self._event("sample failed", f"no sample: {error}")
        if text and not self.progress.quiet:
            self.progress.say("sample: " + " ".join(text.partition(PARTED)[0].split())[:SHOWN])

    def _stopped(self) -> Outcome:
        return self._end("signal", "interrupted")

    def _end(self, reason: Reason, message: str = "") -> Outcome:
        """Save what is not saved yet, and say how it ended."""
        self._save(last=True)
        self.saver.wait()
        if not self.ledger.empty:
            self._log()
        if reason == "finished":
            self._event("finished", f"finished after {self.step} steps")
        else:
            self._event("stopped", f"stopped: {message or reason}")
        saved, seconds = self.keeper.saved, perf_counter() - self.began
        assert saved is not None
        return Outcome(
            self.step, reason, saved, self.ledger.loss, self.val, self.best, seconds, self.stop.signal, message
        )

    def _log(self) -> None:
        """The training row of the steps since the last one."""
        row = self.ledger.row(self.step, self.sizes.at(self.step - 1), self.tokens)
        if row["mem/peak_bytes"] is not None:
            row["mem/peak_bytes"] = int(self.team.most(row["mem/peak_bytes"]))
        self._row(row)

    def _row(self, row: dict[str, Any]) -> None:
        self.tracker.log({"step": self.step, **row})

    def _event(self, event: str, message: str, **more: Any) -> None:
        self._row({"event": event, "message": message, **more})
