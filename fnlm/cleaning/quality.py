"""The quality and repetition rules of MassiveText (Rae et al. 2021, appendix A1.1 and table A1), "Gopher's rules"."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

WORDS = (50, 100_000)
MEAN_LENGTH = (3.0, 10.0)
SYMBOLS, BULLETS, ELLIPSES, LETTERS, STOP_WORDS = 0.1, 0.9, 0.3, 0.8, 2
STOP = frozenset(("the", "be", "to", "of", "and", "that", "have", "with"))
REPEATED = {"line": (0.30, 0.20), "paragraph": (0.30, 0.20)}
"""The largest share of repeated lines and paragraphs, and of the characters in them."""
TOP = {2: 0.20, 3: 0.18, 4: 0.16}
"""The largest share of characters in the most frequent n-gram of words."""
ANY = {5: 0.15, 6: 0.14, 7: 0.13, 8: 0.12, 9: 0.11, 10: 0.10}
"""The largest share of characters in all n-grams of words that occur more than once, each character counted once."""
_BULLET = ("•", "●", "-", "*", "‣", "◦")
_ELLIPSIS = ("...", "…")


def gopher(text: str) -> str | None:
    """The first rule that a text breaks, in words for a count; None for one that is kept.

    Rules on words and lines first, then those on repetition. The rules are made for English: of the words `the be to of
    and that have with` two must occur.
    """
    return quality(text) or repetition(text)


def quality(text: str) -> str | None:
    """The rules on the number and the length of words, on symbols, bullets, ellipses, letters and stop words."""
    words = text.split()
    n = len(words)
    if not WORDS[0] <= n <= WORDS[1]:
        return "number of words"
    if not MEAN_LENGTH[0] <= sum(map(len, words)) / n <= MEAN_LENGTH[1]:
        return "mean word length"
    ellipses = text.count("...") + text.count("…")
    if text.count("#") > SYMBOLS * n or ellipses > SYMBOLS * n:
        return "symbols"
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if sum(line.startswith(_BULLET) for line in lines) > BULLETS * len(lines):
        return "bullets"
    if sum(line.endswith(_ELLIPSIS) for line in lines) > ELLIPSES * len(lines):
        return "lines that end in an ellipsis"
    if sum(any(map(str.isalpha, word)) for word in words) < LETTERS * n:
        return "words without a letter"
    if len(STOP & {word.strip(".,;:!?\"'()").lower() for word in words}) < STOP_WORDS:
        return "stop words"
    return None


def repetition(text: str) -> str | None:
    """The rules of table A1 on repeated lines, paragraphs and n-grams of words."""
    for what, parts in (("line", text.split("\n")), ("paragraph", re.split(r"\n{2,}", text))):
        count, characters = _repeated([part for part in parts if part.strip()])
        most, most_characters = REPEATED[what]
        if count > most or characters > most_characters:
            return f"repeated {what}s"
    words = text.split()
    total = sum(map(len, words))
    for n, most in TOP.items():
        if _top(words, n) > most * total:
            return f"most frequent {n}-gram"
    for n, most in ANY.items():
        if _covered(words, n) > most * total:
            return f"repeated {n}-grams"
    return None


def _repeated(parts: Sequence[str]) -> tuple[float, float]:
    """The share of parts that came before, and of their characters."""
    seen: set[str] = set()
    count = characters = 0
    for part in parts:
        if part in seen:
            count, characters = count + 1, characters + len(part)
        seen.add(part)
    total = sum(map(len, parts))
    return (count / len(parts), characters / total) if total else (0.0, 0.0)


def _top(words: Sequence[str], n: int) -> int:
    """The characters in all occurrences of the n-gram that covers most; 0 where none occurs twice."""
    counts = Counter(zip(*(words[i:] for i in range(n)), strict=False))
    return max((k * sum(map(len, gram)) for gram, k in counts.items() if k > 1), default=0)


def _covered(words: Sequence[str], n: int) -> int:
    """The characters of the words that n-grams which came before cover, each word once."""
    seen: set[tuple[str, ...]] = set()
    total = end = 0
    for i, gram in enumerate(zip(*(words[j:] for j in range(n)), strict=False)):
        if gram in seen:
            total += sum(map(len, words[max(i, end) : i + n]))
            end = i + n
        seen.add(gram)
    return total
