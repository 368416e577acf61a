"""A step plan as one vector of int64, so that one copy brings it to the device.

    token_ids [tokens] | token_rows [tokens] | rows [rows, 8] | tiles [tiles, 2] | logit_rows [logits]

A decode step is padded to a bucket: rows without tokens, which write nothing and see nothing.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from engine.protocol import Row

Ints = npt.NDArray[np.int64]

ROW_FIELDS = 8
"""kv_slot, tokens, start, sink_tokens, window_tokens, ring_tokens, window_start, first (where the row's
tokens begin in the flat batch)."""


@dataclass(frozen=True, slots=True)
class Layout:
    """How many of each there are. A decode step's `tokens`, `rows`, `tiles` and `logits` are its bucket."""

    tokens: int
    rows: int
    tiles: int
    logits: int

    @property
    def spans(self) -> tuple[tuple[int, int], ...]:
        """(begin, end) of the five parts. Each begins at 16 bytes, as kernels are compiled to expect."""
        return _spans(self)

    @property
    def num_words(self) -> int:
        """Length of the vector."""
        return self.spans[-1][1]


@functools.lru_cache(maxsize=256)
def _spans(layout: Layout) -> tuple[tuple[int, int], ...]:
    sizes = (
        layout.tokens,
        layout.tokens,
        layout.rows * ROW_FIELDS,
        2 * layout.tiles,
        layout.logits,
    )
    begins = [0, *itertools.accumulate(size + size % 2 for size in sizes)]
    return tuple((begin, begin + size) for begin, size in zip(begins, sizes, strict=False))


@dataclass(frozen=True, slots=True)
class PackedStep:
    """`logits_of[n]` = (first, end) of row n among the step's logits; `draw_at` says the same of each row
    that samples, in their order; `decode` if all rows have one token."""

    layout: Layout
    words: Ints
    logits_of: tuple[tuple[int, int], ...]
    draw_at: tuple[int, ...]
    decode: bool


def num_logits(row: Row) -> int:
    """The most rows of logits that a row of a step takes."""
    return (len(row.tokens) if row.logits == "all" else 0) + 1


def most_words(tokens: int, rows: int, logits: int) -> int:
    """Length of the longest vector of so many tokens and rows: a tile has at least one token."""
    return Layout(tokens, rows, tokens, logits).num_words


def bucket_layout(bucket: int) -> Layout:
    """The layout of every decode step of at most `bucket` rows."""
    return Layout(bucket, bucket, bucket, bucket)


def pack_decode(rows: Sequence[Row], bucket: int) -> PackedStep:
    """Rows of one token each, every one of them with logits."""
    layout = bucket_layout(bucket)
    words = np.zeros(layout.num_words, dtype=np.int64)
    ids, token_rows, table, tiles, logit_rows = _parts(words, layout)
    count = len(rows)
    ids[:count] = [int(row.tokens[0]) for row in rows]
    token_rows[:] = tiles[:, 0] = logit_rows[:] = np.arange(bucket)
    table[:, 7] = np.arange(bucket)
    if count:
        table[:count, :7] = _fields(rows)
    draw_at = tuple(n for n, row in enumerate(rows) if row.sample is not None)
    return PackedStep(layout, words, tuple((n, n + 1) for n in range(count)), draw_at, decode=True)


def pack_mixed(rows: Sequence[Row], queries: int) -> PackedStep:
    """Any rows; attention takes `queries` tokens of a row at a time.

    Logits that tokens are drawn from come first and side by side, so that the sampler reads them where
    they are; a row that samples and wants to see all its logits has its last ones twice.
    """
    counts = np.array([len(row.tokens) for row in rows], dtype=np.int64)
    ends = np.cumsum(counts)
    firsts = ends - counts
    tiles = [
        (number, first)
        for number, count in enumerate(counts.tolist())
        for first in range(0, count, queries)
    ]
    drawing = [number for number, row in enumerate(rows) if row.sample is not None]
    logit_rows: list[int] = (ends[drawing] - 1).tolist()
    logits_of = []
    drawn = 0
    for row, begin, end in zip(rows, firsts.tolist(), ends.tolist(), strict=True):
        first = len(logit_rows)
        if row.logits == "all":
            logit_rows.extend(range(begin, end))
        elif row.logits == "last" and row.sample is None:
            logit_rows.append(end - 1)
        shown = (first, len(logit_rows))
        if row.sample is not None:
            shown = shown if row.logits == "all" else (drawn, drawn + 1)
            drawn += 1
        logits_of.append(shown)
    layout = Layout(int(ends[-1]), len(rows), len(tiles), len(logit_rows))
    words = np.zeros(layout.num_words, dtype=np.int64)
    ids, token_rows, table, tile_table, wanted = _parts(words, layout)
    ids[:] = np.concatenate([row.tokens for row in rows])
    token_rows[:] = np.repeat(np.arange(len(rows)), counts)
    table[:, :7], table[:, 7] = _fields(rows), firsts
    tile_table[:] = tiles
    wanted[:] = logit_rows
    draw_at = tuple(range(len(drawing)))
    return PackedStep(layout, words, tuple(logits_of), draw_at, decode=False)


def _fields(rows: Sequence[Row]) -> list[tuple[int, ...]]:
    return [
        (
            row.kv_slot,
            len(row.tokens),
            row.start,
            row.window.sink_tokens,
            row.window.window_tokens,
            row.window.ring_tokens,
            row.window_start,
        )
        for row in rows
    ]


def _parts(words: Ints, layout: Layout) -> tuple[Ints, ...]:
    ids, token_rows, table, tiles, logits = (words[begin:end] for begin, end in layout.spans)
    return ids, token_rows, table.reshape(-1, ROW_FIELDS), tiles.reshape(-1, 2), logits
