"""The chaos checker sees every kind of damage in a byte log that is otherwise the truth."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from benchmarks.chaos.checker import Stored, check_conversation, interruptions
from benchmarks.chaos.client import Attempt, TurnLog
from benchmarks.chaos.oracle import Asked, TrueLog
from cluster.conversation import Conversation, Message
from deployments.text import ChatCodec
from engine.sampling import SamplingParams
from engine.toy_engine import ToyModel, ToyText, toy_reply
from engine.window import SinkWindow

CAPACITY = 48
MODEL = ToyModel(259, ToyText())
CODEC = ChatCodec.for_toy()
ASKED = [
    Asked("hello there", 60, seed=1),
    Asked("go on", 80, seed=2, temperature=0.0),
    Asked("and more of it", 50, seed=3, stop=("a",)),
]


def truth() -> TrueLog:
    return TrueLog(MODEL, CAPACITY, CODEC)


def logs_and_store() -> tuple[list[TurnLog], Stored]:
    """What clients and store have when nothing went wrong; replies come in pieces of 7 characters."""
    going, logs = truth(), []
    for asked in ASKED:
        due = going.due(asked)
        going.commit(asked, due)
        log = TurnLog(asked, "key", 1.0, 9.0, [Attempt(1.0, status=200, ending="done")])
        for start in range(0, len(due.text), 7):
            log.texts.append((2.0 + start, due.text[start : start + 7]))
            log.event_ids.append((f"{going.turn}.{log.num_chars}", log.num_chars))
        log.finish_reason, log.turn, log.etag = "stop", going.turn, going.head
        logs.append(log)
    record = Conversation(
        conversation_id="c",
        tenant="t",
        fingerprint="f",
        sink_tokens=4,
        window_tokens=44,
        turn=going.turn,
        token_count=len(going.ids),
        head=going.head,
        history="",
        owner="r",
        epoch=1,
        running=False,
        created_s=0.0,
        updated_s=0.0,
        metadata={},
    )
    return logs, Stored(record, going.messages)


def found(logs: list[TurnLog], stored: Stored) -> dict[str, int]:
    counts = check_conversation(logs, stored, truth()).counts()
    return {name: count for name, count in counts.items() if count}


def test_the_truth_passes() -> None:
    logs, stored = logs_and_store()
    assert all(log.text for log in logs[:2])
    assert found(logs, stored) == {}


def test_the_oracle_is_the_toys_own() -> None:
    """The quick oracle against the shipped slow one, past the window."""
    going = truth()
    for asked in ASKED[:2]:
        due = going.due(asked)
        window = SinkWindow(4, CAPACITY - 4, CAPACITY - 4 + 15)
        context = [*going.ids, *due.input_ids.tolist()]
        params = SamplingParams(temperature=asked.temperature, seed=asked.seed)
        request = (params, going.turn + 1)
        slow = toy_reply(MODEL, window, context, request, asked.max_tokens, CODEC.eos_ids)
        assert CODEC.decode(slow) == due.text
        assert len(slow) == due.sampled_tokens
        going.commit(asked, due)
    assert len(going.ids) > 2 * CAPACITY


def drop_a_piece(logs: list[TurnLog], stored: Stored) -> Stored:
    del logs[0].texts[3]
    return stored


def drop_the_end(logs: list[TurnLog], stored: Stored) -> Stored:
    del logs[1].texts[-1]
    return stored


def repeat_a_piece(logs: list[TurnLog], stored: Stored) -> Stored:
    logs[1].texts.insert(3, logs[1].texts[2])
    return stored


def change_a_piece(logs: list[TurnLog], stored: Stored) -> Stored:
    at, text = logs[1].texts[4]
    logs[1].texts[4] = (at, text[::-1])
    return stored


def skip_an_id(logs: list[TurnLog], stored: Stored) -> Stored:
    logs[0].event_ids[2] = ("1.3", logs[0].event_ids[2][1])
    return stored


def lose_a_turn(logs: list[TurnLog], stored: Stored) -> Stored:
    logs[2].attempts[-1].ending, logs[2].error = "cut", "cut"
    return stored


def lose_the_conversation(logs: list[TurnLog], stored: Stored) -> Stored:
    return Stored(None)


def forget_a_turn(logs: list[TurnLog], stored: Stored) -> Stored:
    assert stored.record is not None
    return Stored(replace(stored.record, turn=2), stored.messages)


def commit_a_turn_twice(logs: list[TurnLog], stored: Stored) -> Stored:
    assert stored.record is not None
    return Stored(replace(stored.record, turn=4), stored.messages)


def commit_other_tokens(logs: list[TurnLog], stored: Stored) -> Stored:
    assert stored.record is not None
    return Stored(replace(stored.record, head="f" * 64), stored.messages)


def tell_another_etag(logs: list[TurnLog], stored: Stored) -> Stored:
    logs[1].etag = "f" * 64
    return stored


def change_the_transcript(logs: list[TurnLog], stored: Stored) -> Stored:
    return Stored(stored.record, [*stored.messages[:-1], Message("assistant", "other")])


def leave_it_claimed(logs: list[TurnLog], stored: Stored) -> Stored:
    assert stored.record is not None
    return Stored(replace(stored.record, running=True), stored.messages)


Damage = Callable[[list[TurnLog], Stored], Stored]


@pytest.mark.parametrize(
    ("damage", "complaint"),
    [
        (drop_a_piece, "tokens_missing"),
        (drop_the_end, "tokens_missing"),
        (repeat_a_piece, "tokens_repeated"),
        (change_a_piece, "tokens_contradicted"),
        (skip_an_id, "event_ids_wrong"),
        (lose_a_turn, "turns_lost"),
        (lose_the_conversation, "conversations_lost"),
        (forget_a_turn, "conversations_lost"),
        (commit_a_turn_twice, "turns_duplicated"),
        (commit_other_tokens, "records_wrong"),
        (tell_another_etag, "records_wrong"),
        (change_the_transcript, "records_wrong"),
        (leave_it_claimed, "other"),
    ],
)
def test_damage_is_seen_for_what_it_is(damage: Damage, complaint: str) -> None:
    logs, stored = logs_and_store()
    assert complaint in found(logs, damage(logs, stored))


def test_a_turn_that_may_fail_must_not_be_committed() -> None:
    logs, stored = logs_and_store()
    logs[2].attempts[-1].ending = "error"
    logs[2].error = "turn_quarantined"
    logs[2].texts, logs[2].event_ids = [], []
    allowed = frozenset({"turn_quarantined"})
    complaints = check_conversation(logs, stored, truth(), allowed)
    assert complaints.counts()["turns_duplicated"] == 1


def test_interruptions_are_counted_by_their_reason() -> None:
    log = TurnLog(ASKED[0], "key", 1.0)
    log.attempts = [
        Attempt(1.0, ending="cut"),
        Attempt(2.0, ending="refused", error="conversation_busy"),
        Attempt(3.0, ending="cut"),
        Attempt(4.0, ending="done"),
    ]
    assert interruptions([log]) == {"cut": 2, "conversation_busy": 1}
