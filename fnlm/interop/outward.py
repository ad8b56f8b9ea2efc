"""Our tokenizers and chats in the files that Hugging Face's tools read."""

from __future__ import annotations

import json
from typing import Any

from fnlm.interop.vocabulary import FLAGS, from_merges
from fnlm.tokenizers import CHAT_SPECIAL, IM_END, Byte, Char, Tokenizer
from fnlm.tokenizers.byte_level import CHARACTER

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' }}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
"""What `fnlm.data.prompt` writes; the markers show trainers what is learnt."""


def tokenizer_json(tokenizer: Tokenizer) -> str:
    """A tokenizer.json that the `tokenizers` library reads, with the same ids."""
    if isinstance(tokenizer, Byte):
        vocabulary = {CHARACTER[b]: b for b in range(256)} | tokenizer.special
        return from_merges(vocabulary, [], tokenizer.special)
    if isinstance(tokenizer, Char):
        return _characters(tokenizer)
    return tokenizer.json


def _characters(tokenizer: Char) -> str:
    vocabulary = {c: i for i, c in enumerate(tokenizer.characters)} | tokenizer.special
    added = [{"id": i, "content": token, **FLAGS} for token, i in tokenizer.special.items()]
    model = {"type": "BPE", "vocab": vocabulary, "merges": []}
    return json.dumps({"version": "1.0", "added_tokens": added, "decoder": {"type": "Fuse"}, "model": model})


def ids_of(tokenizer: Tokenizer, chat: bool) -> dict[str, int | None]:
    """The ids that a config.json names."""
    end = tokenizer.special.get(IM_END, tokenizer.eot_id) if chat else tokenizer.eot_id
    begin = tokenizer.prefix[0] if tokenizer.prefix else tokenizer.eot_id
    return {"bos_token_id": begin, "eos_token_id": end, "pad_token_id": tokenizer.eot_id}


def generation(tokenizer: Tokenizer, chat: bool) -> dict[str, Any]:
    """generation_config.json: a chat ends at the end of a turn or of the text."""
    ids = ids_of(tokenizer, chat)
    ends = [i for i in (ids["eos_token_id"], tokenizer.eot_id) if i is not None]
    ends = list(dict.fromkeys(ends))
    return {**ids, "eos_token_id": ends if len(ends) > 1 else ids["eos_token_id"], "do_sample": True}


def tokenizer_config(tokenizer: Tokenizer, seq_len: int, ids: dict[str, Any], template: str | None) -> dict[str, Any]:
    """tokenizer_config.json."""
    names = special_tokens(tokenizer, ids)
    own = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": seq_len}
    chat = {} if template is None else {"chat_template": template}
    return {**own, "clean_up_tokenization_spaces": False, **names, **chat}


def special_tokens(tokenizer: Tokenizer, ids: dict[str, Any]) -> dict[str, Any]:
    """special_tokens_map.json."""
    text = {i: token for token, i in tokenizer.special.items()}
    ends = {k: v[0] if isinstance(v, list) else v for k, v in ids.items()}
    names = {kind: text.get(ends.get(f"{kind}_id")) for kind in ("bos_token", "eos_token", "pad_token")}  # type: ignore[arg-type]
    return {kind: token for kind, token in names.items() if token is not None}


def template_of(config: dict[str, Any], tokenizer: Tokenizer, chat: bool) -> str | None:
    """The chat template of a run: the one that it was trained by or imported with, or ChatML for a chat model."""
    kept: str | None = config.get("template") or config.get("interop", {}).get("template")
    knows = all(token in tokenizer.special for token in CHAT_SPECIAL)
    return kept if kept is not None else CHATML if chat and knows else None
