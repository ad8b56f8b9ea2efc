"""lm-eval's tasks on a model of ours: the adapter that its evaluator drives, and running tasks by name.

Needs the extra `eval`, so nothing here is imported by `fnlm.evaluation`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from lm_eval.api.model import TemplateLM

from fnlm import random
from fnlm.config import ModelConfig
from fnlm.data import DataError
from fnlm.decode import prepare
from fnlm.evaluation.scoring import pair, rolling, score
from fnlm.generate import beginning, complete
from fnlm.sampling import Settings
from fnlm.tokenizers import Tokenizer
from fnlm.types import Params

NEW_TOKENS = 256  # where a task names no number, as lm-eval's hf backend
TOGETHER = 32  # texts written at once
LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
DRAWN = ("temperature", "top_p", "top_k")


class Interrupted(Exception):
    """Someone asked to stop in the middle of a task."""


class Adapter(TemplateLM):  # type: ignore[misc]
    """A model as lm-eval sees one: log-likelihoods of continuations and whole texts, and texts written on.

    Ids are those of our tokenizer with what it puts before a text; special tokens written in a text are text.
    """

    def __init__(
        self, params: Params, cfg: ModelConfig, tokenizer: Tokenizer, stop: Callable[[], bool] = lambda: False
    ) -> None:
        super().__init__()
        self._params, self._cfg, self._own, self._stop = params, cfg, tokenizer, stop

    @property
    def eot_token_id(self) -> int:
        """What ends a text, or stands for it."""
        end = self._own.eot_id
        return beginning(self._own)[0] if end is None else end

    @property
    def prefix_token_id(self) -> int:
        """What a text without a context is predicted from."""
        return beginning(self._own)[-1]

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **unused: Any) -> list[int]:
        """The ids of a text, with the tokenizer's prefix unless that is refused."""
        prefix = () if add_special_tokens is False else self._own.prefix
        return [*prefix, *self._own.encode(string)]

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        before, after = pair(self._own, context, continuation)
        return list(before), list(after)

    def _loglikelihood_tokens(self, requests: Sequence[Any], **unused: Any) -> list[tuple[float, bool]]:
        pairs = [(context, continuation) for _, context, continuation in requests]
        return [(one.logprob, one.greedy) for one in score(self._params, self._cfg, pairs, progress=self._look)]

    def _look(self, done: int = 0) -> None:
        if self._stop():
            raise Interrupted

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """The log-likelihood of whole texts, each token predicted once from up to a full context."""
        texts = [self.tok_encode(request.args[0]) for request in requests]
        pairs = [rolling(ids, self.prefix_token_id, self._cfg.seq_len) for ids in texts]
        flat = [one for own in pairs for one in own]
        scores = iter(score(self._params, self._cfg, flat, progress=self._look))
        return [sum(next(scores).logprob for _ in own) for own in pairs]

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Texts written on, each up to its stop strings; those with the same settings together, longest first."""
        out = [""] * len(requests)
        ids = [self.tok_encode(request.args[0]) or beginning(self._own) for request in requests]
        groups: dict[str, list[int]] = {}
        for i in sorted(range(len(requests)), key=lambda i: -len(ids[i])):
            groups.setdefault(repr(sorted(requests[i].args[1].items())), []).append(i)
        ready = prepare(self._params, self._cfg)
        for rows in groups.values():
            settings = settings_of(requests[rows[0]].args[1], self._cfg.seq_len)
            room = self._cfg.seq_len - (settings.max_tokens or 0)
            for at in range(0, len(rows), TOGETHER):
                some = rows[at : at + TOGETHER]
                prompts = [ids[i][-room:] for i in some]
                texts = complete(ready, self._cfg, self._own, prompts, settings, random.key(at), cancelled=self._stop)
                self._look()
                for i, text in zip(some, texts, strict=True):
                    out[i] = text.text.removeprefix(" ") if self._begins_with_space else text.text
        return out

    @property
    def _begins_with_space(self) -> bool:
        """Whether a text has a space in front that is not shown, as SentencePiece's; tasks compare without."""
        return self._own.decode(self._own.encode("a")) == " a"


def settings_of(asked: dict[str, Any], seq_len: int) -> Settings:
    """A task's generation settings as ours: greedy unless it draws. ValueError for one that is not known.

    A task may ask for more tokens than the context has: half of it is then for the prompt.
    """
    given = dict(asked)
    until = given.pop("until", None) or []
    lengths = [given.pop(name) for name in LENGTHS if given.get(name) is not None]
    draws = given.pop("do_sample", float(given.get("temperature") or 0) > 0)
    drawn = {name: given.pop(name) for name in DRAWN if given.get(name) is not None}
    if odd := sorted(name for name, value in given.items() if value not in (None, False, 1) and name not in LENGTHS):
        known = "until, do_sample, " + ", ".join((*LENGTHS, *DRAWN))
        raise ValueError(f"the task asks to generate with {odd[0]}={given[odd[0]]!r}; known are {known}")
    drawn = {"temperature": 1.0, **drawn} if draws else {"temperature": 0.0}
    stops = tuple(s for s in ([until] if isinstance(until, str) else until) if s)
    wanted = int(lengths[0]) if lengths else NEW_TOKENS
    return Settings(max_tokens=wanted if wanted < seq_len else max(1, seq_len // 2), stop=stops, **drawn)


def run(
    model: Adapter,
    tasks: Sequence[str],
    folder: Path | None = None,
    *,
    limit: int | None = None,
    shots: int | None = None,
    done: Callable[[str, dict[str, Any]], object] = lambda task, found: None,
) -> dict[str, dict[str, Any]]:
    """The metrics of tasks by name, lm-eval's own and those of YAML files in `folder`; `done` hears of each.

    Where the adapter's `stop` ends it, those of the tasks that were whole by then.

    ValueError for a task that is not known, DataError for one whose data cannot be had, in one line.
    """
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    manager = TaskManager(include_path=str(folder), include_defaults=False) if folder else TaskManager()
    if folder and not set(tasks) <= set(manager.all_tasks):  # reading all of its own takes some seconds
        manager = TaskManager(include_path=str(folder))
    for task in tasks:
        if task not in manager.all_tasks:
            where = f" or in {folder}" if folder else "; YAML files of your own: --task-folder"
            raise ValueError(f"there is no task {task!r} among lm-eval's{where}")
    found: dict[str, dict[str, Any]] = {}
    for task in tasks:
        try:
            said = simple_evaluate(
                model, tasks=[task], limit=limit, num_fewshot=shots, task_manager=manager, bootstrap_iters=0
            )
        except Interrupted:
            return found
        except (OSError, ValueError, KeyError, RuntimeError) as error:  # a hub that is not reached, data that is not
            line = str(error).strip().partition("\n")[0]
            raise DataError(f"task {task!r} failed ({type(error).__name__}: {line})") from error
        for name, figures in said["results"].items():
            found[name] = _plain(figures) | {"examples": said["n-samples"].get(name, {}).get("effective")}
            done(name, found[name])
    return found


def _plain(figures: dict[str, Any]) -> dict[str, Any]:
    """The numbers: `acc,none` is acc; another filter's name stays; a standard error that is not known is left out."""
    named = {name.removesuffix(",none"): value for name, value in figures.items()}
    return {name: float(value) for name, value in named.items() if isinstance(value, (int, float))}
