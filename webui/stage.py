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
from fnlm.speculate import Draft
from fnlm.tokens import slid
from webui.batch import CHUNK, SHORT, Batch, Slot
from webui.guesses import Drafting, Guess, forget, read_all
from webui.jobs import Failure, Reply, Start
from webui.metrics import Metrics
from webui.models import Loaded
from webui.scoring import Scoring
from webui.writing import Piece, Scored, Writer, chosen, judged

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
        draft: Drafting | None = None,
    ):
        self.model, self._metrics, self._done = model, metrics, done
        self.small = model.size < SMALL
        self._make: Callable[[], Batch] = functools.partial(make, model.weights, model.cfg, rows)
        self._batch = self._make()
        self._begin = draft and draft(model.tokenizer)
        self._scoring: list[Scoring] = []
        self.replies: dict[Slot, Reply] = {}

    @property
    def busy(self) -> bool:
        """Whether there is anything to do."""
        return bool(self.replies or self._scoring)

    def join(self, reply: Reply) -> None:
        """Take a reply on, and say that it begins. A failure ends it, and nobody else's."""
        try:
            self._take(reply)
        except Exception:
            log.exception("a reply could not begin")
            self._done(reply, BROKE_OFF)

    def _take(self, reply: Reply) -> None:
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
        reply.say("start", Start(len(reply.ids), reply.dropped, model.step))
        if reply.job.scored:
            self._scoring.append(Scoring(reply, model))
        else:
            self._place(reply)

    def _place(self, reply: Reply) -> None:
        """Give a reply a row, unless nothing is to be written."""
        if reply.job.only:
            self._done(reply, Generation("", [], "length", len(reply.ids)))
            return
        assert reply.writer is not None
        if self._begin is not None:
            reply.guess = Guess(self._begin, reply.settings, reply.writer.key, list(reply.ids))
        self.replies[self._batch.join(reply.ids)] = reply

    def step(self) -> None:
        """A token for every reply whose prompt is read, and pieces of those that are not. A failure ends them all."""
        self._let_go()
        try:
            self._slide()
            new, drafts = self._next()
            began = time.perf_counter()
            if new:
                self._say(*self._batch.advance(new))
            for slot, draft in drafts.items():
                self._say_drafted(slot, draft)
            if new or drafts:
                self._metrics.add("fnlm_step_seconds_total", time.perf_counter() - began)
            if self._scoring:
                self._score()
            read = self._batch.fill(SHORT if new or drafts else CHUNK)
            if read:
                self._say([slot for slot, _ in read], torch.stack([logits for _, logits in read]))
        except Exception:
            log.exception("a step of %d replies failed", len(self.replies))
            self.end(BROKE_OFF)

    def end(self, failure: Failure) -> None:
        """Break off every reply."""
        replies, self.replies = [*self.replies.values(), *(s.reply for s in self._scoring)], {}
        self._scoring = []
        self._batch = self._make()  # what a failure left in the old one counts for nothing
        for reply in replies:
            self._done(reply, failure)

    def _let_go(self) -> None:
        """Those whose clients left."""
        for slot, reply in list(self.replies.items()):
            if reply.ticket.is_cancelled():
                self._leave(slot, self._cancelled(reply))
        gone = [s.reply for s in self._scoring if s.reply.ticket.is_cancelled()]
        self._scoring = [s for s in self._scoring if s.reply not in gone]
        for reply in gone:
            self._done(reply, self._cancelled(reply))

    def _score(self) -> None:
        """A piece of the prompt whose turn it is; one that is read to its end is said, and written after."""
        scoring = self._scoring[0]  # it stays there until it is done, so that a failure is told to it too
        if scoring.step():
            reply = scoring.reply
            reply.say("text", Piece(self.model.tokenizer.decode(reply.ids[reply.lead :]), tuple(scoring.tokens)))
            self._place(reply)
        else:
            self._scoring.append(scoring)
        del self._scoring[0]

    def _slide(self) -> None:
        """Those whose context is full go on from their beginning and their newest half, which are read anew."""
        size = self.model.cfg.seq_len
        for slot, reply in list(self.replies.items()):
            if slot.filled < size:
                continue
            assert reply.writer is not None
            assert reply.writer.next is not None
            assert reply.keep is not None
            text = slid([*slot.tokens, reply.writer.next], size, reply.keep)
            reply.writer.next = None
            self._batch.leave(slot)
            place = self._batch.join(text)
            del self.replies[slot]
            self.replies[place] = reply
            if reply.guess is not None:
                reply.guess.restart(text)

    def _next(self) -> tuple[dict[Slot, int], dict[Slot, Draft]]:
        """What each is to read: its last token, or a draft behind it."""
        new, drafts = dict[Slot, int](), dict[Slot, Draft]()
        for slot, reply in self.replies.items():
            writer = reply.writer
            if writer is None or writer.next is None:
                continue
            room = self.model.cfg.seq_len - slot.filled - 1
            draft = reply.guess.draft(writer.step, room) if reply.guess else Draft([])
            if draft.ids:
                drafts[slot] = draft
            else:
                new[slot] = writer.next
        return new, drafts

    def _say(self, slots: Sequence[Slot], logits: Tensor) -> None:
        """Choose a token for each and say the text it makes."""
        writers = [w for slot in slots if (w := self.replies[slot].writer) is not None]
        ids, scores = chosen(writers, logits)
        for slot, token, score in zip(slots, ids, scores, strict=True):
            self._push(slot, token, score)

    def _say_drafted(self, slot: Slot, draft: Draft) -> None:
        """Read a draft at once, and say as much of it as the model would have, and one token more."""
        reply, n = self.replies[slot], len(draft.ids)
        writer, guess = reply.writer, reply.guess
        assert writer is not None
        assert writer.next is not None
        assert guess is not None
        logits, accepted = read_all(self._batch, slot, [writer.next, *draft.ids]), 0
        for i, row in enumerate(logits):
            token, score = judged(writer, row, draft, i, guess.accept[writer.step])
            right = i < n and token == draft.ids[i]
            accepted += right
            if not self._push(slot, token, score) or not right:
                break
        self._metrics.add("fnlm_drafted_tokens_total", n)
        self._metrics.add("fnlm_accepted_tokens_total", accepted)
        guess.learn(accepted, draft)
        if slot in self.replies:
            forget(slot, n - accepted)

    def _push(self, slot: Slot, token: int, score: Scored | None) -> bool:
        """Say the text that a reply's next token makes; False: that was its end."""
        reply = self.replies[slot]
        writer, first = reply.writer, reply.writer and reply.writer.step == 0
        assert writer is not None
        self._metrics.add("fnlm_tokens_total")
        try:
            piece = writer.push(token, score)
        except ValueError as error:
            self._leave(slot, Failure(str(error), "prompt" if reply.job.messages is None else "messages"))
            return False
        if first:
            self._metrics.first(time.monotonic() - reply.asked, len(reply.ids), slot.reused)
        if piece is not None:
            reply.say("text", piece)
        if writer.finish is not None:
            self._leave(slot, writer.generation)
            return False
        if reply.guess is not None:
            reply.guess.new.append(token)
        return True

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
