"""The conversation store: its contract and the errors it may raise.

Every operation is atomic. Time is the store's own clock. A tenant never learns that a foreign
conversation exists: it is NotFound. `tests/store_contract.py` is the executable form of this file and
runs against every implementation.

Every write may be repeated after a lost reply: the same `BeginTurn` returns the same ownership, the
same `TurnCommit` the committed record, the same `create` the conversation as created.

A store may restart and come back older than it was: it lost what it had acknowledged. It knows that it
restarted, and for `recovery_s` only owners may write, to `repair` it from what they hold in RAM: `begin`
and `rebase` are Recovering, for everybody (the owner that an older record names may not be the last),
and so is a conversation that is missing, unless it was deleted. `pulse` tells owners of the restart. A
write under a fence goes on where the store still knows the claim and is RolledBack where it does not;
it is Fenced only when a later owner exists.

    StoreError
    |- NotFound            no such conversation for this tenant
    |- Conflict            another turn is running (retry after its lease)
    |- TurnConflict        expect_turn / expect_head is stale
    |- ModelChanged        the record belongs to another model, tokenizer or window
    |- Fenced              this owner has been replaced: show nothing, commit nothing
    |- RolledBack          the store is older than what it acknowledged to this owner: repair it
    |- KeyReused           the idempotency key came with another request before
    |- Quarantined         the turn has lost too many owners without getting anywhere
    |- AlreadyExists       another conversation has this id
    |- TurnTooLong         the input exceeds what a record may hold
    `- StoreUnavailable    no answer, or out of memory: retry later
       |- Recovering          it has restarted and waits for owners to repair it
       `- StoreVersionError   its function library is newer than this release
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from cluster.conversation import (
    BeginTurn,
    Begun,
    Checkpoint,
    Conversation,
    Fence,
    Message,
    NewConversation,
    Rebase,
    RememberedTurn,
    Snapshot,
    TurnCommit,
)


class StoreError(Exception):
    """Base of all errors of the store."""


class NotFound(StoreError):
    """No such conversation for this tenant."""


class Conflict(StoreError):
    """Another turn of this conversation is running; its lease ends in `retry_after_s` unless renewed."""

    def __init__(self, retry_after_s: float) -> None:
        super().__init__(f"another turn is running; retry after {retry_after_s:.1f} s")
        self.retry_after_s = retry_after_s


class TurnConflict(StoreError):
    """The caller's view is stale: the conversation is at `turn` with hash `head`."""

    def __init__(self, turn: int, head: str) -> None:
        super().__init__(f"the conversation is at turn {turn} (hash {head[:12]})")
        self.turn = turn
        self.head = head


class ModelChanged(StoreError):
    """The record was written under another model fingerprint."""


class Fenced(StoreError):
    """A later owner exists."""


class RolledBack(StoreError):
    """The store knows less than it acknowledged to this owner; `repair` brings it back."""


class KeyReused(StoreError):
    """Another request was made under this idempotency key."""


class Quarantined(StoreError):
    """The turn of this key was taken over too often without a token between: it is not run again."""


class AlreadyExists(StoreError):
    """Another conversation has this id. Ids are random, so this is a mistake of the caller."""


class TurnTooLong(StoreError):
    """The turn's input has `tokens` ids and a record holds at most `limit`."""

    def __init__(self, tokens: int, limit: int) -> None:
        super().__init__(f"the turn's input has {tokens} tokens, at most {limit} are accepted")
        self.tokens = tokens
        self.limit = limit


class StoreUnavailable(StoreError):
    """The store gave no answer or refused for lack of memory."""


class Recovering(StoreUnavailable):
    """The store has restarted; until `retry_after_s` have passed only owners may write."""

    def __init__(self, retry_after_s: float) -> None:
        super().__init__(f"the store has restarted; retry after {retry_after_s:.1f} s")
        self.retry_after_s = retry_after_s


class StoreVersionError(StoreUnavailable):
    """The store's function library is newer than this release: upgrade it."""


