from __future__ import annotations

import numpy as np
import pytest

from engine.slot_order import SlotOrder


def check(order: SlotOrder, contents: list[int]) -> None:
    """`contents[row]` is the kv_slot whose cache lies at `row`."""
    assert sorted(contents) == list(range(len(contents)))
    for row, slot in enumerate(contents):
        assert order.row_of(slot) == row


def apply(contents: list[int], swaps: list[tuple[int, int]]) -> None:
    for row, other in swaps:
        contents[row], contents[other] = contents[other], contents[row]


def test_what_is_there_already_stays() -> None:
    order = SlotOrder(6)
    assert order.gather([2, 0], 4) == []
    assert order.gather([5, 0], 2) == [(5, 1)]
    assert order.gather([0, 5], 2) == []
    assert (order.row_of(5), order.row_of(1)) == (1, 5)


def test_rows_follow_their_swaps_whatever_is_asked() -> None:
    rng = np.random.default_rng(0)
    for _ in range(200):
        slots = int(rng.integers(1, 12))
        order, contents = SlotOrder(slots), list(range(slots))
        for _ in range(8):
            rows = int(rng.integers(1, slots + 1))
            wanted = rng.permutation(slots)[: rng.integers(1, rows + 1)].tolist()
            outside = sum(order.row_of(slot) >= rows for slot in wanted)
            swaps = order.gather(wanted, rows)
            apply(contents, swaps)
            check(order, contents)
            assert all(order.row_of(slot) < rows for slot in wanted)
            assert len(swaps) == outside


def test_more_slots_than_rows_are_refused() -> None:
    with pytest.raises(ValueError, match="3 kv_slots do not fit 2 rows"):
        SlotOrder(4).gather([0, 1, 2], 2)
