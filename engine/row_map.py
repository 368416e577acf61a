"""Which physical row holds each kv_slot, so that a step's decode rows lie side by side.

A run reads a contiguous range of physical rows where they are. Slots keep their ids; when the set of
decoding slots changes, a few rows trade places, and steps in between move nothing. Pure integers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

Swap = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Gathering:
    """Swap these pairs of rows, in any order, and the slots fill `first_row` and the rows after it."""

    first_row: int
    swaps: tuple[Swap, ...]


def plan_gathering(rows: Sequence[int], num_rows: int) -> Gathering:
    """The fewest swaps that bring the distinct `rows` together, among 0 .. num_rows - 1."""
    count = len(rows)
    present = [0] * (num_rows + 1)
    for row in rows:
        present[row] = 1
    inside = sum(present[:count])
    best, first_row = inside, 0
    for first in range(1, num_rows - count + 1):
        inside += present[first + count - 1] - present[first - 1]
        if inside > best:
            best, first_row = inside, first
    wanted = range(first_row, first_row + count)
    strays = [row for row in rows if row not in wanted]
    holes = [row for row in wanted if not present[row]]
    return Gathering(first_row, tuple(zip(strays, holes, strict=True)))


class RowMap:
    """A permutation: kv_slot -> physical row."""

    def __init__(self, num_rows: int) -> None:
        self._row_of = list(range(num_rows))
        self._slot_at = list(range(num_rows))

    def row(self, kv_slot: int) -> int:
        """The physical row of a kv_slot."""
        return self._row_of[kv_slot]

    def gather(self, kv_slots: Sequence[int]) -> Gathering:
        """Bring distinct kv_slots together; the caller moves the rows as the result says."""
        plan = plan_gathering([self._row_of[slot] for slot in kv_slots], len(self._row_of))
        for one, other in plan.swaps:
            slot, other_slot = self._slot_at[one], self._slot_at[other]
            self._row_of[slot], self._row_of[other_slot] = other, one
            self._slot_at[one], self._slot_at[other] = other_slot, slot
        return plan
