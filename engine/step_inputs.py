"""What a run of the graph needs besides tokens and weights: visibility and places, as arrays.

Vectorised forms of `SinkWindow`; `tests/test_step_inputs.py` holds them to it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

from engine.protocol import Row
from engine.window import SinkWindow

Bools = npt.NDArray[np.bool_]
Ints = npt.NDArray[np.int64]
Span = tuple[int, int, int]


def visible_past(rows: Sequence[Row], num_places: int) -> Bools:
    """Which places the first token of each row sees: bool [len(rows), num_places].

    Equals `window.visible([start], window.tokens_at(start), window_start)`, for all rows at once.
    """
    fields = [
        (
            row.window.sink_tokens,
            max(row.window.ring_tokens, 1),
            row.start - 1,
            min(row.window.window_tokens - 1, row.window.ring_tokens),
            row.start - max(row.window.sink_tokens, row.window_start),
        )
        for row in rows
    ]
    sinks, ring, newest, window, present = np.array(fields, dtype=np.int64).T[..., None]
    places = np.arange(num_places, dtype=np.int64)[None, :]
    age = (newest - places) % ring
    in_window = (places >= sinks) & (places < sinks + ring) & (age < np.minimum(window, present))
    visible: Bools = in_window | (places < np.minimum(sinks, newest + 1))
    return visible


def visible_chunk(row: Row, num_places: int) -> Bools:
    """What each token of a chunk sees: bool [len(tokens), num_places + len(tokens)], past then chunk."""
    queries = row.start + np.arange(len(row.tokens), dtype=np.int64)
    past = np.full(num_places, -1, dtype=np.int64)
    past[: row.window.slot_tokens] = row.window.tokens_at(row.start)
    return row.window.visible(queries, np.concatenate([past, queries]), row.window_start)


def place_spans(window: SinkWindow, start: int, count: int) -> Iterator[Span]:
    """Contiguous runs of places for `count` tokens from token_index `start`.

    Yields (offset from start, first place, length); at most `ring_tokens` may be given past the sinks.
    """
    done = 0
    while done < count:
        place = window.place(start + done)
        end = window.sink_tokens if place < window.sink_tokens else window.slot_tokens
        length = min(count - done, end - place)
        yield done, place, length
        done += length


def pieces(row: Row) -> Iterator[tuple[int, int]]:
    """Cut a row's tokens, as (begin, end) offsets, so that each part can run at once.

    A part may not overrun the ring, nor hold both a sink and a query so far on that the sink has moved
    for it: sinks are moved only for keys that are cached already.
    """
    window, begin, count = row.window, 0, len(row.tokens)
    while begin < count:
        end = min(count, begin + max(window.ring_tokens, 1))
        holds_a_sink = row.start + begin < window.sink_tokens
        if holds_a_sink and row.start + end > window.capacity:
            end = window.sink_tokens - row.start
        yield begin, end
        begin = end
