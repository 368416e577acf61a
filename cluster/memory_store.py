"""The conversation store in one process's memory: the simple reference that defines the contract."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from cluster.conversation import (
    GENESIS,
    BeginTurn,
    Conversation,
    Fence,
    Message,
    NewConversation,
    Ownership,
    ReplayLog,
    TokenIds,
    TurnCommit,
)
from cluster.store import (
    AlreadyExists,
    Conflict,
    Fenced,
    HistoryMatch,
    ModelChanged,
    NotFound,
    StoreLimits,
    TurnConflict,
)

NO_IDS: TokenIds = np.empty(0, dtype=np.int32)


@dataclass(slots=True)
class RunningTurn:
    """A turn between begin and commit or abort."""

    fence: Fence
    replica: str
    input_ids: TokenIds
    lease_from_s: float
    lease_until_s: float

    def is_live(self, now_s: float) -> bool:
        """Whether the lease holds. A clock that went back before its start voids it."""
        return self.lease_from_s <= now_s < self.lease_until_s


@dataclass(slots=True)
class Record:
    """All that is kept of one conversation."""

    new: NewConversation
    history: str
    created_s: float
    updated_s: float
    expires_s: float
    turn: int = 0
    head: str = GENESIS
    owner: str = ""
    epoch: int = 0
    replay: ReplayLog = field(default_factory=lambda: ReplayLog(NO_IDS, NO_IDS, 0))
    running: RunningTurn | None = None
    ended: tuple[Fence, Literal["commit", "abort"]] | None = None
    result: dict[str, Any] = field(default_factory=dict)
    transcript: list[Message] = field(default_factory=list)
    transcript_start: int = 0


class MemoryStore:
    """A `ConversationStore` for tests and for reading. `clock` gives seconds."""

    def __init__(
        self, limits: StoreLimits | None = None, clock: Callable[[], float] = time.time
    ) -> None:
        self._limits = limits or StoreLimits()
        self._clock = clock
        self._records: dict[str, Record] = {}
        self._histories: dict[tuple[str, str], tuple[HistoryMatch, Record]] = {}

    async def create(self, new: NewConversation) -> Conversation:
        self._limits.check_metadata(new.metadata)
        now_s = self._clock()
        known = self._find(new.conversation_id)
        if known is not None:
            if known.new != new or known.epoch:
                raise AlreadyExists(new.conversation_id)
            return self._view(known)
        record = Record(new, new.history, now_s, now_s, now_s + self._limits.ttl_s)
        self._append(record, new.messages)
        self._records[new.conversation_id] = record
        return self._view(record)

    async def get(self, tenant: str, conversation_id: str) -> Conversation:
        return self._view(self._owned(tenant, conversation_id))

    async def list(self, tenant: str, limit: int = 20, after: str = "") -> Sequence[Conversation]:
        newest_first = [
            self._view(record)
            for conversation_id in reversed(list(self._records))
            if (record := self._find(conversation_id)) and record.new.tenant == tenant
        ]
        ids = [conversation.conversation_id for conversation in newest_first]
        if after and after not in ids:
            raise NotFound(after)
        start = ids.index(after) + 1 if after else 0
        return newest_first[start : start + limit]

    async def transcript(
        self, tenant: str, conversation_id: str, limit: int = 100, before: int | None = None
    ) -> tuple[int, Sequence[Message]]:
        record = self._owned(tenant, conversation_id)
        oldest = record.transcript_start
        newest = oldest + len(record.transcript)
        end = newest if before is None else min(max(before, oldest), newest)
        first = max(oldest, end - limit)
        return first, record.transcript[first - oldest : end - oldest]

    async def begin(self, turn: BeginTurn) -> Ownership:
        self._limits.check_input(len(turn.input_ids))
        record = self._owned(turn.tenant, turn.conversation_id)
        now_s = self._clock()
        if record.new.fingerprint != turn.fingerprint:
            raise ModelChanged(turn.conversation_id)
        if record.ended and record.ended[0].nonce == turn.nonce:
            raise Fenced(turn.conversation_id)
        running = record.running
        if running is None or running.fence.nonce != turn.nonce:
            self._check_expected(record, turn)
            if running and running.is_live(now_s):
                raise Conflict(running.lease_until_s - now_s)
            record.epoch = self._next_epoch(record, now_s)
            fence = Fence(record.epoch, turn.nonce)
            running = RunningTurn(fence, turn.replica, turn.input_ids, now_s, now_s)
            record.running = running
        self._extend_lease(record, running, turn.lease_s)
        return Ownership(running.fence, self._view(record), record.replay)

    async def renew(self, tenant: str, conversation_id: str, fence: Fence, lease_s: float) -> None:
        record = self._owned(tenant, conversation_id)
        self._extend_lease(record, self._fenced(record, fence), lease_s)

    async def commit(self, commit: TurnCommit) -> Conversation:
        self._limits.check_result(commit.result)
        record = self._owned(commit.tenant, commit.conversation_id)
        if record.ended != (commit.fence, "commit"):
            running = self._fenced(record, commit.fence)
            self._advance(record, running, commit)
            record.turn += 1
            record.head, record.history = commit.head, commit.history
            record.owner, record.result = running.replica, commit.result
            record.updated_s = self._clock()
            self._append(record, commit.messages)
            self._end(record, commit.fence, "commit")
        match = HistoryMatch(commit.conversation_id, record.turn)
        self._histories[commit.tenant, record.history] = match, record
        return self._view(record)

    async def abort(self, tenant: str, conversation_id: str, fence: Fence) -> None:
        record = self._owned(tenant, conversation_id)
        if record.ended != (fence, "abort"):
            self._fenced(record, fence)
            self._end(record, fence, "abort")

    async def delete(self, tenant: str, conversation_id: str) -> None:
        self._owned(tenant, conversation_id)
        del self._records[conversation_id]

    async def match_history(self, tenant: str, history: str) -> HistoryMatch | None:
        match, record = self._histories.get((tenant, history), (None, None))
        return match if match and self._find(match.conversation_id) is record else None

    async def ping(self) -> float:
        return 0.0

    async def close(self) -> None:
        pass

    def _find(self, conversation_id: str) -> Record | None:
        record = self._records.get(conversation_id)
        if record and record.expires_s <= self._clock():
            del self._records[conversation_id]
            return None
        return record

    def _owned(self, tenant: str, conversation_id: str) -> Record:
        record = self._find(conversation_id)
        if record is None or record.new.tenant != tenant:
            raise NotFound(conversation_id)
        return record

    def _check_expected(self, record: Record, turn: BeginTurn) -> None:
        turn_is_stale = turn.expect_turn not in (None, record.turn)
        if turn_is_stale or turn.expect_head not in (None, record.head):
            raise TurnConflict(record.turn, record.head)

    def _next_epoch(self, record: Record, now_s: float) -> int:
        return max(record.epoch + 1, int(now_s * 1e6))

    def _extend_lease(self, record: Record, running: RunningTurn, lease_s: float) -> None:
        running.lease_from_s = self._clock()
        running.lease_until_s = running.lease_from_s + lease_s
        record.expires_s = running.lease_until_s + self._limits.ttl_s

    def _fenced(self, record: Record, fence: Fence) -> RunningTurn:
        if record.running is None or record.running.fence != fence:
            raise Fenced(record.new.conversation_id)
        return record.running

    def _advance(self, record: Record, running: RunningTurn, commit: TurnCommit) -> None:
        ids = np.concatenate([running.input_ids, commit.output_ids]).astype(np.int32)
        new = record.new
        record.replay = record.replay.advanced(ids, new.sink_tokens, new.recent_tokens)

    def _end(self, record: Record, fence: Fence, how: Literal["commit", "abort"]) -> None:
        record.running = None
        record.ended = (fence, how)
        record.expires_s = self._clock() + self._limits.ttl_s

    def _append(self, record: Record, messages: tuple[Message, ...]) -> None:
        kept = record.transcript
        kept.extend(messages)
        size = sum(len(message.encode()) for message in kept)
        while len(kept) > self._limits.transcript_messages or size > self._limits.transcript_bytes:
            size -= len(kept.pop(0).encode())
            record.transcript_start += 1

    def _view(self, record: Record) -> Conversation:
        new, running = record.new, record.running
        live = running if running and running.is_live(self._clock()) else None
        return Conversation(
            conversation_id=new.conversation_id,
            tenant=new.tenant,
            fingerprint=new.fingerprint,
            sink_tokens=new.sink_tokens,
            window_tokens=new.window_tokens,
            turn=record.turn,
            token_count=record.replay.token_count,
            head=record.head,
            history=record.history,
            owner=live.replica if live else record.owner,
            epoch=record.epoch,
            running=live is not None,
            created_s=record.created_s,
            updated_s=record.updated_s,
            metadata=dict(new.metadata),
            result=dict(record.result),
        )
