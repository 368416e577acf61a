"""The vectorised inputs of a step, held to SinkWindow."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from engine.protocol import Row
from engine.step_inputs import pieces, place_spans, visible_chunk, visible_past
from engine.window import SinkWindow


@st.composite
def windows(draw: st.DrawFn) -> SinkWindow:
    window = draw(st.integers(1, 9))
    return SinkWindow(draw(st.integers(0, 6)), window, window - 1 + draw(st.integers(0, 4)))


@st.composite
def rows(draw: st.DrawFn, max_tokens: int = 1) -> Row:
    start = draw(st.one_of(st.integers(0, 60), st.integers(16_000_000, 16_000_060)))
    window_start = draw(st.integers(max(0, start - 12), start + 2))
    tokens = np.zeros(draw(st.integers(1, max_tokens)), np.int32)
    return Row(0, start, tokens, draw(windows()), window_start)


@given(st.lists(rows(), min_size=1, max_size=5), st.integers(0, 3))
def test_visible_past_is_what_the_window_says(batch: list[Row], spare: int) -> None:
    places = max(row.window.slot_tokens for row in batch) + spare
    got = visible_past(batch, places)
    for seen, row in zip(got, batch, strict=True):
        keys = np.full(places, -1)
        keys[: row.window.slot_tokens] = row.window.tokens_at(row.start)
        (wanted,) = row.window.visible(np.array([row.start]), keys, row.window_start)
        assert seen.tolist() == wanted.tolist()


@given(rows(max_tokens=7))
def test_visible_chunk_is_what_each_of_its_queries_sees(row: Row) -> None:
    places = row.window.slot_tokens + 2
    stored = [*row.window.tokens_at(row.start).tolist(), -1, -1]
    got = visible_chunk(row, places)
    for number in range(len(row.tokens)):
        query = row.start + number
        keys = [*stored, *range(row.start, row.start + len(row.tokens))]
        for seen, key in zip(got[number].tolist(), keys, strict=True):
            present = key >= 0 and (key < row.window.sink_tokens or key >= row.window_start)
            assert seen == (present and row.window.sees(query, key))


@given(windows(), st.integers(0, 60), st.integers(1, 9))
def test_spans_visit_the_place_of_every_token(window: SinkWindow, start: int, count: int) -> None:
    if window.ring_tokens == 0:
        return
    got = [
        (offset + n, place + n)
        for offset, place, length in place_spans(window, start, count)
        for n in range(length)
    ]
    assert got == [(n, window.place(start + n)) for n in range(count)]


@given(rows(max_tokens=40))
def test_pieces_are_all_of_a_row_and_each_can_run_at_once(row: Row) -> None:
    window, last = row.window, 0
    for begin, end in pieces(row):
        assert begin == last
        assert end > begin
        last = end
        assert end - begin <= max(window.ring_tokens, 1)
        if row.start + begin < window.sink_tokens:
            assert row.start + end <= max(window.capacity, window.sink_tokens)
    assert last == len(row.tokens)
