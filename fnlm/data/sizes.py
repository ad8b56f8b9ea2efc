"""How many sequences a step sees, where that changes in the course of a training."""

from __future__ import annotations

from dataclasses import dataclass

from fnlm.config import check_ramp


@dataclass(frozen=True)
class Sizes:
    """A batch size for every step: `pieces` are (until step, size), in order, and `last` is the size from there on.

    `Sizes(((100, 4), (300, 8)), 16)`: 4 before step 100, 8 before step 300, then 16. Raises ValueError with the remedy.
    """

    pieces: tuple[tuple[int, int], ...]
    last: int

    def __post_init__(self) -> None:
        check_ramp(self.pieces, "pieces")
        if self.last < 1:
            raise ValueError(f"batch_size={self.last} must be at least 1")

    def at(self, step: int) -> int:
        """The size of a step's batch."""
        return next((size for until, size in self.pieces if step < until), self.last)

    def first(self, step: int) -> int:
        """The number of a step's first sequence, counted from the start of training: how many went before."""
        total = start = 0
        for until, size in self.pieces:
            if step < until:
                return total + (step - start) * size
            total, start = total + (until - start) * size, until
        return total + (step - start) * self.last


def sizes_of(batch_size: int | Sizes) -> Sizes:
    """One size for all steps, where it is a number."""
    return batch_size if isinstance(batch_size, Sizes) else Sizes((), batch_size)
