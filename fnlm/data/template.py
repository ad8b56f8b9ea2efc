"""A model's own chat template: a program in Jinja that writes a conversation, with the assistant's words found in it.

Contents are marked before the template is run, so that what stands between them is known: special tokens are read in
the template's words and never in what is said. Learnt are the assistant's content and what the template writes after it
up to its first special token, the end of the turn. A prompt is written as a conversation was that was learnt from, or,
for a model that was trained elsewhere, as transformers writes it.
"""

from __future__ import annotations

import importlib
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from datetime import datetime
from typing import Any, NamedTuple, NoReturn

import numpy as np
from numpy.typing import NDArray

from fnlm.data.manifest import DataError
from fnlm.tokenizers import Tokenizer

Messages = Sequence[dict[str, str]]
_MARK = "\ue000{}\ue001"
_MARKED = re.compile("\ue000(\\d+)\ue001")


class Run(NamedTuple):
    """A part of a conversation: a text, or a special token by its id; and whether it is learnt."""

    text: str
    special: int | None
    learnt: bool


class Closing(NamedTuple):
    """What ends an assistant's turn: special tokens by their ids, and a text where the template writes none."""

    ids: frozenset[int]
    texts: tuple[str, ...]


class Changed(DataError):
    """A template that writes something else than what is said."""