@dataclass(frozen=True, slots=True)
class StoreLimits:
    """What keeps a conversation's state bounded. A record's ids and texts take at most

    4 * (S + replay_windows * R + input_tokens + output_tokens)       replay, running turn
      + metadata_bytes + results_bytes + 3 KiB                        the rest

    bytes: 95 KiB at capacity 2048 with 4 windows and S of at least 4, which no allocator rounds up to
    more than 100 KiB. (Replay windows too small to hold a reply add 4 * output_tokens for the newest
    one, but then the replay ids take less than that.) The transcript has its own limits. A
    conversation is forgotten `ttl_s` after its last turn; an older result when `results_bytes` are full
    or its reply leaves the replay ids.
    """

    ttl_s: float = 30 * 24 * 3600.0
    input_tokens: int = 8000
    output_tokens: int = 4096
    metadata_bytes: int = 10_000
    result_bytes: int = 1024
    results_bytes: int = 3000
    key_bytes: int = 256
    transcript_messages: int = 1000
    transcript_bytes: int = 1024 * 1024
    max_attempts: int = 2
    """Owners in a row of a turn that are seen dead before they store a token of it."""
    max_lapses: int = 6
    """Owners in a row of a turn that go otherwise before they do: their lease ran out, or they let go."""
    recovery_s: float = 2.5
    """After a restart, before others than owners may write."""

    def check_metadata(self, metadata: dict[str, str]) -> bytes:
        """The JSON to store. Raises ValueError when it is too large."""
        return _bounded_json("metadata", metadata, self.metadata_bytes)

    def check_result(self, result: dict[str, Any]) -> bytes:
        """The JSON to store. Raises ValueError when it is too large."""
        return _bounded_json("result", result, self.result_bytes)

    def check_claim(self, turn: BeginTurn) -> None:
        """Raises TurnTooLong; ValueError when the key or the request's hash is too long."""
        if len(turn.input_ids) > self.input_tokens:
            raise TurnTooLong(len(turn.input_ids), self.input_tokens)
        for name, text in (("key", turn.key), ("request_hash", turn.request_hash)):
            if len(text.encode()) > self.key_bytes:
                raise ValueError(f"{name} takes more than {self.key_bytes} bytes")

    def size_of(self, result: RememberedTurn) -> int:
        """What a remembered turn counts against `results_bytes`; its reply is among the replay ids."""
        names = len(result.key.encode()) + len(result.request_hash.encode())
        return len(encode_json(result.result)) + names + 100


def encode_json(value: dict[str, Any]) -> bytes:
    """As metadata and results are stored."""
    return json.dumps(value, ensure_ascii=True, separators=(",", ":")).encode()


def _bounded_json(name: str, value: dict[str, Any], limit: int) -> bytes:
    data = encode_json(value)
    if len(data) > limit:
        raise ValueError(f"{name} takes {len(data)} bytes as JSON, at most {limit} are stored")
    return data


@dataclass(frozen=True, slots=True)
class HistoryMatch:
    """Where a transcript hash was last seen: `conversation_id` right after turn `turn`."""

    conversation_id: str
    turn: int


