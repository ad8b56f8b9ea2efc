"""GPT-2's tokenizer and cl100k: from tiktoken's files or its cache, encoded by tiktoken, saved as tokenizer.json."""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import tiktoken
from numpy.typing import NDArray

from fnlm.tokenizers.base import END_OF_TEXT, Tokenizer
from fnlm.tokenizers.byte_level import ORDER, merges_of, to_bytes, to_text

# How a text is cut before pairs are merged. tiktoken takes the forms with fewer steps back, for the same cuts.
GPT2_PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""
CL100K_PATTERN = (
    r"""'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+"""
    r"""|\s++$|\s*[\r\n]|\s+(?!\S)|\s"""
)
CL100K_IN_JSON = (
    r"""(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"""
    r"""|\s*[\r\n]+|\s+(?!\S)|\s+"""
)
SPECIAL = {
    "gpt2": {END_OF_TEXT: 50256},
    "cl100k": {
        END_OF_TEXT: 100257,
        "<|fim_prefix|>": 100258,
        "<|fim_middle|>": 100259,
        "<|fim_suffix|>": 100260,
        "<|endofprompt|>": 100276,
    },
}
SIZE = {"gpt2": 50256, "cl100k": 100256}  # without special tokens
DIGEST = {
    "gpt2": "a05c98a9bb6636f0d0778ef0e593770bac1befc392db5f1156cc5714b8afa64f",
    "cl100k": "070eb8c6843984b6ec907c3ec9d4abdba6017c6a0ef24e02641cd336db6e38ce",
}
FILES = {"gpt2": "vocab.bpe (and encoder.json)", "cl100k": "cl100k_base.tiktoken"}
THREADED = 1 << 15
"""Characters above which starting threads pays."""
_LIBRARY_NAME = {"gpt2": "gpt2", "cl100k": "cl100k_base"}
_PATTERN = {"gpt2": GPT2_PATTERN, "cl100k": CL100K_PATTERN}


