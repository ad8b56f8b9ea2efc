"""How a model's conversations are written: as ChatML, or by the chat template that it came with or was trained by."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Any

from fnlm.data import chat
from fnlm.data.chat import Messages
from fnlm.data.manifest import DataError
from fnlm.data.template import Changed, Closing, Template
from fnlm.tokenizers import Tokenizer

PROBE: Messages = [{"role": role, "content": "x"} for role in ("user", "assistant", "user")]


class Dialogue:
    """The prompts of a model's conversations, and what ends its turns, beside the end of a text.

    `template`: None for ChatML. `learnt`: it was trained here on what the template wrote, rather than elsewhere.
    `kept`: token ids and generation settings that it came with, as `fnlm.interop` keeps them.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        template: str | None = None,
        learnt: bool = True,
        kept: Mapping[str, Any] | None = None,
    ) -> None:
        self.tokenizer, self.text, self.learnt = tokenizer, template, learnt
        self._kept = kept or {}

    def prompt(self, messages: Messages) -> list[int]:
        """The ids after which the assistant's next content comes. DataError for what the template refuses."""
        if self.text is None:
            return chat.prompt(self.tokenizer, messages)
        try:
            return self._prompt(messages)
        except DataError as error:
            own = [m for m in messages if m["role"] != "system"]
            if len(own) < len(messages) and self._takes(own):
                raise DataError(f"{error}; this model takes no system message here, so leave it out") from None
            raise

    def _prompt(self, messages: Messages) -> list[int]:
        if self.learnt:
            try:
                return self._template.prompt(messages)
            except Changed:
                pass  # it was not learnt so; what transformers would write is the nearest
        lost = next((m for m in messages if m["role"] == "system" and not self._says(messages, m["content"])), None)
        if lost is not None:
            raise DataError("the chat template leaves out the system message")
        return self._template.foreign_prompt(messages)

    def _says(self, messages: Messages, content: str) -> bool:
        return content.strip() in self._template.written(messages, prompt=True)

    def _takes(self, messages: Messages) -> bool:
        try:
            self._template.written(messages, prompt=True)
        except DataError:
            return False
        return bool(messages)

    def check(self, messages: Messages) -> None:
        """DataError, without reading it as tokens, where the template refuses a conversation."""
        if self.text is not None and not self._takes(messages):
            self.prompt(messages)

    @property
    def ends(self) -> frozenset[int]:
        """The ids that end a turn, by the template and by the settings that the model came with."""
        kept = {i for part in self._kept.values() for i in _listed(part.get("eos_token_id"))}
        return self._closing.ids.union(i for i in kept if 0 <= i < self.tokenizer.vocab_size)

    @property
    def stop(self) -> tuple[str, ...]:
        """The texts that end a turn, of a template that ends it with no special token."""
        return self._closing.texts

    @property
    def is_whole(self) -> bool:
        """Whether the template writes both sides of a conversation, what is said in it unchanged."""
        try:
            self._template.runs(PROBE)
        except DataError:
            return False
        return True

    @cached_property
    def _template(self) -> Template:
        assert self.text is not None
        own: Mapping[str, Any] = {} if self.learnt else self._kept.get("config", {})
        begin, end = (_listed(own.get(name)) for name in ("bos_token_id", "eos_token_id"))
        return Template(self.text, self.tokenizer, *(ids[0] if len(ids) == 1 else None for ids in (begin, end)))

    @cached_property
    def _closing(self) -> Closing:
        try:
            return self._template.closing() if self.text is not None else Closing(frozenset(), ())
        except DataError:  # said where a prompt is written
            return Closing(frozenset(), ())


def dialogue_of(config: Mapping[str, Any], tokenizer: Tokenizer) -> Dialogue:
    """How the conversations of a run are written, by its config.json: as those that it was last trained on, else by the
    template that it came with, else as ChatML.
    """
    came = config.get("interop") or {}
    if "template" in config:
        return Dialogue(tokenizer, config["template"])
    learnt = config.get("kind") == "chat" and "train" in config
    return Dialogue(tokenizer, came.get("template"), learnt, came.get("kept"))


def is_chat(config: Mapping[str, Any], tokenizer: Tokenizer) -> bool:
    """Whether a run was last trained on conversations; of what was imported, whether its template writes them."""
    if config.get("kind") == "chat":
        return True
    if "train" in config or "merge" in config:
        return False
    dialogue = dialogue_of(config, tokenizer)
    return dialogue.text is not None and dialogue.is_whole


def _listed(ids: Any) -> list[int]:
    return [i for i in (ids if isinstance(ids, list) else [ids]) if isinstance(i, int)]
