"""Chat templates in the manner of known models, and a tokenizer that has their special tokens."""

from __future__ import annotations

from typing import Any

from fnlm import tokenizers

ENDED = tokenizers.named("byte", special=["<s>", "</s>", "<|end|>"])
LLAMA = (
    "{% if messages[0].role == 'system' %}{% set system = '<<SYS>>\n' + messages[0].content + '\n<</SYS>>\n\n' %}"
    "{% set messages = messages[1:] %}{% else %}{% set system = '' %}{% endif %}"
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('user and assistant must take turns') }}{% endif %}"
    "{% set said = system + m.content if loop.first else m.content %}"
    "{% if m.role == 'user' %}{{ bos_token + '[INST] ' + said.strip() + ' [/INST]' }}"
    "{% else %}{{ ' ' + said.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
"""As Llama 2's: instructions within the first message, no words that ask for an answer."""
ZEPHYR = (
    "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + eos_token + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
"""As Zephyr's: roles in words that are no tokens, and a line break that the answer begins with."""
GEMMA = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}{{ bos_token }}"
    "{% for m in messages %}{{ m.role + ': ' + m.content | trim + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
"""As Gemma's: it refuses instructions, and a turn ends by a token that ends no document."""
PLAIN = (
    "{% for m in messages %}{{ '### ' + m.role + '\n' + m.content + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '### assistant\n' }}{% endif %}"
)
"""As Alpaca's: no special token at all."""
KEPT = {"config": {"bos_token_id": ENDED.special["<s>"], "eos_token_id": ENDED.special["</s>"]}, "generation": {}}


def came(template: str | None, **kept: Any) -> dict[str, Any]:
    """What config.json says of a model that was imported with this template."""
    return {"interop": {"source": "s", "format": "hf", "template": template, "kept": {**KEPT, **kept}}}


def talk(*contents: str, system: str | None = None) -> list[dict[str, str]]:
    """The user and the assistant in turn, after instructions."""
    roles = ["user", "assistant"] * len(contents)
    first = [{"role": "system", "content": system}] if system is not None else []
    return first + [{"role": r, "content": c} for r, c in zip(roles, contents, strict=False)]
