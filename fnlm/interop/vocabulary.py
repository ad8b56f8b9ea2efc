"""Other tools' vocabularies as the text of a tokenizer.json, and their chat templates."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fnlm.checkpoint.files import CheckpointError
from fnlm.interop.stored import read_json
from fnlm.tokenizers import END_OF_TEXT, FILE

SPACE = "\u2581"  # how SentencePiece writes a space
FLAGS = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
UNKNOWN, BEGIN, END = "<unk>", "<s>", "</s>"


def text_of(path: Path) -> str:
    """A text file. CheckpointError where it is not UTF-8."""
    try:
        return path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path} is not UTF-8 at byte {error.start}") from error


def of_folder(folder: Path) -> str | None:
    """tokenizer.json, or what vocab.json and merges.txt say; None where there is neither."""
    if (folder / FILE).is_file():
        return text_of(folder / FILE)
    if (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
        lines = text_of(folder / "merges.txt").splitlines()
        merges = [line for line in lines if line and not line.startswith("#version")]
        vocabulary = read_json(folder / "vocab.json")
        return from_merges(vocabulary, merges, _special(folder, vocabulary))
    return None


def _special(folder: Path, vocabulary: dict[str, int]) -> dict[str, int]:
    """The special tokens and their ids, by tokenizer_config.json; <|endoftext|> where it is silent."""
    file = folder / "tokenizer_config.json"
    added = read_json(file).get("added_tokens_decoder", {}) if file.is_file() else {}
    found = {token["content"]: int(i) for i, token in added.items() if token.get("special", True)}
    return found or {token: vocabulary[token] for token in (END_OF_TEXT,) if token in vocabulary}


def from_merges(vocabulary: dict[str, int], merges: Sequence[str], special: dict[str, int], before: Any = None) -> str:
    """A byte-level tokenizer, cut before merging as GPT-2's unless `before` is another pre-tokenizer."""
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    model = {"type": "BPE", "vocab": vocabulary, "merges": [_pair(line) for line in merges], **_PLAIN}
    return _file(model, special, None, before or level, None, level)


def _pair(line: str) -> list[str]:
    pair = line.split(" ")
    if len(pair) != 2:
        raise CheckpointError(f"the merge {line[:40]!r} is not two tokens")
    return pair


_PLAIN: dict[str, Any] = {
    "dropout": None, "unk_token": None, "continuing_subword_prefix": None, "end_of_word_suffix": None,
    "fuse_unk": False, "byte_fallback": False, "ignore_merges": False,
}  # fmt: skip


def from_pieces(pieces: Sequence[str], scores: Sequence[float], begin: int = 1, end: int = 2) -> str:
    """A SentencePiece BPE vocabulary with bytes to fall back on, as Llama 2's: a higher score merges sooner.

    Spaces are written as U+2581, bytes as <0x0A>. A text begins with a space and, in front of it, `begin`.
    """
    ids = {piece: i for i, piece in enumerate(pieces)}
    whole = {p: i for p, i in ids.items() if not (p.startswith("<0x") and len(p) == 6) and i not in (0, begin, end)}
    found = []
    for piece, i in whole.items():
        cuts = [(piece[:n], piece[n:]) for n in range(1, len(piece))]
        found += [(-scores[i], whole[a], whole[b], a, b) for a, b in cuts if a in whole and b in whole]
    model = {"type": "BPE", "vocab": ids, "merges": [[a, b] for *_, a, b in sorted(found)], **_PLAIN}
    model |= {"unk_token": pieces[0], "fuse_unk": True, "byte_fallback": True}
    spaces = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    before = {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": SPACE}, spaces]}
    back = {"type": "Replace", "pattern": {"String": SPACE}, "content": " "}
    steps = [back, {"type": "ByteFallback"}, {"type": "Fuse"}, {"type": "Strip", "content": " ", "start": 1, "stop": 0}]
    token = {"id": pieces[begin], "ids": [begin], "tokens": [pieces[begin]]}
    first, second = ({"Sequence": {"id": x, "type_id": i}} for i, x in enumerate("AB"))
    marks = [{"SpecialToken": {"id": pieces[begin], "type_id": i}} for i in range(2)]
    after = {
        "type": "TemplateProcessing", "single": [marks[0], first], "pair": [marks[0], first, marks[1], second],
        "special_tokens": {pieces[begin]: token},
    }  # fmt: skip
    special = {pieces[i]: i for i in (0, begin, end)}
    return _file(model, special, before, None, after, {"type": "Sequence", "decoders": steps})


def _file(model: Any, special: dict[str, int], normalizer: Any, before: Any, after: Any, decoder: Any) -> str:
    added = [{"id": i, "content": token, **FLAGS} for token, i in sorted(special.items(), key=lambda item: item[1])]
    spec = {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": added, "normalizer": normalizer,
        "pre_tokenizer": before, "post_processor": after, "decoder": decoder, "model": model,
    }  # fmt: skip
    return json.dumps(spec, ensure_ascii=False)


def template_of(folder: Path) -> str | None:
    """The chat template: chat_template.jinja, else in tokenizer_config.json the only one, or that named default."""
    if (folder / "chat_template.jinja").is_file():
        return text_of(folder / "chat_template.jinja")
    file = folder / "tokenizer_config.json"
    found = read_json(file).get("chat_template") if file.is_file() else None
    if isinstance(found, list):
        found = {t["name"]: t["template"] for t in found}.get("default")
    return found if isinstance(found, str) else None
