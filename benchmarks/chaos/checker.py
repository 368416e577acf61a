"""From what clients saw and what the store has afterwards to counts of violations. Pure.

The truth is computed from the requests alone (`oracle`). `tokens` of violations are characters: a toy's
token is a byte.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from benchmarks.chaos.client import TurnLog
from benchmarks.chaos.oracle import TrueLog
from cluster.conversation import Conversation, Message

_PROBE_CHARS = 6
"""So many characters of a random reply are found again only where they come from."""


KINDS = (
    "conversations_lost",
    "turns_lost",
    "turns_duplicated",
    "tokens_missing",
    "tokens_repeated",
    "tokens_contradicted",
    "event_ids_wrong",
    "records_wrong",
    "slots_leaked",
    "visible",
    "other",
)


@dataclass(slots=True)
class Violations:
    """What must not happen, counted by KINDS; `notes` say where. None is a pass."""

    found: Counter[str] = field(default_factory=Counter)
    notes: list[str] = field(default_factory=list)

    def note(self, kind: str, note: str, count: int = 1) -> None:
        """Raises ValueError for a kind that is not one of KINDS."""
        if kind not in KINDS:
            raise ValueError(f"{kind} is no kind of violation")
        self.found[kind] += count
        self.notes.append(note)

    @property
    def total(self) -> int:
        return self.found.total()

    def counts(self) -> dict[str, int]:
        """Every kind, zero or not."""
        return {kind: self.found[kind] for kind in KINDS}

    def add(self, other: Violations) -> None:
        self.found.update(other.found)
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
                found.note("records_wrong", f"{where}: told turn {log.turn}, ETag {log.etag[:8]}")
        elif log.error not in may_fail:
            found.note("turns_lost", f"{where}: ended with {log.error or 'nothing'}")
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
            found.note("turns_lost", f"{where}: ended with {log.error or 'nothing'}")
    _check_turns(stored, len(turns), found)
    record = stored.record
    if record is not None and record.turn == len(turns) and record.head != turns[-1].etag:
        found.note("records_wrong", f"the store's hash is {record.head[:8]}")
    return found


def _check_text(log: TurnLog, due: str, where: str, found: Violations) -> None:
    shown = log.text
    same = next((n for n, (a, b) in enumerate(zip(shown, due, strict=False)) if a != b), -1)
    if same < 0:
        same = min(len(shown), len(due))
    if same == len(shown):
        if log.is_done and same < len(due):
            missing = len(due) - same
            note = f"{where}: {missing} of {len(due)} characters never came"
            found.note("tokens_missing", note, missing)
        return
    wrong, probe = len(shown) - same, shown[same : same + _PROBE_CHARS]
    note = f"{where}: shown {shown[same:][:30]!r} for {due[same:][:30]!r} at {same}"
    if len(probe) == _PROBE_CHARS and probe in due[same:]:
        found.note("tokens_missing", note, due.index(probe, same) - same)
    elif len(probe) == _PROBE_CHARS and probe in due[: same + _PROBE_CHARS - 1]:
        found.note("tokens_repeated", note, wrong)
    else:
        found.note("tokens_contradicted", note, wrong)


def _check_ids(log: TurnLog, turn: int, where: str, found: Violations) -> None:
    for event_id, chars in log.event_ids:
        if event_id != f"{turn}.{chars}":
            found.note("event_ids_wrong", f"{where}: event id {event_id} after {chars} characters")
            return


def _check_turns(stored: Stored, turns: int, found: Violations) -> None:
    has = 0 if stored.record is None else stored.record.turn
    if stored.record is None or has < turns:
        found.note("conversations_lost", f"the store has {has} turns of {turns}")
    elif has > turns:
        found.note("turns_duplicated", f"the store has {has} turns of {turns}", has - turns)


def _check_record(stored: Stored, truth: TrueLog, found: Violations) -> None:
    _check_turns(stored, truth.turn, found)
    record = stored.record
    if record is None:
        return
    is_same = (record.head, record.token_count) == (truth.head, len(truth.ids))
    if record.turn == truth.turn and not is_same:
        note = f"the store's hash is {record.head[:8]}, not {truth.head[:8]}"
        found.note("records_wrong", note)
    if record.running:
        found.note("other", "a turn is still claimed")
    last = truth.messages[-len(stored.messages) :] if stored.messages else []
    if list(stored.messages) != last:
        found.note("records_wrong", "the transcript is not what was said")


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
