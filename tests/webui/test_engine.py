"""The engine alone: turns, cancelling, the bounded queue, newer checkpoints, models that are let go."""

from __future__ import annotations

import re
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest

from fnlm import checkpoint, data
from tests.webui.tiny import Script, save
from webui.batch import CHUNK, SHORT, Batch
from webui.engine import Busy, Engine, Event, Job, Refused, Stopped, Ticket
from webui.models import Models
from webui.prompts import TooLong, chat_ids, text_ids
from webui.stage import BROKE_OFF


def rest(ticket: Ticket) -> list[Event]:
    """All events up to the end."""
    events = []
    while True:
        event = ticket.get(20)
        assert event is not None, "the engine is silent"
        events.append(event)
        if event.kind in ("end", "error"):
            return events


def first_text(ticket: Ticket) -> None:
    while (event := ticket.get(20)) is None or event.kind != "text":
        assert event is not None


def until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.002)


def test_a_reply_has_a_start_texts_and_an_end(engine: Engine) -> None:
    job = Job("plain", prompt="abc", settings={"max_tokens": 12, "temperature": 1.0}, seed=3)
    start, *texts, end = rest(engine.submit([job]))
    assert (start.kind, start.value.prompt_tokens, start.value.step) == ("start", 3, 7)
    assert {t.kind for t in texts} == {"text"}
    assert "".join(t.value.text for t in texts) == end.value.text
    assert (end.value.finish, len(end.value.ids)) == ("length", 12)
    again = rest(engine.submit([job]))[-1]
    assert again.value == end.value
    other = rest(engine.submit([Job("plain", prompt="abc", settings=job.settings, seed=4)]))[-1]
    assert other.value.text != end.value.text


def test_replies_do_not_see_each_other(engine: Engine) -> None:
    jobs = [Job("plain", prompt="q" * n, settings={"max_tokens": 9}, seed=n) for n in (1, 5, 3)]
    alone = [rest(engine.submit([job]))[-1].value for job in jobs]
    tickets = [engine.submit([job]) for job in jobs]
    assert [rest(ticket)[-1].value for ticket in tickets] == alone


ENDLESS = {"max_tokens": 4000, "temperature": 0}


