"""A search by successive halving: all candidates a little, the better half twice as far, to the last one whole.

Jamieson & Talwalkar 2016, algorithm 1, with steps of training as the resource. A candidate that goes on continues its
run, whose schedule is that of all its steps: the last one is trained as if it had been alone. The ledger is written
after every result, so a search that was killed goes on.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from fnlm.checkpoint import CheckpointError
from fnlm.checkpoint.files import replace_text

LEDGER = "tune.json"


class Candidate(NamedTuple):
    """One choice of settings, and the name of its run."""

    name: str
    lr: float
    steps: int


class Round(NamedTuple):
    """How far candidates are trained, in parts of their steps, and how many of them."""

    part: float
    size: int


class Result(NamedTuple):
    """The best validation loss so far, after so many steps, and how the run ended."""

    loss: float
    step: int
    reason: str

    @property
    def is_over(self) -> bool:
        """Whether there is nothing to go on with."""
        return self.reason in ("early stop", "not finite")


def rounds(n: int) -> list[Round]:
    """The rounds for n candidates: halved each time, and twice as far; the last one is alone and whole."""
    counts = [n]
    while counts[-1] > 1:
        counts.append(-(-counts[-1] // 2))
    return [Round(2.0 ** (i + 1 - len(counts)), count) for i, count in enumerate(counts)]


def until(candidate: Candidate, part: float) -> int:
    """The step that a round ends after."""
    return max(1, round(candidate.steps * part))


def cost(candidates: Sequence[Candidate]) -> int:
    """The most steps that a search takes: the longest candidates go on."""
    by_length = sorted(candidates, key=lambda c: -c.steps)
    total, before = 0, 0.0
    for part, count in rounds(len(candidates)):
        going = by_length[:count]
        total += sum(until(c, part) - (until(c, before) if before else 0) for c in going)
        before = part
    return total


def best(results: dict[str, Result], names: Sequence[str], count: int) -> list[str]:
    """The names of the `count` lowest losses, in the order of `names`; nan counts as the highest."""

    def rank(name: str) -> float:
        loss = results[name].loss
        return loss if math.isfinite(loss) else math.inf

    kept = set(sorted(names, key=rank)[:count])
    return [name for name in names if name in kept]


class Ledger:
    """What a search knows: what it is about, its candidates, and the results of each round; a file in its folder."""

    def __init__(self, folder: Path, about: dict[str, Any], candidates: Sequence[Candidate]) -> None:
        self.folder, self.about, self.candidates = folder, about, list(candidates)
        self.results: list[dict[str, Result]] = [{} for _ in rounds(len(self.candidates))]

    def write(self) -> None:
        """Whole or not at all."""
        value = {
            **self.about,
            "candidates": [c._asdict() for c in self.candidates],
            "rounds": [
                {name: [_finite(r.loss), r.step, r.reason] for name, r in results.items()} for results in self.results
            ],
        }
        self.folder.mkdir(parents=True, exist_ok=True)
        replace_text(self.folder / LEDGER, json.dumps(value, indent=2))

    def read(self) -> None:
        """Take over the results in the folder. CheckpointError where they are of another search."""
        file = self.folder / LEDGER
        try:
            saved = json.loads(file.read_text(encoding="utf-8"))
            same = [Candidate(**c) for c in saved["candidates"]] == self.candidates
            results = [{name: _result(r) for name, r in one.items()} for one in saved["rounds"]]
        except (ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{file} is damaged ({error}); start again with --force") from error
        odd = [key for key, value in self.about.items() if saved.get(key) != value]
        if odd or not same:
            what = odd[0] if odd else "candidates"
            raise CheckpointError(
                f"{file} is of another search ({what} differ); give the same words, or start again with --force"
            )
        self.results = results


def _finite(x: float) -> float | None:
    return x if math.isfinite(x) else None


def _result(values: Sequence[Any]) -> Result:
    loss, step, reason = values
    return Result(math.inf if loss is None else float(loss), int(step), str(reason))


def search(
    ledger: Ledger, train: Callable[[Candidate, int], Result | None], drop: Callable[[str], None] = lambda name: None
) -> str | None:
    """The name of the best candidate; `train` takes one to a step. None where `train` gave up (it was interrupted).

    `drop` is told of each that does not go on, once the ledger says so; of a search that goes on, again.
    """
    going = [c.name for c in ledger.candidates]
    for i, (part, count) in enumerate(rounds(len(going))):
        if i:
            before_that, going = going, best(ledger.results[i - 1], going, count)
            for name in before_that:
                if name not in going:
                    drop(name)
        for candidate in (c for c in ledger.candidates if c.name in going and c.name not in ledger.results[i]):
            before = ledger.results[i - 1].get(candidate.name) if i else None
            result = before if before and before.is_over else train(candidate, until(candidate, part))
            if result is None:
                return None
            ledger.results[i][candidate.name] = result
            ledger.write()
    return going[0]
