"""SinkWindow against a list that is pushed, evicted and overwritten one token at a time."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from engine.window import SinkWindow

SHAPES = [
    (sinks, window, ring)
    for sinks, window in itertools.product((0, 1, 3, 8), (1, 2, 5, 9))
    for ring in range(max(window - 1, 0), window + 4)
]


def simulate(shape: SinkWindow, length: int) -> list[int]:
    """token_index at each place after `length` tokens were written in order; -1 is empty."""
    places = [-1] * shape.slot_tokens
    ring = itertools.cycle(range(shape.sink_tokens, shape.slot_tokens))
    for token in range(length):
        if token < shape.sink_tokens:
            places[token] = token
        elif shape.ring_tokens:
            places[next(ring)] = token
    return places


@pytest.mark.parametrize(("sinks", "window", "ring"), SHAPES)
def test_places_hold_what_writing_one_token_at_a_time_leaves(
    sinks: int, window: int, ring: int
) -> None:
    shape = SinkWindow(sinks, window, ring)
    for length in range(40):
        places = simulate(shape, length)
        assert shape.tokens_at(length).tolist() == places
        for token in set(places) - {-1}:
            assert places[shape.place(token)] == token


@pytest.mark.parametrize(("sinks", "window", "ring"), SHAPES)
def test_a_query_finds_exactly_the_keys_that_per_token_eviction_keeps(
    sinks: int, window: int, ring: int
) -> None:
    """Eviction keeps S + R tokens: after each push the oldest past the sinks goes."""
    shape = SinkWindow(sinks, window, ring)
    kept: list[int] = []
    for query in range(40):
        kept.append(query)
        if len(kept) > shape.capacity:
            del kept[sinks]
        assert [key for key in range(query + 3) if shape.sees(query, key)] == kept
        assert shape.cache_position(query) == len(kept) - 1
        assert shape.num_slid(query + 1) == query + 1 - len(kept)
        stored = [*shape.tokens_at(query), query]
        (seen,) = shape.visible(np.array([query]), np.array(stored))
        assert sorted(int(key) for key, see in zip(stored, seen, strict=True) if see) == kept


def test_visible_leaves_out_what_was_not_replayed() -> None:
    shape = SinkWindow(2, 6, 9)
    queries, keys = np.arange(20, 24), np.arange(-1, 26)
    seen = shape.visible(queries, keys, window_start=18)
    for row, query in zip(seen, queries.tolist(), strict=True):
        for see, key in zip(row.tolist(), keys.tolist(), strict=True):
            present = key >= 0 and (key < 2 or key >= 18)
            assert see == (present and shape.sees(query, key))


@pytest.mark.parametrize(("sinks", "window", "ring"), SHAPES)
def test_rewind_is_allowed_exactly_when_nothing_the_next_query_sees_is_gone(
    sinks: int, window: int, ring: int
) -> None:
    shape = SinkWindow(sinks, window, ring)
    for length in range(30):
        places = set(simulate(shape, length))
        for to_length in range(length + 3):
            needed = {key for key in range(to_length) if shape.sees(to_length, key)}
            possible = to_length <= length and needed <= places
            if shape.can_rewind(length, to_length):
                assert possible
            elif to_length >= sinks:
                assert not possible


@pytest.mark.parametrize("bad", [(-1, 4, 4), (2, 0, 4), (2, 5, 3)])
def test_impossible_windows_are_refused(bad: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match=r"window|ring"):
        SinkWindow(*bad)
