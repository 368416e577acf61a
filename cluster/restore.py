"""What to run so that a turn finds its conversation in the cache. Pure: token ids in, segments out.

    resident   |======== in the slot ========|-- rest of log --|-- input --|     "none"
    cold       |----------------- whole log -------------------|-- input --|     "exact"
    cold       |-sinks-|   gone   |-------- recent ids --------|-- input --|     "replay"

A bounded replay leaves out window tokens before its `window_start`. What that costs in exactness is a
matter of how many windows the log keeps: four are below rounding error on models measured so far.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from cluster.conversation import ReplayLog, TokenIds


@dataclass(frozen=True, slots=True)
class RestoreSegment:
    """Consecutive tokens to prefill from token_index `start` on, int32, at least one."""

    start: int
    tokens: TokenIds


@dataclass(frozen=True, slots=True)
class RestorePlan:
    """Segments in order, the last one ending with the input; see `engine.turn.Prefill`."""

    segments: tuple[RestoreSegment, ...]
    window_start: int
    recovery: Literal["none", "exact", "replay"]

    @property
    def num_tokens(self) -> int:
        return sum(len(segment.tokens) for segment in self.segments)


def plan_restore(log: ReplayLog, input_ids: TokenIds, resident_length: int | None) -> RestorePlan:
    """What to prefill for a turn of `input_ids` after the conversation in `log`.

    `resident_length` is the number of the conversation's tokens that a valid slot holds, None when
    cold. A slot that ends before the recent ids cannot be continued: the turn restores. Raises
    ValueError for an empty input, a slot longer than the log and a log without its sinks.
    """
    if not len(input_ids):
        raise ValueError("a turn needs at least one input token")
    if not len(log.sink_ids) <= log.recent_start:
        raise ValueError("the recent ids overlap the sinks")
    if resident_length is not None:
        if not 0 < resident_length <= log.token_count:
            raise ValueError(f"a slot of {resident_length} tokens for a log of {log.token_count}")
        if log.is_whole or resident_length >= log.recent_start:
            rest = np.concatenate([_tail(log, resident_length), input_ids])
            return RestorePlan((RestoreSegment(resident_length, rest),), 0, "none")
    tail = RestoreSegment(log.recent_start, np.concatenate([log.recent_ids, input_ids]))
    if log.is_whole:
        whole = RestoreSegment(0, retained_ids(log, input_ids))
        return RestorePlan((whole,), 0, "exact" if log.token_count else "none")
    sinks = (RestoreSegment(0, log.sink_ids),) if len(log.sink_ids) else ()
    return RestorePlan((*sinks, tail), log.recent_start, "replay")


def retained_ids(log: ReplayLog, input_ids: TokenIds) -> TokenIds:
    """The tokens that penalties count: what is left of the conversation, then the input, int32."""
    return np.concatenate([log.sink_ids, log.recent_ids, input_ids])


def _tail(log: ReplayLog, start: int) -> TokenIds:
    """The log from token_index `start` on, which it must hold."""
    if start >= log.recent_start:
        return log.recent_ids[start - log.recent_start :]
    return np.concatenate([log.sink_ids[start:], log.recent_ids])
