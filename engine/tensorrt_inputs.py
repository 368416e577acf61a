"""A step plan as passes of a TensorRT plan, and a pass as the arrays that the graph takes.

    plan -> rows of one token: decode passes [batch, 1]
         -> longer rows, cut where their ring ends: prefill passes [1, chunk], in order

Pure NumPy. The same arrays run the graph on ONNX Runtime, which is how tests hold them to the oracle.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from engine.protocol import Row
from engine.rotary import Rotary

Floats = npt.NDArray[np.float32]
Int32s = npt.NDArray[np.int32]
Int64s = npt.NDArray[np.int64]

FARTHEST = 2**30
"""Indices and ages are cut off here, where no window reaches, so that int32 holds them."""

_NOTHING = (0, 1, 1, 0, -1, -1)


@dataclass(frozen=True, slots=True)
class Piece:
    """Tokens `begin` to `end` of rows[number] of a plan; they lie at consecutive places."""

    number: int
    begin: int
    end: int


@dataclass(frozen=True, slots=True)
class PassInputs:
    """Inputs by the names that `TensorRtLowering` gives them."""

    token_ids: Int64s
    angles: Floats
    write_places: Int64s
    query_ages: Int32s
    row_fields: Int32s
    logit_rows: Int64s

    @property
    def batch(self) -> int:
        return int(self.token_ids.shape[0])

    @property
    def chunk(self) -> int:
        return int(self.token_ids.shape[1])


def check_rings(rows: Sequence[Row]) -> None:
    """Raises ValueError for a ring without a place for the current token: keys are written before they
    are read here."""
    for number, row in enumerate(rows):
        window = row.window
        if window.ring_tokens < window.window_tokens:
            raise ValueError(
                f"rows[{number}].window.ring_tokens: {window.ring_tokens} < "
                f"{window.window_tokens} window_tokens"
            )


def cut_row(number: int, row: Row) -> list[Piece]:
    """The pieces of a row, in order.

    A piece ends where the ring does, as the cache update writes places in a row; and it is so short that
    its last token overwrites no key that its first query sees.
    """
    window = row.window
    longest = window.ring_tokens - window.window_tokens + 1
    pieces = []
    begin = 0
    while begin < len(row.tokens):
        to_ring_end = window.slot_tokens - window.place(row.start + begin)
        end = min(len(row.tokens), begin + min(longest, to_ring_end))
        pieces.append(Piece(number, begin, end))
        begin = end
    return pieces


def decode_inputs(
    rows: Sequence[Row], at: Sequence[int], batch: int, spare_place: int, rotary: Rotary
) -> PassInputs:
    """One token of each of `rows`, row n of them as row `at[n]` of a batch.

    Other rows of the batch do nothing: they see no key and write at `spare_place`, which nobody sees.
    `logit_rows` has as many entries as the batch: `at`, then zeros.
    """
    where = np.array(at, dtype=np.int64)
    tokens = np.zeros((batch, 1), dtype=np.int64)
    tokens[where, 0] = [row.tokens[0] for row in rows]
    fields = np.tile(np.array(_NOTHING, dtype=np.int32), (batch, 1))
    fields[where] = [_fields(row, row.start) for row in rows]
    places = np.full(batch, spare_place, dtype=np.int64)
    places[where] = [row.window.place(row.start) for row in rows]
    indices = np.zeros((batch, 1), dtype=np.int64)
    indices[where, 0] = [row.start for row in rows]
    capacities = np.ones((batch, 1), dtype=np.int64)
    capacities[where, 0] = [row.window.capacity for row in rows]
    logit_rows = np.zeros(batch, dtype=np.int64)
    logit_rows[: len(where)] = where
    return PassInputs(
        token_ids=tokens,
        angles=_angles(indices, capacities, rotary),
        write_places=places,
        query_ages=np.zeros(1, dtype=np.int32),
        row_fields=fields,
        logit_rows=logit_rows,
    )


def prefill_inputs(row: Row, piece: Piece, every_logit: bool, rotary: Rotary) -> PassInputs:
    """One piece of a row, alone; logits of each of its tokens, or of the last one."""
    count = piece.end - piece.begin
    first = row.start + piece.begin
    indices = np.arange(first, first + count, dtype=np.int64)[None]
    capacities = np.full((1, 1), row.window.capacity, dtype=np.int64)
    return PassInputs(
        token_ids=row.tokens[piece.begin : piece.end].astype(np.int64)[None],
        angles=_angles(indices, capacities, rotary),
        write_places=np.array([row.window.place(first)], dtype=np.int64),
        query_ages=np.arange(count - 1, -1, -1, dtype=np.int32),
        row_fields=np.array([_fields(row, first + count - 1)], dtype=np.int32),
        logit_rows=np.arange(0 if every_logit else count - 1, count, dtype=np.int64),
    )


def starts_anew(row: Row) -> bool:
    """Whether nothing before this row's first token can be seen: what its kv_slot held is forgotten."""
    absent = row.window.sink_tokens == 0 and row.window_start >= row.start
    return row.start == 0 or absent


def _fields(row: Row, last: int) -> tuple[int, int, int, int, int, int]:
    """`row_fields` of a piece that ends with token_index `last`."""
    window = row.window
    ring_token = last - window.sink_tokens
    newest, oldest_age = 0, -1
    if ring_token >= 0:
        newest = ring_token % window.ring_tokens
        oldest_age = min(last - max(window.sink_tokens, row.window_start), FARTHEST)
    return (
        window.sink_tokens,
        window.window_tokens,
        window.ring_tokens,
        newest,
        oldest_age,
        min(last, FARTHEST),
    )


def _angles(indices: Int64s, capacities: Int64s, rotary: Rotary) -> Floats:
    """float32 [4, batch, chunk, rotary_dim / 2]."""
    cos, sin = rotary.cos_sin(np.stack([indices, np.minimum(indices, capacities - 1)]))
    return np.stack([cos[0], sin[0], cos[1], sin[1]])