@pytest.fixture(scope="module")
def long(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("long")
    save(folder / "plain", "text", seq_len=8192)
    return folder


@pytest.fixture
def build(long: Path) -> Iterator[Callable[..., Engine]]:
    made: list[Engine] = []

    def one(**options: Any) -> Engine:
        made.append(Engine(Models([long]), **options).start())
        return made[-1]

    yield one
    for engine in made:
        engine.stop()


def test_a_reply_without_a_place_ends_and_frees_it(build: Callable[..., Engine]) -> None:
    def none(*_: Any) -> Batch:
        if failing:
            raise MemoryError("no room for a cache")
        return Batch(*_)

    failing = [True]
    engine = build(batch=none)
    ticket = engine.submit([Job("plain", settings=ENDLESS)])
    assert rest(ticket)[-1].value == BROKE_OFF
    assert engine.load() == {"active": 0, "waiting": 0}
    failing.clear()
    ticket = engine.submit([Job("plain", settings={"max_tokens": 2, "min_tokens": 2})])
    assert rest(ticket)[-1].value.finish == "length"


def test_cancelled_before_the_next_token(build: Callable[..., Engine]) -> None:
    script = Script(pause=0.002)
    engine = build(batch=script)
    ticket = engine.submit([Job("plain", settings=ENDLESS)])
    first_text(ticket)
    ticket.cancel()
    seen = script.steps
    assert rest(ticket)[-1].value.finish == "cancelled"
    assert script.steps <= seen + 1
    assert script.closed == 1
    assert engine.load() == {"active": 0, "waiting": 0}


def test_what_was_written_before_it_was_cancelled_is_kept(build: Callable[..., Engine]) -> None:
    engine = build(batch=Script(pause=0.002))
    ticket = engine.submit([Job("plain", settings={**ENDLESS, "stop": ("xxxxxxy",)})])
    first_text(ticket)
    ticket.cancel()
    end = rest(ticket)[-1].value
    assert end.text == "x" * len(end.ids)
    assert len(end.ids) >= 7


def test_one_that_waits_is_cancelled_without_a_token(build: Callable[..., Engine]) -> None:
    script = Script(pause=0.001)
    engine = build(batch=script, streams=1)
    first = engine.submit([Job("plain", settings=ENDLESS)])
    second = engine.submit([Job("plain", settings=ENDLESS)])
    first_text(first)
    second.cancel()
    events = rest(second)
    assert [e.kind for e in events] == ["end"]
    assert script.joined == 1
    assert engine.load() == {"active": 1, "waiting": 0}
    first.cancel()
    rest(first)


def test_all_write_together(build: Callable[..., Engine]) -> None:
    engine = build(batch=Script(), streams=3)
    ticket = engine.submit([Job("plain", settings=ENDLESS) for _ in range(3)])
    seen = [0, 0, 0]
    while sum(seen) < 1200:
        event = ticket.get(20)
        assert event is not None
        seen[event.job] += event.kind == "text"
        assert max(seen) - min(seen) <= 1
    ticket.cancel()


def test_who_asks_for_much_waits_for_who_asks_for_little(build: Callable[..., Engine]) -> None:
    engine = build(batch=Script(pause=0.001), streams=2, waiting=8)
    greedy = engine.submit([Job("plain", settings={"max_tokens": 20}) for _ in range(6)])
    while (event := greedy.get(20)) is not None and event.kind != "text":
        pass
    other = engine.submit([Job("plain", settings={"max_tokens": 20})])
    rest(other)
    begun = {0}
    while (event := greedy.get(0)) is not None:
        begun.add(event.job)
    assert len(begun) < 6
    greedy.cancel()


def test_the_queue_is_bounded(build: Callable[..., Engine]) -> None:
    engine = build(batch=Script(pause=0.001), streams=1, waiting=2)
    tickets = [engine.submit([Job("plain", settings=ENDLESS)]) for _ in range(3)]
    with pytest.raises(Busy, match="try again in") as busy:
        engine.submit([Job("plain")])
    assert busy.value.seconds >= 1
    tickets[1].cancel()
    tickets[0].cancel()
    rest(tickets[1])
    tickets.append(engine.submit([Job("plain")]))
    for ticket in tickets:
        ticket.cancel()


def test_stop_ends_all_with_a_reason(build: Callable[..., Engine]) -> None:
    engine = build(batch=Script(), streams=1)
    running, waiting = (engine.submit([Job("plain", settings=ENDLESS)]) for _ in range(2))
    first_text(running)
    engine.stop()
    for ticket in (running, waiting):
        last = rest(ticket)[-1]
        assert (last.kind, last.value.message) == ("error", "the server is stopping")
    with pytest.raises(Stopped):
        engine.submit([Job("plain")])


def test_stop_with_grace_finishes_what_is_being_written(build: Callable[..., Engine]) -> None:
    engine = build(batch=Script(pause=0.001), streams=1)
    running, waiting = (engine.submit([Job("plain", settings={"max_tokens": 40})]) for _ in range(2))
    first_text(running)
    engine.stop(grace=20)
    assert rest(running)[-1].value.text == "x" * 40
    assert rest(waiting)[-1].value.message == "the server is stopping"
    assert not engine._thread.is_alive()


def test_a_failed_step_ends_its_replies_and_not_the_engine(
    build: Callable[..., Engine], caplog: pytest.LogCaptureFixture
) -> None:
    engine = build(batch=Script(most=3))
    for _ in range(2):
        last = rest(engine.submit([Job("plain", settings=ENDLESS)]))[-1]
        assert last.value.message == "the reply broke off; the server's log says why"
        assert engine.load()["active"] == 0
    assert "the secret cause" in caplog.text


def test_what_a_request_gets_wrong(engine: Engine) -> None:
    def failure(name: str = "plain", **job: Any) -> Any:
        with pytest.raises(Refused) as refused:
            engine.submit([Job(name, **job)])
        return refused.value.failure

    assert failure(prompt="x" * 64)[1:] == ("prompt", "context_length_exceeded")
    assert "64 tokens; the model reads at most 63" in failure(prompt="x" * 64).message
    assert failure(prompt=[9999]).message == "token 9999 is not in the vocabulary of 259"
    assert "logit_bias names token 600" in failure(settings={"logit_bias": {600: 1.0}}).message
    assert failure("none").code == "model_not_found"
    assert re.search("the text has more than .* tokens", failure(prompt="x" * 10**6).message)


def test_a_newer_checkpoint_is_taken_up(tmp_path: Path) -> None:
    save(tmp_path / "a", "text", step=1)
    models = Models([tmp_path])
    first = models.get("a")
    assert models.get("a") is first
    save(tmp_path / "a", "text", step=2, seed=5)
    assert models.get("a").step == 2
    assert models.about()["a"].step == 2
    newest = tmp_path / "a" / "checkpoints" / "00000002.params"
    (newest / "params.safetensors").write_bytes(b"torn")
    checkpoint.mark_best(tmp_path / "a" / "checkpoints" / "00000001.params")
    assert models.get("a").step == 1


def test_a_damaged_newer_one_leaves_the_old(tmp_path: Path) -> None:
    save(tmp_path / "a", "text", step=1)
    models = Models([tmp_path])
    first = models.get("a")
    shutil.rmtree(tmp_path / "a" / "checkpoints" / "00000001.params")
    newer = save(tmp_path / "a", "text", step=2)
    (newer / "params.safetensors").write_bytes(b"torn")
    assert models.get("a") is first


def test_the_model_used_longest_ago_is_let_go(tmp_path: Path) -> None:
    for name in "abc":
        save(tmp_path / name, "text")
    size = Models([tmp_path]).get("a").size
    models = Models([tmp_path], memory=2 * size)
    a, b = models.get("a"), models.get("b")
    assert models.get("a") is a
    models.get("c")
    assert models.get("a") is a
    assert models.get("b") is not b


def test_names(tmp_path: Path, runs: Path) -> None:
    for place in ("x/runs/a", "y/runs/a"):
        save(tmp_path / place, "text")
    (tmp_path / "link").symlink_to(runs)
    assert list(Models([tmp_path]).paths()) == ["x/runs/a", "y/runs/a"]
    assert list(Models([tmp_path / "x/runs", tmp_path / "y/runs", tmp_path / "x/runs/a"]).paths()) == ["a", "runs/a"]
    assert list(Models([tmp_path / "x/runs/a"]).paths()) == ["a"]


def test_the_oldest_turns_are_left_out(engine: Engine) -> None:
    model = engine.models.reader("talk")

    def messages(*contents: str) -> list[dict[str, str]]:
        roles = ["user", "assistant"] * len(contents)
        return [{"role": r, "content": c} for r, c in zip(roles, contents, strict=False)]

    # a message is <|im_start|>user, a newline, its letters, <|im_end|> and a newline
    short = messages("a", "b", "c")
    assert chat_ids(model, short) == (data.prompt(model.tokenizer, short), 0)
    long = messages("a" * 20, "b", "c" * 10)
    assert chat_ids(model, long) == (data.prompt(model.tokenizer, long[2:]), 2)
    system = [{"role": "system", "content": "s" * 3}]
    assert chat_ids(model, [*system, *long]) == (data.prompt(model.tokenizer, [*system, long[2]]), 2)
    full = messages("a", "b", "c" * 44)
    assert chat_ids(model, full) == (data.prompt(model.tokenizer, full[2:]), 2)
    assert len(chat_ids(model, full)[0]) == 63
    with pytest.raises(TooLong, match=r"the last message needs 64 tokens .* at most 63"):
        chat_ids(model, messages("c" * 45))


def test_what_cannot_fit_is_not_read(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """A long history costs what fits, not what there is: a request must not hold up the others."""
    model, read = engine.models.reader("talk"), list[int]()
    encode = type(model.tokenizer).encode_batch

    def counted(self: Any, texts: Any) -> Any:
        read.append(sum(map(len, texts)))
        return encode(self, texts)

    monkeypatch.setattr(type(model.tokenizer), "encode_batch", counted)
    turns = [{"role": r, "content": "word " * 5000} for r in ("user", "assistant")] * 20
    turns += [{"role": r, "content": c} for r, c in (("user", "a"), ("assistant", "b"), ("user", "c"))]
    assert chat_ids(model, turns)[1] == 40
    assert sum(read) < 1000


def test_an_empty_text_begins_a_document(engine: Engine) -> None:
    model = engine.models.reader("plain")
    assert text_ids(model, "") == ([model.tokenizer.eot_id], 0)


def test_the_beginning_of_a_text_is_left_out_when_asked(engine: Engine) -> None:
    model = engine.models.reader("plain")
    assert text_ids(model, b"a" * 10 + b"b" * 48, truncate=True) == ([98] * 48, 10)
    assert text_ids(model, "b" * 48, truncate=True) == ([98] * 48, 0)
    with pytest.raises(TooLong):
        text_ids(model, "a" * 64)


class Steps(Batch):
    """Notes how many tokens of prompts are read before each token of those that go on, beside it or after it."""

    log: ClassVar[list[int]] = []

    def unread(self) -> int:
        return sum(s.missing for s in self.slots if s.taken)

    def advance(self, new: Any) -> Any:
        before = self.unread()
        out = super().advance(new)
        self.log.append(before - self.unread())
        return out

    def fill(self, budget: int = CHUNK) -> Any:
        before = self.unread()
        done = super().fill(budget)
        self.log[-1:] = [sum(self.log[-1:]) + before - self.unread()]
        return done


def test_a_long_prompt_is_read_between_the_tokens_of_others(build: Callable[..., Engine]) -> None:
    """Between two tokens of a stream at most SHORT tokens of prompts are read, however long they are."""
    Steps.log = [0]
    engine = build(batch=Steps)
    stream = engine.submit([Job("plain", settings={"max_tokens": 300, "min_tokens": 300})])
    first_text(stream)
    own = sum(Steps.log)
    long = engine.submit([Job("plain", prompt="abcdefg " * 180, settings={"max_tokens": 3, "min_tokens": 3})])
    rest(long)
    stream.cancel()
    rest(stream)
    assert sum(Steps.log) == own + 1440
    assert max(Steps.log) == SHORT


def test_short_prompts_are_read_in_the_steps_of_others(build: Callable[..., Engine]) -> None:
    """One step of all: the weights are read once for what is written, in whichever lane, and for prompts beside it."""
    Steps.log = [0]
    engine = build(batch=Steps, streams=16)
    asked = [Job("plain", prompt="abc" * i, settings={"max_tokens": 40, "min_tokens": 40}) for i in range(1, 13)]
    for ticket in [engine.submit([job]) for job in asked]:
        assert rest(ticket)[-1].value.finish == "length"
    assert sum(Steps.log) == sum(3 * i for i in range(1, 13))
    assert len(Steps.log) < 2 * 40


def test_a_conversations_next_turn_reads_only_what_is_new(tmp_path: Path) -> None:
    save(tmp_path / "talk", "chat", seq_len=256)
    engine = Engine(Models([tmp_path]), streams=2).start()

    def turn(*said: str) -> Any:
        roles = ["user", "assistant"] * len(said)
        messages = [{"role": r, "content": c} for r, c in zip(roles, said, strict=False)]
        settings = {"max_tokens": 8, "min_tokens": 8, "temperature": 0}
        return rest(engine.submit([Job("talk", messages, settings=settings)]))[-1].value

    def reused() -> int:
        found = re.search(r"^fnlm_prompt_tokens_reused_total (\d+)", engine.metrics.text({}), re.MULTILINE)
        return int(found[1]) if found else 0

    answer = turn("h")
    before = reused()
    turn("h", answer.text, "o")
    assert reused() - before >= len("<user\nh>\n<assistant\n")
    engine.stop()


def test_a_running_reply_is_written_to_its_end_by_the_old_checkpoint(tmp_path: Path) -> None:
    save(tmp_path / "a", "text", step=1, seq_len=4096)
    engine = Engine(Models([tmp_path]), streams=2).start()
    old = engine.submit([Job("a", settings={"max_tokens": 4000, "min_tokens": 4000})])
    first_text(old)
    save(tmp_path / "a", "text", step=2, seed=5, seq_len=4096)
    new = rest(engine.submit([Job("a", settings={"max_tokens": 5})]))
    assert new[0].value.step == 2
    first_text(old)
    old.cancel()
    assert rest(old)[-1].value.finish == "cancelled"
    engine.stop()


def test_a_model_that_is_loaded_does_not_hold_up_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in "ab":
        save(tmp_path / name, "text", seq_len=4096)
    models, go = Models([tmp_path]), threading.Event()
    load = models._load

    def slow(name: str, path: Path) -> Any:
        assert name == "a" or go.wait(20)
        return load(name, path)

    monkeypatch.setattr(models, "_load", slow)
    engine = Engine(models, streams=2).start()
    a = engine.submit([Job("a", settings={"max_tokens": 4000, "min_tokens": 4000})])
    first_text(a)
    b = engine.submit([Job("b", settings={"max_tokens": 5})])
    for _ in range(20):
        first_text(a)
    assert engine.load() == {"active": 1, "waiting": 1}
    a.cancel()
    go.set()
    assert rest(b)[-1].kind == "end"
    engine.stop()


def test_a_model_that_cannot_be_loaded_is_one_answer(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = save(tmp_path / "a", "text")
    engine = Engine(Models([tmp_path]), streams=2).start()
    assert engine.models.reader("a").context == 64
    (path / "params.safetensors").write_bytes(b"torn")
    for _ in range(2):
        last = rest(engine.submit([Job("a")]))[-1]
        assert last.value.message == "a cannot be loaded; the server's log says why"
    assert engine.load() == {"active": 0, "waiting": 0}
    engine.stop()


def test_a_reply_that_cannot_begin_does_not_take_the_engine_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    save(tmp_path / "a", "text")
    engine = Engine(Models([tmp_path]), streams=2).start()
    ready = engine.models.ready
    with monkeypatch.context() as broken:
        broken.setattr(engine.models, "ready", lambda name: 1 / 0)
        assert rest(engine.submit([Job("a")]))[-1].value.message == "the reply broke off; the server's log says why"
    assert "ZeroDivisionError" in caplog.text
    assert engine.models.ready == ready
    assert rest(engine.submit([Job("a", settings={"max_tokens": 3})]))[-1].kind == "end"
    engine.stop()


@pytest.mark.parametrize("fails", ["Scoring.step", "Scoring.__post_init__", "Batch.join"])
def test_a_reply_that_breaks_off_between_two_steps_is_told_so(
    fails: str, build: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    engine = build()
    with monkeypatch.context() as broken:
        broken.setattr(f"webui.stage.{fails}", lambda *_: 1 / 0)
        last = rest(engine.submit([Job("plain", prompt="ab", top=1, scored=True)]))[-1]
        assert last.value.message == "the reply broke off; the server's log says why"
        assert engine.load()["active"] == 0
    assert "ZeroDivisionError" in caplog.text
    assert rest(engine.submit([Job("plain", prompt="ab", settings={"max_tokens": 3})]))[-1].kind == "end"


def test_matrices_in_int8(tmp_path: Path) -> None:
    save(tmp_path / "a", "text", d_model=64)
    wide, narrow = Models([tmp_path]), Models([tmp_path], quantize=8)
    assert narrow.get("a").size < 0.4 * wide.get("a").size
    engine = Engine(narrow, streams=2).start()
    end = rest(engine.submit([Job("a", prompt="abc", settings={"max_tokens": 20, "min_tokens": 20})]))[-1]
    assert len(end.value.ids) == 20
    engine.stop()
