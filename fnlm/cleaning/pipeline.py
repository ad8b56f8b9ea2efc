"""Cleaning steps by name, put together: what each measures in any process, and decides in order in one.

`exact,minhash=0.8,gopher,language=en,pii`: steps stand in the order in which they are done.
"""

from __future__ import annotations

import multiprocessing
import signal
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

from fnlm.cleaning.duplicates import Exact, Memory, MinHash
from fnlm.cleaning.language import LANGUAGES, language_of
from fnlm.cleaning.pii import masked
from fnlm.cleaning.quality import gopher
from fnlm.config import did_you_mean

NAMES = ("exact", "minhash", "gopher", "language", "pii")
CHUNK = 16
"""Texts that a worker takes at a time."""


class WorkerLost(ValueError):
    """A process that measures was ended from outside. What was cleaned before is kept."""

    exit_code = 1


class Verdict(NamedTuple):
    """What becomes of a text: `text` None drops it, for a `reason`; `changes` counts what was masked."""

    text: str | None
    reason: str = ""
    changes: int = 0


class Step(NamedTuple):
    """One kind of cleaning: `measure` is a pure function, `decide` is called in order, in one process.

    A step that remembers what came before is made with its memory; `memory` is the size of a record, or None.
    """

    name: str
    measure: Callable[[str], Any]
    decide: Callable[[str, Any], Verdict]
    memory: Memory | None = None


def check(spec: Sequence[str]) -> None:
    """Raises ValueError, with the remedy, for a step that is not known or lacks what it needs."""
    for one in spec:
        name, _, value = one.partition("=")
        if name not in NAMES:
            raise ValueError(f"there is no cleaning step {name!r}{did_you_mean(name, NAMES)}")
        if name == "language" and value not in LANGUAGES:
            raise ValueError(f"which language? write language=en; known: {', '.join(LANGUAGES)}")
        if name == "minhash":
            _threshold(value)
            MinHash.measure("")  # says what to install
        elif value and name != "language":
            raise ValueError(f"{name} takes no value, not {value!r}")
    if len({one.partition("=")[0] for one in spec}) < len(spec):
        raise ValueError(f"a cleaning step is named twice in {','.join(spec)}")


def _threshold(value: str) -> float:
    try:
        found = float(value or MinHash.THRESHOLD)
    except ValueError:
        found = 0.0
    if not 0 < found <= 1:
        raise ValueError(f"minhash={value} is no similarity; write minhash=0.8")
    return found


def steps_of(spec: Sequence[str], folder: Path, sizes: dict[str, int] | None = None) -> list[Step]:
    """The steps of names; what they remember is in `folder`, of which `sizes` bytes count (none: they begin anew)."""
    check(spec)
    sizes = sizes or {}
    return [
        _step(one, lambda name, record: Memory(folder / f"{name}.seen", record, sizes.get(name, 0))) for one in spec
    ]


def _step(one: str, memory: Callable[[str, int], Memory]) -> Step:
    name, _, value = one.partition("=")
    if name == "exact":
        exact = Exact(memory(name, Exact.RECORD))
        return Step(name, Exact.measure, partial(_new, exact, "seen before"), exact.memory)
    if name == "minhash":
        near = MinHash(memory(name, MinHash.RECORD), _threshold(value))
        return Step(name, MinHash.measure, partial(_new, near, "nearly seen before"), near.memory)
    if name == "gopher":
        return Step(name, gopher, _kept_without_reason)
    if name == "language":
        return Step(name, language_of, partial(_of_language, value))
    return Step(name, masked, _masked)


def _new(seen: Exact | MinHash, reason: str, text: str, measured: bytes) -> Verdict:
    return Verdict(text) if seen.is_new(measured) else Verdict(None, reason)


def _kept_without_reason(text: str, reason: str | None) -> Verdict:
    return Verdict(text) if reason is None else Verdict(None, reason)


def _of_language(wanted: str, text: str, found: str | None) -> Verdict:
    return Verdict(text) if found in (None, wanted) else Verdict(None, found or "unknown")


def _masked(text: str, measured: tuple[str, int]) -> Verdict:
    return Verdict(measured[0], changes=measured[1])


class Cleaner:
    """Steps applied to one group of texts after the other, and what each of them did.

    `workers` processes measure, one process decides, so that their number changes nothing. Close it, or use `with`.
    """

    def __init__(self, steps: Sequence[Step], workers: int = 1, counts: dict[str, Any] | None = None) -> None:
        self.steps = steps
        self.counts: dict[str, dict[str, Any]] = counts or {step.name: {"seen": 0} for step in steps}
        # spawn: a fork of a process with threads, as torch's and tokenizers' are, may hang
        context = multiprocessing.get_context("spawn")
        self._pool = ProcessPoolExecutor(workers, context, _ignore_interrupts) if workers > 1 and steps else None

    def clean(self, texts: Sequence[str]) -> list[str | None]:
        """Each text as it is kept, None for one that is not, in order. WorkerLost where a process did not live."""
        found: list[str | None] = list(texts)
        for step in self.steps:
            here = [i for i, text in enumerate(found) if text is not None]
            measured = self._measured(step.measure, [found[i] or "" for i in here])
            for i, one in zip(here, measured, strict=True):
                found[i] = self._counted(step.name, step.decide(found[i] or "", one))
        return found

    def _measured(self, measure: Callable[[str], Any], texts: list[str]) -> list[Any]:
        run = map if self._pool is None else partial(self._pool.map, chunksize=CHUNK)
        try:
            return list(run(measure, texts))
        except BrokenProcessPool as error:
            remedy = "the same command goes on, with fewer --workers where memory ran out"
            raise WorkerLost(f"a process that cleans was ended from outside; {remedy}") from error

    def _counted(self, name: str, verdict: Verdict) -> str | None:
        count = self.counts[name]
        count["seen"] += 1
        if verdict.text is None:
            count["removed"] = count.get("removed", 0) + 1
            reasons = count.setdefault("reasons", {})
            reasons[verdict.reason] = reasons.get(verdict.reason, 0) + 1
        if verdict.changes:
            count["changed"] = count.get("changed", 0) + 1
            count["masked"] = count.get("masked", 0) + verdict.changes
        return verdict.text

    def sizes(self) -> dict[str, int]:
        """How much each step remembers, in bytes that are written."""
        memories = {step.name: step.memory for step in self.steps if step.memory is not None}
        for memory in memories.values():
            memory.flush()
        return {name: memory.size for name, memory in memories.items()}

    def close(self) -> None:
        """End the workers, and close the files."""
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
        for step in self.steps:
            if step.memory is not None:
                step.memory.close()

    def __enter__(self) -> Cleaner:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


def _ignore_interrupts() -> None:
    """Ctrl-C is for the process that waits for the workers."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