class Template:
    """A template for a tokenizer; `begin` and `end`: the ids of its bos_token and eos_token, where they are not those
    of a document. Raises DataError for one that is not Jinja."""

    def __init__(self, text: str, tokenizer: Tokenizer, begin: int | None = None, end: int | None = None) -> None:
        self.text, self._tokenizer = text, tokenizer
        names: dict[int | None, str] = {i: token for token, i in tokenizer.special.items()}
        if begin not in names:
            begin = tokenizer.prefix[0] if tokenizer.prefix else tokenizer.eot_id
        end = end if end in names else tokenizer.eot_id
        self._words = {"bos_token": names.get(begin, ""), "eos_token": names.get(end, "")}
        self._special = re.compile("|".join(re.escape(t) for t in sorted(tokenizer.special, key=len, reverse=True)))
        try:
            self._program = _environment().from_string(text)
        except _jinja().TemplateError as error:
            raise DataError(f"the chat template is not Jinja: {error}") from error

    def written(self, messages: Messages, prompt: bool = False) -> str:
        """The conversation as text; `prompt`: and what comes before the assistant's next words. DataError."""
        try:
            text: str = self._program.render(
                messages=messages, add_generation_prompt=prompt, tools=None, documents=None, **self._words
            )
        except (_jinja().TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError) as error:
            raise DataError(f"the chat template refuses a conversation: {error}") from error
        return text

    def runs(self, messages: Messages) -> list[Run]:
        """The parts of a conversation. DataError for a template that leaves out or changes what is said."""
        return list(self._told(*self._parted(messages), messages))

    def _parted(self, messages: Messages) -> tuple[list[str], list[str]]:
        """The template's own words before, between and after the contents, and these as it writes them. Changed."""
        words = self._words_of(messages)
        own, contents = self.written(messages), list[str]()
        at = len(words[0]) if own.startswith(words[0]) else -1
        for message, after in zip(messages, words[1:], strict=True):
            said = message["content"]
            ways = (said, said.strip(), said.rstrip(), said.lstrip())
            fits = next((way for way in ways if at >= 0 and own.startswith(way + after, at)), None)
            if fits is None:
                raise Changed("the chat template changes what is said; give --template of another model")
            contents.append(fits)
            at += len(fits) + len(after)
        if at != len(own):
            raise Changed("the chat template changes what is said; give --template of another model")
        return words, contents

    def _words_of(self, messages: Messages) -> list[str]:
        marked = [{**m, "content": _MARK.format(i)} for i, m in enumerate(messages)]
        parts = _MARKED.split(self.written(marked))
        if [int(i) for i in parts[1::2]] != list(range(len(messages))):
            raise Changed("the chat template leaves out a message, or moves it; give --template of another model")
        return parts[::2]

    def _told(self, words: list[str], contents: list[str], messages: Messages) -> Iterator[Run]:
        yield from self._literal(words[0], False)
        for content, message, after in zip(contents, messages, words[1:], strict=True):
            own = message["role"] == "assistant"
            yield Run(content, None, own)
            end = found.end() if own and self._special.pattern and (found := self._special.search(after)) else 0
            yield from self._literal(after[:end], True)
            yield from self._literal(after[end:], False)

    def _literal(self, text: str, learnt: bool) -> Iterator[Run]:
        """The template's own words, with special tokens read in them."""
        at = 0
        for found in self._special.finditer(text) if self._special.pattern else ():
            yield Run(text[at : found.start()], None, learnt)
            yield Run("", self._tokenizer.special[found[0]], learnt)
            at = found.end()
        yield Run(text[at:], None, learnt)

    def prompt(self, messages: Messages) -> list[int]:
        """The ids after which the assistant's next content comes, exactly those that `render` gives it. DataError."""
        words, contents = self._parted([*messages, {"role": "assistant", "content": "x"}])
        return self._ids(_joined(list(self._told(words[:-1], contents[:-1], messages))))

    def foreign_prompt(self, messages: Messages) -> list[int]:
        """The ids that transformers makes of a conversation and the beginning of the answer; but a special token that
        somebody writes is text. DataError."""
        hidden = [*self._tokenizer.special, _MARK[0]]
        numbers = {token: _MARK.format(i) for i, token in enumerate(hidden)}
        search = re.compile("|".join(re.escape(t) for t in sorted(hidden, key=len, reverse=True)))
        said = [{**m, "content": search.sub(lambda found: numbers[found[0]], m["content"])} for m in messages]
        runs = self._literal(self.written(said, prompt=True), False)
        shown = [run._replace(text=_MARKED.sub(lambda found: hidden[int(found[1])], run.text)) for run in runs]
        return self._ids(_joined(shown))

    def _ids(self, runs: Iterable[Run]) -> list[int]:
        runs = list(runs)
        texts = iter(self._tokenizer.encode_batch([run.text for run in runs if run.special is None]))
        return [i for run in runs for i in ([run.special] if run.special is not None else next(texts))]

    def closing(self) -> Closing:
        """What the template writes after an assistant's content, before the user's next and at the end. DataError."""
        said = [{"role": role, "content": "x"} for role in ("user", "assistant", "user")]
        before, last = self._words_of(said)[2], self._words_of(said[:2])[2]
        found = [self._special.search(after) if self._special.pattern else None for after in (before, last)]
        texts = (before.rstrip(),) if found[0] is None and before.strip() else ()
        return Closing(frozenset(self._tokenizer.special[f[0]] for f in found if f), texts)

    def about(self) -> dict[str, Any]:
        """For the manifest: the template, the id that begins a conversation and nothing else, and whether the end of
        text ends turns too."""
        talk = [{"role": role, "content": "x"} for role in ("user", "assistant") * 2]
        ids = self.render([talk])[0][0].tolist()
        begins = [i for i in self._tokenizer.prefix[:1] if ids[0] == i and ids.count(i) == 1]
        return {"template": self.text, "prefix": begins, "eot_within": self._tokenizer.eot_id in ids[:-1]}

    def render(self, batch: Sequence[Messages]) -> list[tuple[NDArray[np.uint32], NDArray[np.uint8]]]:
        """The ids of each conversation and 1 for each that is learnt, ended by the end of text where it is not yet."""
        all_runs = [list(_joined(self.runs(messages))) for messages in batch]
        texts = iter(
            self._tokenizer.encode_arrays([run.text for runs in all_runs for run in runs if run.special is None])
        )
        end, made = self._tokenizer.eot_id, []
        for runs in all_runs:
            ids = [np.array([run.special], np.uint32) if run.special is not None else next(texts) for run in runs]
            mask = [np.full(len(part), run.learnt, np.uint8) for run, part in zip(runs, ids, strict=True)]
            if end is not None and (not ids or not len(ids[-1]) or int(ids[-1][-1]) != end):
                ids, mask = [*ids, np.array([end], np.uint32)], [*mask, np.zeros(1, np.uint8)]
            made.append((np.concatenate(ids), np.concatenate(mask)))
        return made


def _joined(runs: list[Run]) -> Iterator[Run]:
    """Texts that stand side by side, both learnt or both not, are encoded as one, as other software does."""
    waiting: Run | None = None
    for run in runs:
        if waiting and run.special is None and (run.learnt == waiting.learnt or not run.text):
            waiting = waiting._replace(text=waiting.text + run.text)
            continue
        if waiting and waiting.text:
            yield waiting
        waiting = run if run.special is None else None
        if run.special is not None:
            yield run
    if waiting and waiting.text:
        yield waiting


def _jinja() -> Any:
    return importlib.import_module("jinja2")  # torch and flask bring it


def _environment() -> Any:
    """As transformers sets it up: no access to Python, blocks without their line breaks."""
    sandbox = importlib.import_module("jinja2.sandbox")
    made = sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    made.globals |= {"raise_exception": _refused, "strftime_now": lambda form: datetime.now().strftime(form)}
    made.filters["tojson"] = lambda value, **how: json.dumps(value, ensure_ascii=False, **how)
    return made


def _refused(message: str) -> NoReturn:
    raise _jinja().TemplateError(message)