class ConversationStore(Protocol):
    """Durable, bounded conversation state. All methods may raise StoreUnavailable."""

    async def create(self, new: NewConversation) -> Conversation:
        """Store an empty conversation (turn 0, no owner), also while the store recovers: the repair of
        a conversation that the store has lost goes before one that nobody has begun.
        Raises AlreadyExists."""
        ...

    async def get(self, tenant: str, conversation_id: str) -> Conversation:
        """Raises NotFound; Recovering also for a record that is there: an owner may know a newer one."""
        ...

    async def list(self, tenant: str, limit: int = 20, after: str = "") -> Sequence[Conversation]:
        """Newest first, at most `limit`, continuing after the conversation named `after`.
        Raises NotFound when `after` is not (or no longer) a conversation of this tenant, Recovering."""
        ...

    async def transcript(
        self, tenant: str, conversation_id: str, limit: int = 100, before: int | None = None
    ) -> tuple[int, Sequence[Message]]:
        """The last `limit` messages before position `before` (default: the end) and the position
        of the first one returned. The transcript keeps a bounded number of messages.
        Raises NotFound, Recovering."""
        ...

    async def system_messages(self, tenant: str, conversation_id: str) -> Sequence[Message]:
        """The system messages that the conversation began with, also those that the transcript has
        dropped since. Raises NotFound, Recovering."""
        ...

    async def begin(self, turn: BeginTurn) -> Begun:
        """Claim the next turn, or find out what became of it; stores the input ids before any work is
        done on them. In this order:

        - the store has restarted and owners are repairing it: Recovering;
        - this claim already holds the conversation: the same Ownership again; it was the last to end:
          Fenced;
        - the key was committed: CommittedTurn (KeyReused when the request differs), or given up:
          Quarantined, as long as its result is remembered;
        - the key is running: KeyReused when the request differs, BusyTurn while its lease lasts, unless
          `steal`; then it is taken over (ModelChanged for another model): Ownership with the stored
          input and the tokens so far, whatever was expected, or Quarantined when it has now lost
          `max_attempts` owners to their death or `max_lapses` otherwise, in a row and without a
          stored token; the conversation is then free again;
        - the record is another model's: ModelChanged;
        - `expect_turn` / `expect_head` are stale: TurnConflict;
        - another key is running: Conflict while its lease lasts; later its turn is forgotten, but for
          how many owners it has lost;
        - Ownership of a new turn, or Quarantined: that turn, begun anew, goes on counting.

        Raises NotFound, Fenced, KeyReused, Quarantined, ModelChanged, TurnTooLong, TurnConflict, Conflict,
        Recovering.
        """
        ...

    async def checkpoint(self, batch: Sequence[Checkpoint]) -> Sequence[StoreError | None]:
        """Store output tokens of several running turns, and renew their leases, in one round trip.

        One answer for each: None (stored), or NotFound (deleted), Fenced, RolledBack, StoreUnavailable.
        Tokens that are stored already must be the same (Fenced otherwise); a gap before `k` is
        RolledBack. The lease is written anew once a quarter of it is used up.
        """
        ...

    async def renew(self, tenant: str, conversation_id: str, fence: Fence, lease_s: float) -> None:
        """Keep a running turn's lease alive. Raises NotFound (deleted), Fenced, RolledBack."""
        ...

    async def commit(self, commit: TurnCommit) -> Conversation:
        """End the running turn: advance turn, token count, hash, replay ids and transcript, index its
        history hash in place of the last one, keep the owner for affinity, remember the reply under
        the turn's key. The output as committed may end otherwise than the tokens as sampled that were
        checkpointed (a stop string, the closing ids). Raises NotFound (deleted), RolledBack, Fenced."""
        ...

    async def abort(self, tenant: str, conversation_id: str, fence: Fence) -> None:
        """End the running turn as if it had never begun; only the epoch stays.
        Raises NotFound (deleted), Fenced, RolledBack."""
        ...

    async def repair(self, snapshot: Snapshot) -> None:
        """Put back what the store has lost of a conversation that the caller owned last.

        Accepted when the snapshot is newer than the record by (epoch, turn, tokens of the running turn;
        an ended turn is newer than a running one), or the record is missing and was not deleted;
        repairing with what is stored already is no error. Results that only the store knows stay.
        Raises Fenced when the record is newer, NotFound when it was deleted or has expired."""
        ...

    async def rebase(self, rebase: Rebase) -> Conversation:
        """Raises NotFound, TurnConflict (`expect_head` is stale), Conflict (a turn is running),
        Recovering."""
        ...

    async def pulse(self) -> str:
        """Names this life of the store: another answer than last time means that it restarted.
        A store of several servers answers for all of them."""
        ...

    async def delete(self, tenant: str, conversation_id: str) -> None:
        """Forget the conversation, running turn included; nobody can `repair` it. The same id may be
        created again. Raises NotFound, Recovering."""
        ...

    async def match_history(self, tenant: str, history: str) -> HistoryMatch | None:
        """The conversation whose transcript was this after its last indexed turn, if it still exists.
        It may have moved on since. When two had the same transcript, the later commit counts.
        Raises Recovering."""
        ...

    async def ping(self) -> float:
        """Round-trip time in seconds."""
        ...

    async def close(self) -> None:
        """Close connections; idempotent."""
        ...
