"""The replies of one model that are written at this moment, and one step of them all."""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fnlm.generate import Generation
from webui.batch import CHUNK, SHORT, Batch, Slot
from webui.jobs import Failure, Reply, Start
from webui.metrics import Metrics
from webui.models import Loaded
from webui.writing import Writer, chosen

BROKE_OFF = Failure("the reply broke off; the server's log says why")
SMALL = 20_000_000  # bytes of parameters; below, threads wait for each other longer than they work
MakeBatch = Callable[..., Batch]
log = logging.getLogger(__name__)


class Stage:
    """A batch and who writes in it. `done(reply, outcome)` is called for each that leaves, once its row is free."""

    def __init__(
        self,
        model: Loaded,
        rows: int,
        make: MakeBatch,
        metrics: Metrics,
        done: Callable[[Reply, Generation | Failure], None],
    ):
        self.model, self._metrics, self._done = model, metrics, done
        self.small = model.size < SMALL
        self._make: Callable[[], Batch] = functools.partial(make, model.weights, model.cfg, rows)
        self._batch = self._make()
        self.replies: dict[Slot, Reply] = {}

    def join(self, reply: Reply) -> None:
        """Give a reply a row, and say that it begins."""
        model = self.model
        reply.begun = time.monotonic()
        wrong = max(reply.ids) >= model.tokenizer.vocab_size or len(reply.ids) >= model.cfg.seq_len
        if wrong:  # the run has another tokenizer or context since the prompt was read
            self._done(reply, Failure(f"{reply.job.model} was replaced by another model; ask again"))
            return
        device = model.weights.root["embed.tokens.weight"].device
        reply.writer = Writer(
            model.tokenizer, reply.ids, reply.settings, reply.job.seed, model.cfg.vocab_size, reply.job.top, device
        )
        self.replies[self._batch.join(reply.ids)] = reply
        reply.say("start", Start(len(reply.ids), reply.dropped, model.step))

    def step(self) -> None:
        """A token for every reply whose prompt is read, and pieces of those that are not. A failure ends them all."""
        for slot, reply in list(self.replies.items()):
            if reply.ticket.is_cancelled():
                self._leave(slot, self._cancelled(reply))
        try:
            new = {s: r.writer.next for s, r in self.replies.items() if r.writer and r.writer.next is not None}
            began = time.perf_counter()
            if new:
                self._say(*self._batch.advance(new))
                self._metrics.add("fnlm_step_seconds_total", time.perf_counter() - began)
            read = self._batch.fill(SHORT if new else CHUNK)
            if read:
                self._say([slot for slot, _ in read], torch.stack([logits for _, logits in read]))
        except Exception:
            log.exception("a step of %d replies failed", len(self.replies))
            self.end(BROKE_OFF)

    def end(self, failure: Failure) -> None:
        """Break off every reply."""
        replies, self.replies = list(self.replies.values()), {}
        self._batch = self._make()  # what a failure left in the old one counts for nothing
        for reply in replies:
            self._done(reply, failure)

    def _say(self, slots: Sequence[Slot], logits: Tensor) -> None:
        """Choose a token for each and say the text it makes."""
        replies = [self.replies[slot] for slot in slots]
        writers = [reply.writer for reply in replies if reply.writer is not None]
        ids, scores = chosen(writers, logits)
        self._metrics.add("fnlm_tokens_total", len(ids))
        for slot, reply, writer, token, score in zip(slots, replies, writers, ids, scores, strict=True):
            first = writer.step == 0
            try:
                piece = writer.push(token, score)
            except ValueError as error:
                self._leave(slot, Failure(str(error), "prompt" if reply.job.messages is None else "messages"))
                continue
            if first:
                self._metrics.first(time.monotonic() - reply.asked, len(reply.ids), slot.reused)
            if piece is not None:
                reply.say("text", piece)
            if writer.finish is not None:
                self._leave(slot, writer.generation)

    def _cancelled(self, reply: Reply) -> Generation:
        assert reply.writer is not None
        piece = reply.writer.close()
        if piece is not None:
            reply.say("text", piece)
        return reply.writer.generation

    def _leave(self, slot: Slot, outcome: Any) -> None:
        reply = self.replies.pop(slot)
        self._batch.leave(slot)
        self._done(reply, outcome)
