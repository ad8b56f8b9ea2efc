"""The engine: one thread that owns the models and writes all replies together, a token of each at a time.

Others only `submit` jobs and read the events of the ticket they get. Between any two tokens replies may come and go;
the prompt of one that comes is read in pieces, between the tokens of the others.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from collections.abc import Sequence

import torch

from fnlm.checkpoint import CheckpointError
from fnlm.generate import Generation
from fnlm.machine import route_fp32_to_onednn
from webui.batch import ROWS, Batch
from webui.guesses import Drafting
from webui.jobs import Busy, Event, Failure, Job, Refused, Reply, Start, Stopped, Ticket, read
from webui.metrics import Metrics
from webui.models import Loaded, Models, Reader
from webui.stage import BROKE_OFF, MakeBatch, Stage

__all__ = ["Busy", "Engine", "Event", "Failure", "Job", "Refused", "Start", "Stopped", "Ticket"]

STOPPING = Failure("the server is stopping")
MOST_KEPT = 2  # models without a reply whose caches stay for the next turn of a conversation
log = logging.getLogger(__name__)


class Engine:
    """Writes at most `streams` replies at once, and lets at most `waiting` more (default: as many) wait for a place.

    `draft`: how replies are speculated, each by itself. `most_tokens`: of a reply that slides past its context.
    """

    def __init__(
        self,
        models: Models,
        streams: int = 32,
        waiting: int | None = None,
        batch: MakeBatch = Batch,
        draft: Drafting | None = None,
        most_tokens: int | None = None,
    ):
        self.models, self.streams, self.most_tokens = models, streams, most_tokens
        self.most_waiting = streams if waiting is None else waiting
        self.metrics = Metrics()
        self._make, self._draft, self._threads = batch, draft, torch.get_num_threads()
        self._products = torch.backends.mkldnn.matmul.fp32_precision  # type: ignore[attr-defined]
        self._tuned: bool | None = None
        self._change = threading.Condition()
        self._waiting: list[Reply] = []
        self._active: list[Reply] = []
        self._stages: list[Stage] = []
        self._loads: dict[str, threading.Thread] = {}
        self._stop_at: float | None = None
        self._pace = 2.0  # seconds a reply takes, of late
        self.ready = threading.Event()  # set while no model is being loaded ahead
        self.ready.set()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> Engine:
        self._thread.start()
        return self

    def warm(self, name: str) -> None:
        """Load a model before anyone asks for it."""
        self.ready.clear()
        self._load(name)

    def submit(self, jobs: Sequence[Job]) -> Ticket:
        """Take the jobs on, once their prompts are read. Raises Refused for a job that cannot be done, Busy when the
        queue has no room for all of them, Stopped after `stop`."""
        ticket = Ticket()
        self._room(0)  # before long prompts are read for nothing
        replies = [read(job, self._reader(job.model), ticket, i, self.most_tokens) for i, job in enumerate(jobs)]
        with self._change:
            self._room(len(replies))
            self._waiting.extend(replies)
            self._change.notify_all()
        return ticket

    def stop(self, timeout: float = 5.0, grace: float = 0.0) -> None:
        """Take nothing more on, let replies be written for `grace` seconds, then end them with a reason, and the
        thread, for which this waits `timeout` seconds more."""
        with self._change:
            self._stop_at = min(self._stop_at or float("inf"), time.monotonic() + grace)
            self._change.notify_all()
        if self._thread.is_alive() and threading.current_thread() is not self._thread:
            self._thread.join(grace + timeout if timeout else 0)

    def load(self) -> dict[str, int]:
        """How many replies are being written, and how many wait."""
        with self._change:
            return {"active": len(self._active), "waiting": len(self._waiting)}

    def _room(self, n: int) -> None:
        """Raise where there is none for n more."""
        with self._change:
            if self._stop_at is not None:
                raise Stopped(STOPPING.message)
            free = self.streams + self.most_waiting - len(self._active) - len(self._waiting)
            if n > free or free == 0:
                raise Busy(max(1, round(self._pace * max(1, len(self._waiting)) / self.streams)))

    def _reader(self, name: str) -> Reader:
        try:
            return self.models.reader(name)
        except KeyError:
            raise Refused(_no_model(name)) from None
        except (CheckpointError, OSError):
            log.exception("%s cannot be read", name)
            raise Refused(_unreadable(name)) from None

    def _run(self) -> None:
        while self._wait():
            try:
                self._admit()
            except Exception:  # a reply that cannot even begin must not take the engine with it
                log.exception("%d replies that waited could not begin", len(self._waiting))
                for reply in list(self._waiting):
                    self._drop(reply, BROKE_OFF)
            for stage in list(self._stages):
                if stage.busy:
                    self._tune(stage.small)
                    stage.step()
        for stage in self._stages:
            stage.end(STOPPING)
        with self._change:
            left, self._waiting = self._waiting, []
        for reply in left:
            reply.say("error", STOPPING)

    def _tune(self, small: bool) -> None:
        """One thread and MKL for a small model; all threads, and oneDNN where it is faster, for others."""
        if small is self._tuned:
            return
        self._tuned = small
        torch.set_num_threads(1 if small else self._threads)
        if small or self.models.device != "cpu" or not route_fp32_to_onednn():
            torch.backends.mkldnn.matmul.fp32_precision = self._products  # type: ignore[attr-defined]

    def _wait(self) -> bool:
        """Until there is work; False: stop."""
        with self._change:
            while self._stop_at is None and not self._active and not self._can_begin():
                self._change.wait(0.05 if self._waiting else None)
            if self._stop_at is None:
                return True
            return bool(self._active) and time.monotonic() < self._stop_at

    def _can_begin(self) -> bool:
        """Whether one waits for something else than its model."""
        return any(r.ticket.is_cancelled() or r.job.model not in self._loads for r in self._waiting)

    def _admit(self) -> None:
        """Forget who left while waiting; give places to the rest, first to those who have fewest, then by order."""
        with self._change:
            left = [r for r in self._waiting if r.ticket.is_cancelled()]
            self._waiting = [r for r in self._waiting if not r.ticket.is_cancelled()]
            waiting = list(self._waiting) if self._stop_at is None else []
            if self._stop_at is not None:
                stopped, self._waiting = self._waiting, []
        for reply in left:
            self._ended(reply, Generation("", [], "cancelled", len(reply.ids)))
        if self._stop_at is not None:
            for reply in stopped:
                reply.say("error", STOPPING)
        while waiting and len(self._active) < self.streams:
            held = Counter(id(r.ticket) for r in self._active)
            reply = min(waiting, key=lambda r: held[id(r.ticket)])
            waiting.remove(reply)
            self._begin(reply)

    def _begin(self, reply: Reply) -> None:
        """Give a reply its place, if its model is there; else see that it comes."""
        name = reply.job.model
        if name in self._loads:
            return
        try:
            model = self.models.ready(name)
        except KeyError:
            return self._drop(reply, _no_model(name))
        except (CheckpointError, OSError):
            log.exception("%s cannot be loaded", name)
            return self._drop(reply, _unreadable(name))
        if model is None:
            self._load(name)
            return
        with self._change:
            if reply not in self._waiting:
                return  # its model could not be loaded meanwhile
            self._waiting.remove(reply)
            self._active.append(reply)
        try:
            stage = self._stage(model)
        except Exception:  # no memory for its cache, say
            log.exception("%s has no place to be written in", name)
            return self._ended(reply, BROKE_OFF)
        stage.join(reply)

    def _stage(self, model: Loaded) -> Stage:
        """Where this model's replies are written; those of models that nobody uses any more are given up."""
        found = [stage for stage in self._stages if stage.model is model]
        idle = [s for s in self._stages if not s.busy and s.model is not model]
        kept = [s for s in idle if self.models.holds(s.model)][-MOST_KEPT:]
        self._stages = [s for s in self._stages if s.busy or s in kept]
        rows = min(ROWS, self.streams)
        stage = found[0] if found else self._new_stage(model, rows)
        self._stages = [*(s for s in self._stages if s is not stage), stage]
        return stage

    def _new_stage(self, model: Loaded, rows: int) -> Stage:
        return Stage(model, rows, self._make, self.metrics, self._ended, self._draft)

    def _load(self, name: str) -> None:
        """Load a model in a thread of its own, so that the replies of others go on."""

        def work() -> None:
            failure = None
            try:
                self.models.get(name)
            except KeyError:
                failure = _no_model(name)
            except Exception:  # whatever a file makes a reader do
                log.exception("%s cannot be loaded", name)
                failure = _unreadable(name)
            with self._change:
                del self._loads[name]
                failed = [r for r in self._waiting if failure and r.job.model == name]
                self._waiting = [r for r in self._waiting if r not in failed]
                if not self._loads:
                    self.ready.set()
                self._change.notify_all()
            for reply in failed:
                assert failure is not None
                self._ended(reply, failure)

        with self._change:
            if name in self._loads:
                return
            self._loads[name] = threading.Thread(target=work, name=f"load {name}", daemon=True)
            self._loads[name].start()

    def _drop(self, reply: Reply, failure: Failure) -> None:
        with self._change:
            self._waiting = [r for r in self._waiting if r is not reply]
        self._ended(reply, failure)

    def _ended(self, reply: Reply, outcome: Generation | Failure) -> None:
        """Free the place first, so that who hears of the end finds it free."""
        with self._change:
            if reply in self._active:
                self._active.remove(reply)
        if reply.begun:
            self._pace += 0.2 * (time.monotonic() - reply.begun - self._pace)
        failed = isinstance(outcome, Failure)
        self.metrics.add("fnlm_replies_total", finish="error" if isinstance(outcome, Failure) else outcome.finish)
        reply.say("error" if failed else "end", outcome)


def _no_model(name: str) -> Failure:
    return Failure(f"there is no model {name!r} any more", "model", "model_not_found")


def _unreadable(name: str) -> Failure:
    return Failure(f"{name} cannot be loaded; the server's log says why")
