"""A model's cache in rows that texts take and leave at any step: prompts are read in chunks, all rows go on together.

A row keeps what it held when its text has left, and the next text that begins alike takes that over. Only one thread
uses a batch. The native step gives a row the same bits in any company; what torch reads of a prompt, in float32, may
differ in the last ones. In other types those would show, so there (`exact`) prompts are cut at fixed places, and only
what was read that way is taken over: then a text is the same to the bit, whatever its neighbours do. Where there is no
native step, every step has one shape then, and attention goes row by row.

A native step reads the weights once for all rows of all lanes, and for short prompts that are to be read beside them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fnlm.config import ModelConfig
from fnlm.decode import FEW, KVCache, Prepared, Row, decode, init_cache, together

ROWS = 8  # of a lane: what one step computes together; more lanes are made as they are needed
CHUNK, SHORT = 256, 128  # tokens of a prompt at a time: alone, and while others are written
WORTH = 16  # tokens that two prompts share, from which on the second waits until the first has read them


@dataclass(eq=False)
class Slot:
    """A row of a lane. `tokens[:filled]` is what its cache holds, of which prefill made the first `read`."""

    lane: KVCache
    row: int
    tokens: list[int] = field(default_factory=list)
    filled: int = 0
    read: int = 0
    reused: int = 0
    taken: bool = False
    used: int = 0  # when it was last left, in joins

    @property
    def missing(self) -> int:
        """How many tokens of the prompt are still to be read."""
        return len(self.tokens) - self.filled

    def view(self) -> KVCache:
        """Its row of the cache, to write into."""
        own, lane = slice(self.row, self.row + 1), self.lane
        return KVCache(lane.k[:, own], lane.v[:, own], lane.pos.new_tensor([self.filled]), lane.tokens[own])

    def text(self) -> Row:
        """The same, for a step with texts of other lanes."""
        lane, row = self.lane, self.row
        return Row(lane.k[:, row], lane.v[:, row], lane.tokens[row], self.filled)


class Batch:
    """The rows of one model. `join` a prompt, `fill` until it is read, then `advance` with a token a step; `leave`."""

    def __init__(self, weights: Prepared, cfg: ModelConfig, rows: int = ROWS, exact: bool | None = None):
        table = weights.root["embed.tokens.weight"]
        self.weights, self.cfg, self.rows = weights, cfg, rows
        self.dtype, self.device = table.dtype, table.device
        self.exact = self.dtype != torch.float32 if exact is None else exact
        self._native = weights.native is not None and self.dtype in (torch.float32, torch.bfloat16)
        self._one_shape = self.exact and not self._native
        self.slots: list[Slot] = []
        self._reading: list[Slot] = []
        self._along = 0  # tokens of prompts that the last step has read beside others
        self._joins = 0

    def join(self, prompt: list[int]) -> Slot:
        """A row for a text that begins with these tokens; what one already holds of them is not read again."""
        self._joins += 1
        best = max(self.slots, key=lambda s: self._shared(s, prompt), default=None)
        common = self._shared(best, prompt) if best else 0
        # Another text's row is not taken for a beginning that both have: that is copied when its turn comes.
        if best is None or best.taken or 2 * common <= best.filled:
            best, common = self._free(), 0
        best.tokens, best.filled, best.taken, best.reused = list(prompt), common, True, common
        best.read = min(best.read, common)
        self._reading.append(best)
        return best

    def leave(self, slot: Slot) -> None:
        """The row is free; what it holds stays until another text needs the place."""
        slot.taken, slot.used = False, self._joins
        slot.tokens = slot.tokens[: slot.filled]
        if slot in self._reading:
            self._reading.remove(slot)

    def fill(self, budget: int = CHUNK) -> list[tuple[Slot, Tensor]]:
        """Read about `budget` tokens of prompts, in turn, less what the step before has read of them; (slot, logits
        (V,)) of those that are read to the end."""
        done = list[tuple[Slot, Tensor]]()
        budget, self._along = budget - self._along, 0
        while self._reading and budget > 0:
            pieces = self._short(budget) if self._native else {}
            logits = self._together(pieces) if pieces else self._first(pieces, budget)
            budget -= sum(pieces.values())
            self._have_read(pieces)
            done += [(slot, row) for slot, row in zip(pieces, logits, strict=True) if not slot.missing]
        return done

    def advance(self, new: Mapping[Slot, int]) -> tuple[list[Slot], Tensor]:
        """One more token for each of these rows: the rows, and the logits (n, V) after each. So for prompts that were
        read to their end beside them."""
        if self._native:
            return self._advance(new)
        lanes: dict[int, list[Slot]] = {}
        for slot in new:
            lanes.setdefault(id(slot.lane), []).append(slot)
        parts = [self._step(slots, new) for slots in lanes.values()]
        return [slot for slots in lanes.values() for slot in slots], torch.cat(parts)

    def _advance(self, new: Mapping[Slot, int]) -> tuple[list[Slot], Tensor]:
        pieces = self._short(FEW)
        self._along = sum(pieces.values())
        for slot, token in new.items():
            slot.tokens.append(token)
        logits = self._together({**dict.fromkeys(new, 1), **pieces})
        self._have_read(pieces)
        slots = [*new, *pieces]
        ended = [i for i, slot in enumerate(slots) if not slot.missing]
        return [slots[i] for i in ended], logits if len(ended) == len(slots) else logits[ended]

    def _short(self, budget: int) -> dict[Slot, int]:
        """Slots, taken from those that read, whose next pieces go together in one native step, and how long these are:
        the first ones, as long as they are short. One that begins as another of them does waits for that."""
        pieces, room = dict[Slot, int](), min(budget, FEW)
        for slot in list(self._reading):
            self._take_over(slot)
            n = self._piece(slot)
            if n > room:
                break
            shared = (self._common(other.tokens, slot.tokens, len(other.tokens)) for other in pieces)
            if max(shared, default=0) < slot.filled + WORTH:
                pieces[slot], room = n, room - n
        self._reading = [slot for slot in self._reading if slot not in pieces]
        return pieces

    def _first(self, pieces: dict[Slot, int], budget: int) -> Tensor:
        """Read the next piece of the first prompt, and note how long it is: logits (1, V)."""
        slot = self._reading.pop(0)
        self._take_over(slot)
        n = pieces[slot] = self._piece(slot) if self.exact else min(slot.missing, budget)
        new = torch.tensor([slot.tokens[slot.filled : slot.filled + n]], device=self.device)
        logits, _ = decode(self.weights, new, self.cfg, slot.view())
        slot.filled += n
        return logits

    def _piece(self, slot: Slot) -> int:
        """How long the next piece of a prompt is: of several that are cut at fixed places, or all of it."""
        return min(slot.missing, SHORT - slot.filled % SHORT) if self.exact else slot.missing

    def _together(self, pieces: Mapping[Slot, int]) -> Tensor:
        """Read so many tokens of each: logits (n, V)."""
        new = [slot.tokens[slot.filled : slot.filled + n] for slot, n in pieces.items()]
        logits = together(self.weights, [slot.text() for slot in pieces], new, self.cfg)
        for slot, n in pieces.items():
            slot.filled += n
        return logits

    def _have_read(self, pieces: Mapping[Slot, int]) -> None:
        """These were of prompts; those with more to read wait for their turn again."""
        for slot in pieces:
            slot.read = slot.filled
        self._reading += [slot for slot in pieces if slot.missing]

    def _step(self, slots: list[Slot], new: Mapping[Slot, int]) -> Tensor:
        """Of the rows of one lane. The rest of those in between rest: their length is 0, so nothing is written."""
        rows = [slot.row for slot in slots]
        first, last = (0, self.rows) if self._one_shape else (min(rows), max(rows) + 1)
        lane, part = slots[0].lane, slice(first, last)
        positions, tokens, lengths = [min(s.filled for s in slots)] * (last - first), [0] * (last - first), []
        for slot in slots:
            positions[slot.row - first], tokens[slot.row - first] = slot.filled, new[slot]
            slot.tokens.append(new[slot])
            slot.filled += 1
        lengths = [int(row in rows) for row in range(first, last)]
        cache = KVCache(lane.k[:, part], lane.v[:, part], lane.pos.new_tensor(positions), lane.tokens[part])
        given = torch.tensor(tokens, device=self.device)[:, None]
        some = None if all(lengths) else torch.tensor(lengths, device=self.device)
        logits, _ = decode(self.weights, given, self.cfg, cache, lengths=some, apart=self._one_shape)
        return logits[[row - first for row in rows]]

    def _shared(self, slot: Slot, prompt: list[int]) -> int:
        """How many of a prompt's first tokens a row holds; the last is read anyway, for its logits."""
        return self._common(slot.tokens, prompt, slot.read if self.exact else slot.filled)

    def _common(self, tokens: Sequence[int], prompt: Sequence[int], read: int) -> int:
        """How many of a prompt's first tokens would be taken over of a text of which so many have been read."""
        common = agreeing(tokens, prompt, min(read, len(prompt) - 1))
        return common // SHORT * SHORT if self.exact else common

    def _take_over(self, slot: Slot) -> None:
        """Copy what another row holds of the prompt by now, where that is more."""
        best = max(self.slots, key=lambda s: self._shared(s, slot.tokens) if s is not slot else 0)
        common = self._shared(best, slot.tokens)
        if best is slot or common <= slot.filled:
            return
        new = slice(slot.filled, common)
        for to, source in ((slot.lane.k, best.lane.k), (slot.lane.v, best.lane.v)):
            to[:, slot.row, :, new] = source[:, best.row, :, new]
        if slot.lane.tokens.shape[1]:
            slot.lane.tokens[slot.row, new] = best.lane.tokens[best.row, new]
        slot.reused += common - slot.filled
        slot.filled = slot.read = common

    def _free(self) -> Slot:
        """The row left longest ago, of a new lane where there is none; without a native step, which takes all lanes at
        once, of the lane that has most texts."""
        free = [slot for slot in self.slots if not slot.taken]
        if not free:
            lane = init_cache(self.cfg, self.rows, dtype=self.dtype, device=self.device)
            free = [Slot(lane, row) for row in range(self.rows)]
            self.slots += free
        crowd = Counter(id(slot.lane) for slot in self.slots if slot.taken and not self._native)
        return min(free, key=lambda slot: (-crowd[id(slot.lane)], slot.used))


def agreeing(a: Sequence[int], b: Sequence[int], most: int) -> int:
    """How many of the first tokens are the same, at most `most`; by halves, since lists compare quickly."""
    low, high = 0, most
    while low < high:
        middle = (low + high + 1) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low
