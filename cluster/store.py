"""The conversation store: its contract and the errors it may raise.

Every operation is atomic. Time is the store's own clock. A tenant never learns that a foreign
conversation exists: it is NotFound. `tests/store_contract.py` is the executable form of this file and
runs against every implementation.

Every write may be repeated after a lost reply: the same `BeginTurn` returns the same ownership, the
same `TurnCommit` the committed record, the same `create` the conversation as created.

    StoreError
    |- NotFound            no such conversation for this tenant
    |- Conflict            another turn is running (retry after its lease)
    |- TurnConflict        expect_turn / expect_head is stale
    |- ModelChanged        the record belongs to another model, tokenizer or window
    |- Fenced              this owner has been replaced: show nothing, commit nothing
    |- AlreadyExists       another conversation has this id
    |- TurnTooLong         the input exceeds what a record may hold
    `- StoreUnavailable    no answer, or out of memory: retry later
       `- StoreVersionError   its function library is newer than this release
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from cluster.conversation import (
    BeginTurn,
    Conversation,
    Fence,
    Message,
    NewConversation,
    Ownership,
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


class StoreVersionError(StoreUnavailable):
    """The store's function library is newer than this release: upgrade it."""


@dataclass(frozen=True, slots=True)
class StoreLimits:
    """What keeps a conversation's state bounded. A record is at most

    4 * (S + replay_windows * R + input_tokens) + metadata_bytes + result_bytes + 2 KiB bytes,

    86 KiB at capacity 2048 with 4 windows; the transcript has its own limits. A conversation is
    forgotten `ttl_s` after its last turn.
    """

    ttl_s: float = 30 * 24 * 3600.0
    input_tokens: int = 8192
    metadata_bytes: int = 16 * 1024
    result_bytes: int = 4 * 1024
    transcript_messages: int = 1000
    transcript_bytes: int = 1024 * 1024

    def check_metadata(self, metadata: dict[str, str]) -> bytes:
        """The JSON to store. Raises ValueError when it is too large."""
        return _bounded_json("metadata", metadata, self.metadata_bytes)

    def check_result(self, result: dict[str, Any]) -> bytes:
        """The JSON to store. Raises ValueError when it is too large."""
        return _bounded_json("result", result, self.result_bytes)

    def check_input(self, tokens: int) -> None:
        """Raises TurnTooLong."""
        if tokens > self.input_tokens:
            raise TurnTooLong(tokens, self.input_tokens)


def _bounded_json(name: str, value: dict[str, Any], limit: int) -> bytes:
    data = json.dumps(value, ensure_ascii=True, separators=(",", ":")).encode()
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
        """Store an empty conversation (turn 0, no owner). Raises AlreadyExists."""
        ...

    async def get(self, tenant: str, conversation_id: str) -> Conversation:
        """Raises NotFound."""
        ...

    async def list(self, tenant: str, limit: int = 20, after: str = "") -> Sequence[Conversation]:
        """Newest first, at most `limit`, continuing after the conversation named `after`.
        Raises NotFound when `after` is not (or no longer) a conversation of this tenant."""
        ...

    async def transcript(
        self, tenant: str, conversation_id: str, limit: int = 100, before: int | None = None
    ) -> tuple[int, Sequence[Message]]:
        """The last `limit` messages before position `before` (default: the end) and the position
        of the first one returned. The transcript keeps a bounded number of messages. Raises NotFound."""
        ...

    async def begin(self, turn: BeginTurn) -> Ownership:
        """Claim the next turn; stores the input ids before any work is done on them.

        A running turn whose lease has run out is taken over and forgotten. A claim (nonce) that has
        ended cannot begin again: Fenced.
        Raises NotFound, ModelChanged, TurnTooLong, TurnConflict, Conflict, Fenced.
        """
        ...

    async def renew(self, tenant: str, conversation_id: str, fence: Fence, lease_s: float) -> None:
        """Keep a running turn's lease alive. Raises NotFound, Fenced."""
        ...

    async def commit(self, commit: TurnCommit) -> Conversation:
        """End the running turn: advance turn, token count, hash, replay ids and transcript, index its
        history hash, keep the owner for affinity. Raises NotFound, Fenced."""
        ...

    async def abort(self, tenant: str, conversation_id: str, fence: Fence) -> None:
        """End the running turn as if it had never begun; only the epoch stays. Raises NotFound, Fenced."""
        ...

    async def delete(self, tenant: str, conversation_id: str) -> None:
        """Forget the conversation, running turn included. Raises NotFound."""
        ...

    async def match_history(self, tenant: str, history: str) -> HistoryMatch | None:
        """The conversation that had this transcript, and after which turn, if it still exists.
        It may have moved on since. When two had the same transcript, the later commit counts."""
        ...

    async def ping(self) -> float:
        """Round-trip time in seconds."""
        ...

    async def close(self) -> None:
        """Close connections; idempotent."""
        ...
