"""Physical rows: a permutation that brings decoding slots together with the fewest swaps."""

from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st

from engine.row_map import RowMap, plan_gathering


def apply(swaps: tuple[tuple[int, int], ...], row: int) -> int:
    for one, other in swaps:
        row = other if row == one else one if row == other else row
    return row


@given(st.data())
def test_slots_end_up_side_by_side_and_no_slot_is_lost(data: st.DataObject) -> None:
    num_rows = data.draw(st.integers(1, 12))
    contents = list(range(num_rows))
    rows = RowMap(num_rows)
    for _ in range(data.draw(st.integers(1, 6))):
        slots = data.draw(st.lists(st.integers(0, num_rows - 1), min_size=1, unique=True))
        plan = rows.gather(slots)
        for one, other in plan.swaps:
            contents[one], contents[other] = contents[other], contents[one]
        span = range(plan.first_row, plan.first_row + len(slots))
        assert sorted(contents[row] for row in span) == sorted(slots)
        assert [rows.row(slot) for slot in contents] == list(range(num_rows))


def test_swaps_are_the_fewest() -> None:
    for num_rows in range(1, 7):
        for count in range(1, num_rows + 1):
            for rows in itertools.combinations(range(num_rows), count):
                plan = plan_gathering(rows, num_rows)
                moved = {apply(plan.swaps, row) for row in rows}
                assert moved == set(range(plan.first_row, plan.first_row + count))
                fewest = min(
                    len(set(rows) - set(range(first, first + count)))
                    for first in range(num_rows - count + 1)
                )
                assert len(plan.swaps) == fewest


def test_a_set_that_stays_moves_nothing() -> None:
    rows = RowMap(8)
    rows.gather([1, 4, 6])
    assert rows.gather([6, 1, 4]).swaps == ()
    assert len(rows.gather([1, 4]).swaps) <= 1
