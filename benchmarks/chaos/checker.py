"""From what clients saw and what the store has afterwards to counts of violations. Pure.

The truth is computed from the requests alone (`oracle`). `tokens` of violations are characters: a toy's
token is a byte.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from benchmarks.chaos.client import TurnLog
from benchmarks.chaos.oracle import TrueLog
from cluster.conversation import Conversation, Message

_PROBE_CHARS = 6
"""So many characters of a random reply are found again only where they come from."""


@dataclass(slots=True)
class Violations:
    """What must not happen. All zero is a pass; `notes` say where."""

    conversations_lost: int = 0
    turns_lost: int = 0
    turns_duplicated: int = 0
    tokens_missing: int = 0
    tokens_repeated: int = 0
    tokens_contradicted: int = 0
    event_ids_wrong: int = 0
    records_wrong: int = 0
    slots_leaked: int = 0
    visible: int = 0
    other: int = 0
    notes: list[str] = field(default_factory=list)

    @property
    def total(self) -> int:
        return sum(self.counts().values())

    def counts(self) -> dict[str, int]:
        return {name: count for name, count in asdict(self).items() if name != "notes"}

    def add(self, other: Violations) -> None:
        for name, count in other.counts().items():
            setattr(self, name, getattr(self, name) + count)
        self.notes += other.notes


@dataclass(frozen=True, slots=True)
class Stored:
    """What the store has of a conversation after it all; `record` None: nothing."""

    record: Conversation | None
    messages: Sequence[Message] = ()


def check_conversation(
    turns: Sequence[TurnLog], stored: Stored, truth: TrueLog, may_fail: frozenset[str] = frozenset()
) -> Violations:
    """Compare one conversation with the truth; `truth` is empty at first and advanced.

    A turn that ended with one of the errors `may_fail` must not be committed; any other unfinished
    turn is lost, whether the store has it or not.
    """
    found = Violations()
    for number, log in enumerate(turns, start=1):
        due = truth.due(log.asked)
        where = f"turn {number} ({log.key})"
        _check_text(log, due.text, where, found)
        _check_ids(log, truth.turn + 1, where, found)
        is_last = number == len(turns)
        if log.is_done:
            truth.commit(log.asked, due)
            if (log.turn, log.etag) != (truth.turn, truth.head):
                found.records_wrong += 1
                found.notes.append(f"{where}: told turn {log.turn}, ETag {log.etag[:8]}")
        elif log.error not in may_fail:
            found.turns_lost += 1
            found.notes.append(f"{where}: ended with {log.error or 'nothing'}")
            committed = stored.record is not None and stored.record.turn > truth.turn
            if committed and is_last:
                truth.commit(log.asked, due)
    _check_record(stored, truth, found)
    return found


def check_transcript(turns: Sequence[TurnLog], stored: Stored) -> Violations:
    """For an engine without an oracle: what was shown is what is stored, each turn once."""
    found = Violations()
    replies = [message.content for message in stored.messages if message.role == "assistant"]
    for number, log in enumerate(turns, start=1):
        where = f"turn {number} ({log.key})"
        _check_text(log, replies[number - 1] if number <= len(replies) else "", where, found)
        _check_ids(log, number, where, found)
        if not log.is_done:
            found.turns_lost += 1
            found.notes.append(f"{where}: ended with {log.error or 'nothing'}")
    if stored.record is None or stored.record.turn < len(turns):
        found.conversations_lost += 1
    elif stored.record.turn > len(turns):
        found.turns_duplicated += stored.record.turn - len(turns)
    elif stored.record.head != turns[-1].etag:
        found.records_wrong += 1
    return found


def _check_text(log: TurnLog, due: str, where: str, found: Violations) -> None:
    shown = log.text
    same = next((n for n, (a, b) in enumerate(zip(shown, due, strict=False)) if a != b), -1)
    if same < 0:
        same = min(len(shown), len(due))
    if same == len(shown):
        if log.is_done and same < len(due):
            found.tokens_missing += len(due) - same
            found.notes.append(f"{where}: {len(due) - same} of {len(due)} characters never came")
        return
    wrong, probe = len(shown) - same, shown[same : same + _PROBE_CHARS]
    if len(probe) == _PROBE_CHARS and probe in due[same:]:
        found.tokens_missing += due.index(probe, same) - same
    elif len(probe) == _PROBE_CHARS and probe in due[: same + _PROBE_CHARS - 1]:
        found.tokens_repeated += wrong
    else:
        found.tokens_contradicted += wrong
    found.notes.append(f"{where}: shown {shown[same:][:30]!r} for {due[same:][:30]!r} at {same}")


def _check_ids(log: TurnLog, turn: int, where: str, found: Violations) -> None:
    for event_id, chars in log.event_ids:
        if event_id != f"{turn}.{chars}":
            found.event_ids_wrong += 1
            found.notes.append(f"{where}: event id {event_id} after {chars} characters")
            return


def _check_record(stored: Stored, truth: TrueLog, found: Violations) -> None:
    record = stored.record
    if record is None:
        found.conversations_lost += 1
        found.notes.append("the store knows nothing of the conversation")
        return
    if record.turn > truth.turn:
        found.turns_duplicated += record.turn - truth.turn
        found.notes.append(f"the store has {record.turn} turns of {truth.turn}")
    elif record.turn < truth.turn:
        found.conversations_lost += 1
        found.notes.append(f"the store has {record.turn} turns of {truth.turn}")
    elif (record.head, record.token_count) != (truth.head, len(truth.ids)):
        found.records_wrong += 1
        found.notes.append(f"the store's hash is {record.head[:8]}, not {truth.head[:8]}")
    if record.running:
        found.other += 1
        found.notes.append("a turn is still claimed")
    last = truth.messages[-len(stored.messages) :] if stored.messages else []
    if list(stored.messages) != last:
        found.records_wrong += 1
        found.notes.append("the transcript is not what was said")


def interruptions(turns: Sequence[TurnLog]) -> dict[str, int]:
    """How many attempts broke, by how: what clients had to send again."""
    endings = [attempt for log in turns for attempt in log.attempts if attempt.ending != "done"]
    return dict(Counter(attempt.error or attempt.ending for attempt in endings))


def gap_summary(gaps_s: Sequence[float]) -> dict[str, Any]:
    """p50, p95 and maximum, seconds; empty without gaps."""
    if not gaps_s:
        return {}
    ordered = sorted(gaps_s)

    def rank(percent: int) -> float:
        return round(ordered[max(0, -(-len(ordered) * percent // 100) - 1)], 3)

    return {"count": len(ordered), "p50": rank(50), "p95": rank(95), "max": round(ordered[-1], 3)}