class Pretrained(Tokenizer):
    """gpt2 or cl100k, with special tokens added behind the known ones where asked for."""

    def __init__(self, kind: str, ranks: dict[bytes, int], special: dict[str, int], json: str | None = None) -> None:
        self.kind, self._ranks, self._json = kind, ranks, json
        table = [b""] * (1 + max([*ranks.values(), *special.values()]))
        for token, i in [*ranks.items(), *((s.encode("utf-8"), i) for s, i in special.items())]:
            table[i] = token
        super().__init__(table, special)
        self._library = tiktoken.Encoding(
            kind, pat_str=_PATTERN[kind], mergeable_ranks=ranks, special_tokens=dict(special)
        )

    def encode_arrays(self, texts: Sequence[str]) -> list[NDArray[np.uint32]]:
        """On all threads."""
        return [np.array(ids, np.uint32) for ids in self.encode_batch(texts)]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """On all threads."""
        threads = os.cpu_count() or 1
        if threads == 1 or sum(map(len, texts)) < THREADED:
            return self._encode_all(texts)
        # A few parts for each thread: tiktoken's own batches hand over text by text, which costs a quarter of the time.
        part = -(-len(texts) // (8 * threads))
        with ThreadPoolExecutor(threads) as pool:
            parts = pool.map(self._encode_all, [texts[i : i + part] for i in range(0, len(texts), part)])
            return [ids for rows in parts for ids in rows]

    def _encode_all(self, texts: Sequence[str]) -> list[list[int]]:
        return [self._library.encode_ordinary(text) for text in texts]

    @cached_property
    def json(self) -> str:
        return self._json or json.dumps(self._spec(), ensure_ascii=False)

    def _spec(self) -> dict[str, Any]:
        """The same tokenizer as the `tokenizers` library describes it."""
        byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
        split = {"type": "Split", "pattern": {"Regex": CL100K_IN_JSON}, "behavior": "Isolated", "invert": False}
        both = {"type": "Sequence", "pretokenizers": [split, byte_level | {"use_regex": False}]}
        flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
        in_order = sorted(self.special.items(), key=lambda item: item[1])
        model = {
            "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
            "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": False,
            "vocab": {to_text(token): i for token, i in sorted(self._ranks.items(), key=lambda item: item[1])}
            | dict(in_order),
            "merges": [[to_text(a), to_text(b)] for a, b in merges_of(self._ranks)],
        }  # fmt: skip
        return {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": [{"id": i, "content": token, **flags} for token, i in in_order],
            "normalizer": None,
            "pre_tokenizer": byte_level if self.kind == "gpt2" else both,
            "post_processor": None,
            "decoder": byte_level,
            "model": model,
        }


def pretrained(kind: str, files: str | Path | None = None, special: Sequence[str] = ()) -> Pretrained:
    """gpt2 (50257 tokens) or cl100k (100277), from the folder or file `files`, or through tiktoken's cache.

    `special` tokens that it does not have follow behind. Raises ValueError where the files are not to be had.
    """
    ranks = _downloaded(kind) if files is None else read_ranks(kind, Path(files))
    known = dict(SPECIAL[kind])
    for token in special:
        known.setdefault(token, 1 + max(known.values()))
    return Pretrained(kind, ranks, known)


def _downloaded(kind: str) -> dict[bytes, int]:
    try:
        return tiktoken.get_encoding(_LIBRARY_NAME[kind])._mergeable_ranks
    except OSError as error:  # what `requests` raises is one
        raise ValueError(
            f"{kind} needs {FILES[kind]}, and fetching it failed ({type(error).__name__}); "
            f"give the folder that holds it: {kind}:FOLDER"
        ) from error


def read_ranks(kind: str, path: Path) -> dict[bytes, int]:
    """The bytes and rank of each token, from tiktoken's files. Raises ValueError for a missing or broken file."""
    name = FILES[kind].split()[0]
    file = path / name if path.is_dir() else path
    if not file.is_file():
        raise ValueError(f"{kind} needs {FILES[kind]}; there is no {file}")
    try:
        ranks = _from_merges(file) if kind == "gpt2" else _from_base64(file)
    except (binascii.Error, ValueError) as error:
        raise ValueError(f"{file} is not {name}: {error}") from error
    if _digest(sorted(ranks, key=ranks.__getitem__)) != DIGEST[kind]:
        raise ValueError(
            f"{file} does not hold the {SIZE[kind]} tokens of {kind} ({len(ranks)} were read); get it anew"
        )
    return ranks


def _from_merges(file: Path) -> dict[bytes, int]:
    """vocab.bpe: a first line with the version, then a merge in each, in order; encoder.json beside it must agree."""
    merges = [line.split() for line in file.read_text(encoding="utf-8").splitlines()[1:] if line]
    tokens = [bytes([b]) for b in ORDER] + [to_bytes("".join(pair)) for pair in merges]
    ranks = {token: i for i, token in enumerate(tokens)}
    encoder = file.with_name("encoder.json")
    if encoder.is_file():
        ids = json.loads(encoder.read_text(encoding="utf-8"))
        if {to_bytes(token): i for token, i in ids.items() if token != END_OF_TEXT} != ranks:
            raise ValueError(f"{encoder} numbers the tokens differently")
    return ranks


def _from_base64(file: Path) -> dict[bytes, int]:
    """A line for each token: base64, a space, the rank."""
    lines = (line.split() for line in file.read_bytes().splitlines() if line)
    return {base64.b64decode(token, validate=True): int(rank) for token, rank in lines}


def kind_of(spec: dict[str, Any], table: Sequence[bytes]) -> str | None:
    """Whether a tokenizer.json is gpt2 or cl100k, which tiktoken encodes faster; None for any other."""
    before = spec.get("pre_tokenizer") or {}
    first = (before.get("pretokenizers") or [{}])[0]
    cuts_as_gpt2 = (
        before.get("type") == "ByteLevel" and before.get("use_regex", True) and not before["add_prefix_space"]
    )
    cuts_as_cl100k = (first.get("pattern") or {}).get("Regex") == CL100K_IN_JSON
    kind = "gpt2" if cuts_as_gpt2 else "cl100k" if cuts_as_cl100k else ""
    if spec.get("normalizer") is None and kind and _digest(table[: SIZE[kind]]) == DIGEST[kind]:
        return kind
    return None


def from_table(kind: str, table: Sequence[bytes], special: dict[str, int], json: str) -> Pretrained:
    """The tokenizer of a file that `kind_of` knows."""
    return Pretrained(kind, {token: i for i, token in enumerate(table[: SIZE[kind]])}, special, json)


def _digest(tokens: Sequence[bytes]) -> str:
    return hashlib.sha256(b"".join(len(t).to_bytes(2, "big") + t for t in tokens)).hexdigest()
