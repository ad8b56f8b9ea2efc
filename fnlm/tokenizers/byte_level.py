"""The byte-level alphabet: each byte as one printable character, as GPT-2's merges and tokenizer.json write it."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain, pairwise

# Radford et al. 2019, section 2.2: bytes that print as Latin-1 stand for themselves, the others follow from U+0100 on.
_THEMSELVES = tuple(chain(range(0x21, 0x7F), range(0xA1, 0xAD), range(0xAE, 0x100)))
_OTHERS = tuple(b for b in range(256) if b not in _THEMSELVES)
ORDER = (*_THEMSELVES, *_OTHERS)
"""The bytes in the order in which GPT-2 numbers them."""
CHARACTER = {b: chr(b) for b in _THEMSELVES} | {b: chr(256 + i) for i, b in enumerate(_OTHERS)}
BYTE = {c: b for b, c in CHARACTER.items()}


def to_bytes(token: str) -> bytes:
    """The bytes that a token of the alphabet stands for. Raises ValueError for another character."""
    try:
        return bytes(BYTE[c] for c in token)
    except KeyError as error:
        raise ValueError(f"token {token!r} is not written in the byte-level alphabet") from error


def to_text(token: bytes) -> str:
    """The inverse of `to_bytes`."""
    return "".join(CHARACTER[b] for b in token)


def merges_of(ranks: dict[bytes, int]) -> list[tuple[bytes, bytes]]:
    """The pair that makes each token longer than a byte, by rank: byte pair encoding with lower ranks alone ends there.

    Raises ValueError for a table that no sequence of merges can make.
    """
    merges = []
    for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
        if len(token) > 1:
            parts = _parts(token, ranks, rank)
            if len(parts) != 2:
                raise ValueError(f"token {token!r} of rank {rank} is not made of two tokens of lower rank")
            merges.append((parts[0], parts[1]))
    return merges


def _parts(token: bytes, ranks: dict[bytes, int], below: int) -> Sequence[bytes]:
    """Byte pair encoding of one token with the ranks below its own."""
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 2:
        pairs = [(ranks.get(a + b, below), i) for i, (a, b) in enumerate(pairwise(parts))]
        rank, i = min(pairs)
        if rank >= below:
            break
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return parts
