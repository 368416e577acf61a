from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.conversation import ReplayLog, TokenIds
from cluster.restore import RestorePlan, plan_restore, retained_ids


def ids(*tokens: int) -> TokenIds:
    return np.array(tokens, np.int32)


def log_of(num_tokens: int, sinks: int, recent: int) -> ReplayLog:
    """The log of a conversation whose token at token_index i is 100 + i."""
    tokens = np.arange(100, 100 + num_tokens, dtype=np.int32)
    return ReplayLog(ids(), ids(), 0).advanced(tokens, sinks, recent)


def shown(plan: RestorePlan) -> tuple[list[tuple[int, list[int]]], int, str]:
    segments = [(segment.start, segment.tokens.tolist()) for segment in plan.segments]
    return segments, plan.window_start, plan.recovery


INPUT = ids(7, 8)


def test_a_new_conversation_prefills_its_input() -> None:
    assert shown(plan_restore(log_of(0, 2, 4), INPUT, None)) == ([(0, [7, 8])], 0, "none")


def test_a_resident_conversation_prefills_what_its_slot_lacks() -> None:
    log = log_of(20, 2, 6)
    assert shown(plan_restore(log, INPUT, 20)) == ([(20, [7, 8])], 0, "none")
    assert shown(plan_restore(log, INPUT, 18)) == ([(18, [118, 119, 7, 8])], 0, "none")
    assert shown(plan_restore(log, INPUT, 14))[0][0][0] == 14


def test_a_slot_that_ends_inside_the_sinks_of_a_whole_log_goes_on() -> None:
    plan = plan_restore(log_of(4, 3, 6), INPUT, 1)
    assert shown(plan) == ([(1, [101, 102, 103, 7, 8])], 0, "none")


def test_a_slot_older_than_the_log_is_restored() -> None:
    assert plan_restore(log_of(20, 2, 6), INPUT, 13).recovery == "replay"


def test_a_cold_conversation_that_fits_the_log_is_replayed_whole() -> None:
    assert shown(plan_restore(log_of(8, 2, 6), INPUT, None)) == (
        [(0, [*range(100, 108), 7, 8])],
        0,
        "exact",
    )
    assert shown(plan_restore(log_of(1, 2, 6), INPUT, None)) == ([(0, [100, 7, 8])], 0, "exact")


def test_a_long_cold_conversation_is_replayed_from_sinks_and_recent_ids() -> None:
    plan = plan_restore(log_of(20, 2, 6), INPUT, None)
    assert shown(plan) == (
        [(0, [100, 101]), (14, [114, 115, 116, 117, 118, 119, 7, 8])],
        14,
        "replay",
    )
    assert plan.num_tokens == 10


def test_without_sinks_a_replay_is_one_segment() -> None:
    plan = plan_restore(log_of(9, 0, 3), INPUT, None)
    assert shown(plan) == ([(6, [106, 107, 108, 7, 8])], 6, "replay")


def test_impossible_restores_are_refused() -> None:
    log = log_of(20, 2, 6)
    with pytest.raises(ValueError, match="input token"):
        plan_restore(log, ids(), None)
    for length in (0, 21):
        with pytest.raises(ValueError, match="slot of"):
            plan_restore(log, INPUT, length)
    with pytest.raises(ValueError, match="overlap"):
        plan_restore(ReplayLog(ids(1, 2), ids(1, 2, 3), 3), INPUT, None)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.integers(0, 60), st.integers(0, 9), st.integers(1, 30), st.integers(1, 5), st.data())
def test_a_plan_runs_the_conversations_own_tokens(
    num_tokens: int, sinks: int, recent: int, num_input: int, data: st.DataObject
) -> None:
    whole = np.arange(100, 100 + num_tokens + num_input, dtype=np.int32)
    log, new = log_of(num_tokens, sinks, recent), whole[num_tokens:]
    lengths = st.none() | st.integers(1, num_tokens) if num_tokens else st.none()
    resident = data.draw(lengths)
    plan = plan_restore(log, new, resident)
    reached = 0
    for segment in plan.segments:
        assert len(segment.tokens) > 0
        assert segment.tokens.dtype == np.int32
        assert segment.start >= reached
        reached = segment.start + len(segment.tokens)
        assert segment.tokens.tolist() == whole[segment.start : reached].tolist()
    assert reached == len(whole)
    run = {i for s in plan.segments for i in range(s.start, s.start + len(s.tokens))}
    if plan.recovery == "none":
        assert plan.window_start == 0
        assert run == set(range(resident or 0, len(whole)))
    elif plan.recovery == "exact":
        assert plan.window_start == 0
        assert run == set(range(len(whole)))
    else:
        assert run == {*range(sinks), *range(plan.window_start, len(whole))}
        assert num_tokens - plan.window_start == recent
    assert retained_ids(log, new).tolist()[-num_input:] == new.tolist()
