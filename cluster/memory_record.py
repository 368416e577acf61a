"""What `MemoryStore` keeps of one conversation, and the arithmetic that needs no store."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np

from cluster.conversation import (
    GENESIS,
    BeginTurn,
    Conversation,
    Fence,
    Message,
    NewConversation,
    RememberedTurn,
    ReplayLog,
    Snapshot,
    TokenIds,
)
from cluster.store import StoreLimits

NO_IDS: TokenIds = np.empty(0, dtype=np.int32)


@dataclass(slots=True)
class RunningTurn:
    """A turn between begin and commit or abort. Since it last stored a token it has lost `attempts`
    owners to their death, and `lapses` otherwise."""

    fence: Fence
    replica: str
    key: str
    request_hash: str
    input_ids: TokenIds
    output_ids: TokenIds = field(default_factory=lambda: NO_IDS)
    lease_from_s: float = 0.0
    lease_until_s: float = 0.0
    attempts: int = 0
    lapses: int = 0
    resumed: bool = False

    def is_live(self, now_s: float) -> bool:
        """Whether the lease holds. A clock that went back before its start voids it."""
        return self.lease_from_s <= now_s < self.lease_until_s

    def agrees(self, output_ids: TokenIds, k: int = 0) -> bool:
        """Whether `output_ids`, tokens `k` and on of this turn, contradict nothing that is stored."""
        stored = self.output_ids[k : k + len(output_ids)]
        return bool(np.array_equal(stored, output_ids[: len(stored)]))

    def bereft(self, turn: BeginTurn, limits: StoreLimits) -> RunningTurn | None:
        """The turn after the loss of one more owner, None after too many."""
        is_dead = turn.steal and not turn.blameless
        attempts, lapses = self.attempts + is_dead, self.lapses + (not is_dead)
        if attempts >= limits.max_attempts or lapses >= limits.max_lapses:
            return None
        return replace(self, attempts=attempts, lapses=lapses)


@dataclass(slots=True)
class Record:
    """All that is kept of one conversation. `lost`: the last turn that another key put an end to.
    `system`: messages that the transcript began with and has dropped."""

    new: NewConversation
    history: str
    created_s: float
    updated_s: float
    expires_s: float
    turn: int = 0
    head: str = GENESIS
    owner: str = ""
    epoch: int = 0
    first_epoch: int = 0
    replay: ReplayLog = field(default_factory=lambda: ReplayLog(NO_IDS, NO_IDS, 0))
    running: RunningTurn | None = None
    lost: RunningTurn | None = None
    ended: tuple[Fence, Literal["commit", "abort"]] | None = None
    result: dict[str, Any] = field(default_factory=dict)
    results: list[RememberedTurn] = field(default_factory=list)
    indexed: tuple[str, ...] = ()
    transcript: list[Message] = field(default_factory=list)
    transcript_start: int = 0
    system: list[Message] = field(default_factory=list)

    def remembered(self, key: str) -> RememberedTurn | None:
        """The turn that was committed or given up under `key`."""
        return next((result for result in self.results if result.key == key), None)

    def remember(self, result: RememberedTurn, limits: StoreLimits) -> None:
        """The newest result is always kept; see `StoreLimits` for the others."""
        self.results.insert(0, result)
        self.prune(limits)

    def prune(self, limits: StoreLimits) -> None:
        """Forget the results that are beyond the limits."""
        kept, size = self.results[:1], sum(map(limits.size_of, self.results[:1]))
        for result in self.results[1:]:
            size += limits.size_of(result)
            if size > limits.results_bytes:
                break
            if not len(result.reply_ids) or self.replay.holds(result.reply_start):
                kept.append(result)
        self.results = kept

    def rank(self) -> tuple[int, int, float]:
        """Orders the states of a conversation: see `ConversationStore.repair`."""
        tokens = len(self.running.output_ids) if self.running else float("inf")
        return self.epoch, self.turn, tokens

    def append(self, messages: tuple[Message, ...], limits: StoreLimits) -> None:
        """Add to the transcript and drop its oldest messages beyond the limits."""
        kept = self.transcript
        kept.extend(messages)
        size = sum(len(message.encode()) for message in kept)
        while len(kept) > limits.transcript_messages or size > limits.transcript_bytes:
            size -= len(self._drop_oldest().encode())

    def _drop_oldest(self) -> Message:
        oldest = self.transcript.pop(0)
        if oldest.role == "system" and len(self.system) == self.transcript_start:
            self.system.append(oldest)
        self.transcript_start += 1
        return oldest

    def system_messages(self) -> list[Message]:
        """Those that the conversation began with."""
        if len(self.system) < self.transcript_start:
            return list(self.system)
        kept = itertools.takewhile(lambda message: message.role == "system", self.transcript)
        return [*self.system, *kept]

    def view(self, now_s: float) -> Conversation:
        """The record as callers see it."""
        new, running = self.new, self.running
        live = running if running and running.is_live(now_s) else None
        return Conversation(
            conversation_id=new.conversation_id,
            tenant=new.tenant,
            fingerprint=new.fingerprint,
            sink_tokens=new.sink_tokens,
            window_tokens=new.window_tokens,
            turn=self.turn,
            token_count=self.replay.token_count,
            head=self.head,
            history=self.history,
            owner=live.replica if live else self.owner,
            epoch=self.epoch,
            running=live is not None,
            created_s=self.created_s,
            updated_s=self.updated_s,
            metadata=dict(new.metadata),
            result=dict(self.result),
            replay_windows=new.replay_windows,
            num_messages=self.transcript_start + len(self.transcript),
        )


def repaired(snapshot: Snapshot, known: Record | None, now_s: float, limits: StoreLimits) -> Record:
    """The record that `snapshot` makes of what the store still knows."""
    last, running = snapshot.conversation, None
    if snapshot.running is not None:
        of = snapshot.running
        fence = Fence(last.epoch, of.nonce)
        running = RunningTurn(
            *(fence, last.owner, of.key, of.request_hash, of.input_ids, of.output_ids),
            lease_from_s=now_s,
            lease_until_s=now_s + of.lease_s,
        )
    new = NewConversation(
        conversation_id=last.conversation_id,
        tenant=last.tenant,
        fingerprint=last.fingerprint,
        sink_tokens=last.sink_tokens,
        window_tokens=last.window_tokens,
        replay_windows=snapshot.replay_windows,
        metadata=last.metadata,
    )
    keys = {result.key for result in snapshot.results}
    older = [result for result in known.results if result.key not in keys] if known else []
    older = [result for result in older if _is_of(result, snapshot)]
    before: list[Message] = []
    system = known.system_messages() if known else []
    start = snapshot.first_message
    if known and known.transcript_start <= start <= known.transcript_start + len(known.transcript):
        before = known.transcript[: start - known.transcript_start]
        start = known.transcript_start
        system = list(known.system)
    record = Record(
        new=new,
        history=last.history,
        created_s=last.created_s,
        updated_s=last.updated_s,
        expires_s=(running.lease_until_s if running else now_s) + limits.ttl_s,
        turn=last.turn,
        head=last.head,
        owner=known.owner if known and running else last.owner,
        epoch=last.epoch,
        first_epoch=-1,
        replay=snapshot.replay,
        running=running,
        result=last.result,
        results=[*snapshot.results, *older],
        indexed=known.indexed if known else (),
        transcript=before,
        transcript_start=start,
        lost=known.lost if known else None,
        system=system,
    )
    record.prune(limits)
    record.append(snapshot.messages, limits)
    return record


def _is_of(result: RememberedTurn, snapshot: Snapshot) -> bool:
    """Whether a result that the store remembers belongs to the conversation as its owner knows it: an
    older store may have gone on to another end."""
    if result.turn >= snapshot.conversation.turn:
        return result.head == snapshot.conversation.head
    ids = snapshot.replay.ids_at(result.reply_start, len(result.reply_ids))
    empty = len(result.reply_ids) == 0
    return empty or (ids is not None and np.array_equal(ids, result.reply_ids))
