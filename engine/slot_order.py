"""Where in a plan's cache each kv_slot lies: the conversations that decode together lie side by side.

TensorRT's cache update takes row b of a batch to row b of the cache. A conversation that begins to decode
is therefore swapped into the first rows, once, and stays: nothing moves while the same conversations run.
One swap of an 8B model's slot at capacity 1024 moves 0.4 GB on the device, once a turn.
"""

from __future__ import annotations

from collections.abc import Sequence

Swap = tuple[int, int]


class SlotOrder:
    """A permutation of `num_slots` kv_slots over as many cache rows. Pure."""

    def __init__(self, num_slots: int) -> None:
        self._row_of = list(range(num_slots))
        self._slot_at = list(range(num_slots))

    def row_of(self, kv_slot: int) -> int:
        """The cache row of a kv_slot."""
        return self._row_of[kv_slot]

    def gather(self, kv_slots: Sequence[int], num_rows: int) -> list[Swap]:
        """Bring `kv_slots` into the first `num_rows` cache rows: pairs of rows to swap, in order.

        As few as possible: a kv_slot that lies there already stays. Raises ValueError for more kv_slots
        than rows.
        """
        wanted = set(kv_slots)
        if len(wanted) > num_rows:
            raise ValueError(f"{len(wanted)} kv_slots do not fit {num_rows} rows")
        outside = [slot for slot in kv_slots if self._row_of[slot] >= num_rows]
        free = (row for row in range(num_rows) if self._slot_at[row] not in wanted)
        swaps = [(self._row_of[slot], row) for slot, row in zip(outside, free, strict=False)]
        for there, here in swaps:
            leaving, coming = self._slot_at[here], self._slot_at[there]
            self._row_of[leaving], self._row_of[coming] = there, here
            self._slot_at[here], self._slot_at[there] = coming, leaving
        return swaps
