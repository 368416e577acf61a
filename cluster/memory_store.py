"""The conversation store in one process's memory: the simple reference that defines the contract."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Literal

import numpy as np

from cluster.conversation import (
    BeginTurn,
    Begun,
    BusyTurn,
    Checkpoint,
    CommittedTurn,
    Conversation,
    Fence,
    Message,
    NewConversation,
    Ownership,
    Rebase,
    RememberedTurn,
    ReplayLog,
    Snapshot,
    TurnCommit,
    new_nonce,
)
from cluster.memory_record import NO_IDS, Record, RunningTurn, repaired
from cluster.store import (
    AlreadyExists,
    Conflict,
    Fenced,
    HistoryMatch,
    KeyReused,
    ModelChanged,
    NotFound,
    Quarantined,
    Recovering,
    RolledBack,
    StoreError,
    StoreLimits,
    TurnConflict,
)


class MemoryStore:
    """A `ConversationStore` for tests and for reading. `clock` gives seconds."""

    def __init__(
        self, limits: StoreLimits | None = None, clock: Callable[[], float] = time.time
    ) -> None:
        self._limits = limits or StoreLimits()
        self._clock = clock
        self._records: dict[str, Record] = {}
        self._tombstones: dict[str, tuple[int, float]] = {}
        self._histories: dict[tuple[str, str], tuple[HistoryMatch, Record]] = {}
        self._life = new_nonce()
        self._woken_s = self._recovered_s = 0.0

    def restart(self) -> None:
        """What a server does that dies and comes back: a new life, and time for owners to repair it."""
        self._life = new_nonce()
        self._woken_s = self._clock()
        self._recovered_s = self._woken_s + self._limits.recovery_s

    async def create(self, new: NewConversation) -> Conversation:
        self._limits.check_metadata(new.metadata)
        now_s = self._clock()
        known = self._find(new.conversation_id)
        if known is not None:
            if known.new != new or known.epoch != known.first_epoch:
                raise AlreadyExists(new.conversation_id)
            return known.view(now_s)
        # Above every epoch of an earlier life, so that nobody of then can write or repair.
        epoch = self._tombstone(new.conversation_id) + 1
        record = Record(
            *(new, new.history, now_s, now_s, now_s + self._limits.ttl_s),
            epoch=epoch,
            first_epoch=epoch,
        )
        record.append(new.messages, self._limits)
        self._tombstones.pop(new.conversation_id, None)
        self._records[new.conversation_id] = record
        return record.view(now_s)

    async def get(self, tenant: str, conversation_id: str) -> Conversation:
        record = self._owned(tenant, conversation_id)
        self._check_recovered()
        return record.view(self._clock())

    async def list(self, tenant: str, limit: int = 20, after: str = "") -> Sequence[Conversation]:
        newest_first = [
            record.view(self._clock())
            for conversation_id in reversed(list(self._records))
            if (record := self._find(conversation_id)) and record.new.tenant == tenant
        ]
        ids = [conversation.conversation_id for conversation in newest_first]
        if ids:
            self._check_recovered()
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

    async def system_messages(self, tenant: str, conversation_id: str) -> Sequence[Message]:
        return self._owned(tenant, conversation_id).system_messages()

    async def begin(self, turn: BeginTurn) -> Begun:
        self._limits.check_claim(turn)
        record = self._owned(turn.tenant, turn.conversation_id)
        self._check_recovered()
        key, running = turn.key or turn.nonce, record.running
        if running and running.fence.nonce == turn.nonce:
            return self._ownership(record, running, turn.lease_s)
        if record.ended and record.ended[0].nonce == turn.nonce:
            raise Fenced(turn.conversation_id)
        known = record.remembered(key)
        if known is not None:
            self._check_request(turn, known.request_hash)
            if known.quarantined:
                raise Quarantined(turn.conversation_id)
            return CommittedTurn(known.turn, known.head, known.reply_ids, dict(known.result))
        live = running is not None and running.is_live(self._clock())
        if running and running.key == key:
            self._check_request(turn, running.request_hash)
            if live and not turn.steal:
                return self._busy(record, running)
            self._check_model(record, turn)
            return self._take_over(record, running, turn)
        self._check_model(record, turn)
        self._check_expected(record, turn)
        if running and live:
            raise Conflict(running.lease_until_s - self._clock())
        return self._start(record, turn, key)

    async def checkpoint(self, batch: Sequence[Checkpoint]) -> Sequence[StoreError | None]:
        return [self._checkpointed(one) for one in batch]

    async def renew(self, tenant: str, conversation_id: str, fence: Fence, lease_s: float) -> None:
        record = self._written(tenant, conversation_id)
        self._extend_lease(record, self._fenced(record, fence), lease_s)

    async def commit(self, commit: TurnCommit) -> Conversation:
        self._limits.check_result(commit.result)
        record = self._written(commit.tenant, commit.conversation_id)
        if record.ended != (commit.fence, "commit"):
            running = self._fenced(record, commit.fence)
            reply_start = record.replay.token_count + len(running.input_ids)
            self._advance(record, running, commit)
            record.turn += 1
            record.head, record.history = commit.head, commit.history
            record.owner, record.result = running.replica, commit.result
            record.updated_s = self._clock()
            record.append(commit.messages, self._limits)
            self._end(record, commit.fence, "commit")
            reply_ids = commit.output_ids[: commit.reply_tokens].astype(np.int32)
            result = RememberedTurn(
                *(running.key, running.request_hash, record.turn, record.head),
                *(reply_start, reply_ids, commit.result),
            )
            self._remember(record, result)
        self._index(record)
        return record.view(self._clock())

    async def abort(self, tenant: str, conversation_id: str, fence: Fence) -> None:
        record = self._written(tenant, conversation_id)
        if record.ended != (fence, "abort"):
            self._fenced(record, fence)
            self._end(record, fence, "abort")

    async def repair(self, snapshot: Snapshot) -> None:
        last = snapshot.conversation
        known = self._find(last.conversation_id)
        expired = last.updated_s + self._limits.ttl_s <= self._clock() and not snapshot.running
        if known is None and (expired or self._tombstone(last.conversation_id) >= 0):
            raise NotFound(last.conversation_id)
        if known and known.new.tenant != last.tenant:
            raise NotFound(last.conversation_id)
        record = repaired(snapshot, known, self._clock(), self._limits)
        if known and known.rank() > record.rank():
            raise Fenced(last.conversation_id)
        if known is None or known.rank() < record.rank():
            self._records[last.conversation_id] = record
        # The indexes may have gone back farther than the record.
        stored = self._records[last.conversation_id]
        if stored.turn:
            self._index(stored)

    async def rebase(self, rebase: Rebase) -> Conversation:
        record = self._owned(rebase.tenant, rebase.conversation_id)
        self._check_recovered()
        now_s = self._clock()
        if record.head != rebase.expect_head:
            raise TurnConflict(record.turn, record.head)
        new = replace(
            record.new,
            fingerprint=rebase.fingerprint,
            sink_tokens=rebase.sink_tokens,
            window_tokens=rebase.window_tokens,
            replay_windows=rebase.replay_windows,
        )
        if new != record.new:
            if record.running and record.running.is_live(now_s):
                raise Conflict(record.running.lease_until_s - now_s)
            record.lost = record.running or record.lost
            record.new, record.running, record.owner = new, None, ""
            record.replay = ReplayLog(NO_IDS, NO_IDS, 0)
            record.epoch = self._next_epoch(record, now_s)
            record.expires_s = now_s + self._limits.ttl_s
            # Token indices start anew: the newest reply is kept by itself.
            record.results = [replace(one, reply_start=-1) for one in record.results[:1]]
        return record.view(now_s)

    async def pulse(self) -> str:
        return self._life

    async def delete(self, tenant: str, conversation_id: str) -> None:
        record = self._owned(tenant, conversation_id)
        self._tombstones[conversation_id] = record.epoch, self._clock() + self._limits.ttl_s
        del self._records[conversation_id]

    async def match_history(self, tenant: str, history: str) -> HistoryMatch | None:
        match, record = self._histories.get((tenant, history), (None, None))
        if match is None or self._find(match.conversation_id) is not record:
            return None
        self._check_recovered()
        return match

    async def ping(self) -> float:
        return 0.0

    async def close(self) -> None:
        pass

    # --- finding records --------------------------------------------------------------------------

    def _find(self, conversation_id: str) -> Record | None:
        record = self._records.get(conversation_id)
        if record and record.expires_s <= self._clock():
            del self._records[conversation_id]
            return None
        return record

    def _tombstone(self, conversation_id: str) -> int:
        """The epoch that a deleted conversation had, or -1."""
        epoch, expires_s = self._tombstones.get(conversation_id, (-1, 0.0))
        return epoch if expires_s > self._clock() else -1

    def _owned(self, tenant: str, conversation_id: str) -> Record:
        """For clients: what is missing may have been lost, and is about to come back."""
        record = self._find(conversation_id)
        if record and record.new.tenant == tenant:
            return record
        if self._tombstone(conversation_id) < 0:
            self._check_recovered()
        raise NotFound(conversation_id)

    def _written(self, tenant: str, conversation_id: str) -> Record:
        """For owners: what is missing and was not deleted is lost."""
        record = self._find(conversation_id)
        if record and record.new.tenant == tenant:
            return record
        if self._tombstone(conversation_id) < 0:
            raise RolledBack(conversation_id)
        raise NotFound(conversation_id)

    # --- checks -----------------------------------------------------------------------------------

    def _check_recovered(self) -> None:
        now_s = self._clock()
        # As with leases, a clock that went back before the restart ends the recovery.
        if self._woken_s <= now_s < self._recovered_s:
            raise Recovering(self._recovered_s - now_s)

    def _check_request(self, turn: BeginTurn, request_hash: str) -> None:
        if turn.request_hash != request_hash:
            raise KeyReused(turn.conversation_id)

    def _check_model(self, record: Record, turn: BeginTurn) -> None:
        if record.new.fingerprint != turn.fingerprint:
            raise ModelChanged(turn.conversation_id)

    def _check_expected(self, record: Record, turn: BeginTurn) -> None:
        turn_is_stale = turn.expect_turn not in (None, record.turn)
        if turn_is_stale or turn.expect_head not in (None, record.head):
            raise TurnConflict(record.turn, record.head)

    def _fenced(self, record: Record, fence: Fence) -> RunningTurn:
        if record.running and record.running.fence == fence:
            return record.running
        if fence.epoch > record.epoch:
            raise RolledBack(record.new.conversation_id)
        raise Fenced(record.new.conversation_id)

    # --- claims -----------------------------------------------------------------------------------

    def _busy(self, record: Record, running: RunningTurn) -> BusyTurn:
        remaining_s = running.lease_until_s - self._clock()
        return BusyTurn(running.replica, record.turn + 1, running.output_ids, remaining_s)

    def _start(self, record: Record, turn: BeginTurn, key: str) -> Ownership:
        started = RunningTurn(
            Fence(0, turn.nonce), turn.replica, key, turn.request_hash, turn.input_ids
        )
        again, lost = record.lost, record.running or record.lost
        bereft: RunningTurn | None = started
        if again is not None and again.key == key:
            counts = replace(started, attempts=again.attempts, lapses=again.lapses)
            bereft, lost = counts.bereft(turn, self._limits), record.running
        record.running, record.lost = None, lost
        if bereft is None:
            raise self._given_up(record, key, turn)
        bereft.fence = self._next_fence(record, turn.nonce)
        return self._ownership(record, bereft, turn.lease_s)

    def _take_over(self, record: Record, running: RunningTurn, turn: BeginTurn) -> Ownership:
        bereft = running.bereft(turn, self._limits)
        if bereft is None:
            self._end(record, running.fence, "abort")
            raise self._given_up(record, running.key, turn)
        fence = self._next_fence(record, turn.nonce)
        taken = replace(bereft, fence=fence, replica=turn.replica, resumed=True)
        return self._ownership(record, taken, turn.lease_s)

    def _given_up(self, record: Record, key: str, turn: BeginTurn) -> Quarantined:
        given_up = RememberedTurn(
            *(key, turn.request_hash, record.turn, record.head, 0, NO_IDS, {}),
            quarantined=True,
        )
        self._remember(record, given_up)
        return Quarantined(turn.conversation_id)

    def _ownership(self, record: Record, running: RunningTurn, lease_s: float) -> Ownership:
        record.running = running
        self._extend_lease(record, running, lease_s)
        return Ownership(
            fence=running.fence,
            conversation=record.view(self._clock()),
            replay=record.replay,
            input_ids=running.input_ids,
            output_ids=running.output_ids,
            attempt=running.attempts + running.lapses,
            resumed=running.resumed,
        )

    def _next_fence(self, record: Record, nonce: str) -> Fence:
        record.epoch = self._next_epoch(record, self._clock())
        return Fence(record.epoch, nonce)

    def _next_epoch(self, record: Record, now_s: float) -> int:
        return max(record.epoch + 1, int(now_s * 1e6))

    def _extend_lease(self, record: Record, running: RunningTurn, lease_s: float) -> None:
        running.lease_from_s = self._clock()
        running.lease_until_s = running.lease_from_s + lease_s
        record.expires_s = running.lease_until_s + self._limits.ttl_s

    # --- running turns ----------------------------------------------------------------------------

    def _checkpointed(self, one: Checkpoint) -> StoreError | None:
        try:
            record = self._written(one.tenant, one.conversation_id)
            self._store_tokens(record, self._fenced(record, one.fence), one)
        except StoreError as error:
            return error
        return None

    def _store_tokens(self, record: Record, running: RunningTurn, one: Checkpoint) -> None:
        stored = len(running.output_ids)
        if one.k > stored:
            raise RolledBack(one.conversation_id)
        if not running.agrees(one.token_ids, one.k):
            raise Fenced(one.conversation_id)
        fresh = one.token_ids[stored - one.k :].astype(np.int32)
        if len(fresh):
            running.output_ids = np.concatenate([running.output_ids, fresh])
            running.attempts = running.lapses = 0
        now_s = self._clock()
        if not running.is_live(now_s) or running.lease_until_s - now_s < 0.75 * one.lease_s:
            self._extend_lease(record, running, one.lease_s)

    def _advance(self, record: Record, running: RunningTurn, commit: TurnCommit) -> None:
        ids = np.concatenate([running.input_ids, commit.output_ids]).astype(np.int32)
        new = record.new
        record.replay = record.replay.advanced(ids, new.sink_tokens, new.recent_tokens)

    def _end(self, record: Record, fence: Fence, how: Literal["commit", "abort"]) -> None:
        record.running = None
        record.ended = (fence, how)
        record.expires_s = self._clock() + self._limits.ttl_s

    def _remember(self, record: Record, result: RememberedTurn) -> None:
        record.remember(result, self._limits)

    def _index(self, record: Record) -> None:
        """A conversation has the entries of its last two commits: who repeats the request of the last
        one names the history before it."""
        tenant = record.new.tenant
        if record.history not in record.indexed:
            for old in record.indexed[:-1]:
                _, holder = self._histories.get((tenant, old), (None, None))
                if holder is record:
                    del self._histories[tenant, old]
            record.indexed = (*record.indexed[-1:], record.history)
        match = HistoryMatch(record.new.conversation_id, record.turn)
        self._histories[tenant, record.history] = match, record
