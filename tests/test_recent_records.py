from __future__ import annotations

import dataclasses

from cluster.conversation import Conversation
from deployments.recent_records import RecentRecords

RECORD = Conversation(
    conversation_id="a",
    tenant="t",
    fingerprint="f",
    sink_tokens=4,
    window_tokens=28,
    turn=1,
    token_count=10,
    head="h1",
    history="x1",
    owner="r",
    epoch=1,
    running=False,
    created_s=0.0,
    updated_s=0.0,
    metadata={},
)


def record(name: str, history: str, turn: int = 1) -> Conversation:
    return dataclasses.replace(RECORD, conversation_id=name, history=history, turn=turn)


def test_each_is_handed_out_once_by_name_or_by_history() -> None:
    recent = RecentRecords()
    recent.keep(record("a", "x"))
    assert recent.take_history("t", "x") == record("a", "x")
    assert recent.take_history("t", "x") is None
    assert recent.take("t", "a") is None
    recent.keep(record("a", "x"))
    assert recent.take("t", "a") == record("a", "x")
    assert recent.take_history("t", "x") is None


def test_a_foreign_tenant_gets_nothing() -> None:
    recent = RecentRecords()
    recent.keep(record("a", "x"))
    assert recent.take("u", "a") is None
    assert recent.take_history("u", "x") is None


def test_a_later_turn_takes_the_place_of_an_earlier_one() -> None:
    recent = RecentRecords()
    recent.keep(record("a", "x"))
    recent.keep(record("a", "y", turn=2))
    assert len(recent) == 1
    assert recent.take_history("t", "x") is None
    assert recent.take("t", "a") == record("a", "y", turn=2)


def test_of_two_with_the_same_transcript_the_latest_is_found() -> None:
    recent = RecentRecords()
    recent.keep(record("a", "x"))
    recent.keep(record("b", "x"))
    assert recent.take("t", "a") == record("a", "x")
    assert recent.take_history("t", "x") == record("b", "x")


def test_those_used_longest_ago_are_forgotten() -> None:
    recent = RecentRecords(max_records=2)
    for name in "abc":
        recent.keep(record(name, name))
    assert len(recent) == 2
    assert recent.take("t", "a") is None
    assert recent.take_history("t", "a") is None
    assert recent.take("t", "b") is not None
