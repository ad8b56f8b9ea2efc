"""Documents and conversations with the split that each goes to; what is validated on is left out of training."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from fnlm.data import chat
from fnlm.data.encode import Survey, assigned, hash_of, split_of, survey
from fnlm.data.inputs import Input
from fnlm.data.manifest import DataError
from fnlm.data.sources import Piece, pieces

Say = Callable[[str], None]


def surveyed(given: Input, fraction: float, say: Say) -> Survey:
    """A first reading of everything, and what is to be said of it."""
    share = fraction if given.kind == "text" and not given.val_files else 1.0
    if given.kind == "chat" and next(chat.answered(given.files), None) is None:
        names = ", ".join(file.as_posix() for file in given.files[:3])
        raise DataError(f"{names}: no conversation has an assistant's message, so that there is nothing to learn")
    found = survey(_texts(given.kind, given.files), share)
    name = "conversation" if given.kind == "chat" else "document"
    cut = given.kind == "text" and not given.val_files
    end = f"its last {100 * fraction:g} % are to validate with"
    size = f"{found.documents:,} {name}{'s' * (found.documents != 1)}, {found.bytes:,} bytes of text"
    say(f"{size}: {end}" if cut and found.documents == 1 else size)
    for number, n in found.long if cut and found.documents > 1 else ():
        say(f"document {number + 1:,} has {n:,} bytes: {end}")
    own = survey(_texts(given.kind, given.val_files)).bytes if given.val_files else 0
    return found._replace(bytes=found.bytes + own)


def _texts(kind: str, files: Any) -> Iterator[Piece]:
    """What is surveyed: documents, or a conversation as one text."""
    if kind == "chat":
        return (Piece(chat.key_of(messages)) for messages in chat.answered(files))
    return pieces(files)


class Held:
    """The hashes of what is validated on, and how many of them were met in training, how often."""

    def __init__(self, texts: Iterator[str]) -> None:
        self._all: dict[int, int] = {}
        self._met: set[int] = set()
        self.copies = 0
        for text in texts:
            h = hash_of(text)
            self._all[h] = self._all.get(h, 0) + 1

    def has(self, text: str) -> bool:
        """Whether a text of training is validated on."""
        if (h := hash_of(text)) not in self._all:
            return False
        self._met.add(h)
        self.copies += 1
        return True

    @property
    def counts(self) -> dict[str, int]:
        """For the manifest: of validation, and of training, whose copies were left out."""
        return {"validation": sum(self._all[h] for h in self._met), "train": self.copies}

    def tell(self, what: str, say: Say) -> None:
        """One line, where there is something to tell."""
        if self.copies:
            n, copies = self.counts.values()
            verb, those = ("repeats", "copy") if n == 1 else ("repeat", "copies")
            say(f"{n:,} validation {what}{'s' * (n != 1)} {verb} in train: {copies:,} {those} left out there")


def documents(
    given: Input, found: Survey, fraction: float, say: Say, repeated: dict[str, int]
) -> Iterator[tuple[str, Piece]]:
    """The pieces of texts with their split; documents that are validated on, by their first piece, only there."""
    if not given.val_files:
        yield from assigned(pieces(given.files), found, fraction)
        return
    held, left_out = Held(p.text for p in pieces(given.val_files) if p.first), False
    for piece in pieces(given.files):
        left_out = held.has(piece.text) if piece.first else left_out
        if not left_out:
            yield "train", piece
    held.tell("document", say)
    repeated |= held.counts
    yield from (("val", piece) for piece in pieces(given.val_files))


def conversations(
    given: Input, found: Survey, fraction: float, say: Say, repeated: dict[str, int]
) -> Iterator[tuple[str, chat.Messages]]:
    """Conversations with their split. Those of the validation files are left out of train, those without an answer
    everywhere."""
    if not given.val_files and found.low == found.high:
        raise DataError("all conversations are the same, or there is only one; give --val FILE")
    held = Held(chat.key_of(messages) for messages in chat.conversations(given.val_files))
    silent = 0
    for messages in chat.conversations(given.files):
        key = chat.key_of(messages)
        if not chat.is_answered(messages):
            silent += 1
        elif not held.has(key):
            yield "train" if given.val_files else split_of(hash_of(key), found, fraction), messages
    if silent:
        say(f"{silent:,} conversations without an assistant's message were left out")
    held.tell("conversation", say)
    repeated |= held.counts if given.val_files else {}
    yield from (("val", messages) for messages in chat.answered(given.val_files))
