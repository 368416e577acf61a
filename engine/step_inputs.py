"""A step plan as the arrays that the graph takes: all tokens of all rows, one after another."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from engine.protocol import Row
from engine.rotary import Rotary

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class StepInputs:
    """Inputs by the names that `CpuLowering` gives them, and where each row's logits will be.

    `logits_of[n]` = (first, end) among `logit_rows`, which hold indices into the flat batch.
    """

    token_ids: Ints
    logit_rows: Ints
    angles: Floats
    rows: Ints
    logits_of: tuple[tuple[int, int], ...]


def step_inputs(rows: Sequence[Row], rotary: Rotary) -> StepInputs:
    """Flatten at least one row."""
    counts = [len(row.tokens) for row in rows]
    fields = [
        (
            row.kv_slot,
            count,
            row.start,
            row.window.sink_tokens,
            row.window.window_tokens,
            row.window.ring_tokens,
            row.window_start,
        )
        for row, count in zip(rows, counts, strict=True)
    ]
    table = np.array(fields, dtype=np.int64)
    if len(rows) == sum(counts):
        indices, capacities = table[:, 2], table[:, 3] + table[:, 4]
    else:
        ends = np.cumsum(counts)
        offsets = np.arange(ends[-1]) - np.repeat(ends - counts, counts)
        indices = np.repeat(table[:, 2], counts) + offsets
        capacities = np.repeat(table[:, 3] + table[:, 4], counts)
    cos, sin = rotary.cos_sin(np.stack([indices, np.minimum(indices, capacities - 1)], axis=1))
    angles = np.stack([cos, sin], axis=2).reshape(len(indices), 4, -1)
    logit_rows: list[int] = []
    logits_of: list[tuple[int, int]] = []
    end = 0
    for row, count in zip(rows, counts, strict=True):
        end += count
        first = len(logit_rows)
        if row.logits == "all":
            logit_rows.extend(range(end - count, end))
        elif row.sample is not None or row.logits == "last":
            logit_rows.append(end - 1)
        logits_of.append((first, len(logit_rows)))
    return StepInputs(
        token_ids=np.concatenate([row.tokens for row in rows]).astype(np.int64, copy=False),
        logit_rows=np.array(logit_rows, dtype=np.int64),
        angles=angles,
        rows=table,
        logits_of=tuple(logits_of),
    )
