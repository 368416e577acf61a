"""The conversation store: its contract and the errors it may raise.

Every operation is atomic. Time is the store's own clock. A tenant never learns that a foreign
conversation exists: it is NotFound. `tests/store_contract.py` is the executable form of this file and
runs against every implementation.

    StoreError
    |- NotFound            no such conversation for this tenant
    |- Conflict            another turn is running (retry after its lease)
    |- TurnConflict        expect_turn / expect_head is stale
    |- ModelChanged        the record belongs to another model, tokenizer or window
    |- Fenced              this owner has been replaced: show nothing, commit nothing
    |- StoreUnavailable    no answer, or out of memory: retry later
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

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


class StoreUnavailable(StoreError):
    """The store gave no answer or refused for lack of memory."""


@dataclass(frozen=True, slots=True)
class HistoryMatch:
    """Where a transcript hash was last seen: `conversation_id` right after turn `turn`."""

    conversation_id: str
    turn: int


class ConversationStore(Protocol):
    """Durable, bounded conversation state. All methods may raise StoreUnavailable."""

    async def create(self, new: NewConversation) -> Conversation:
        """Store an empty conversation (turn 0, no owner)."""
        ...

    async def get(self, tenant: str, conversation_id: str) -> Conversation:
        """Raises NotFound."""
        ...

    async def list(self, tenant: str, limit: int = 20, after: str = "") -> list[Conversation]:
        """Newest first, at most `limit`, continuing after the conversation named `after`."""
        ...

    async def transcript(
        self, tenant: str, conversation_id: str, limit: int = 100, before: int | None = None
    ) -> tuple[int, list[Message]]:
        """The last `limit` messages before position `before` (default: the end) and the position
        of the first one returned. The transcript keeps a bounded number of messages. Raises NotFound."""
        ...

    async def begin(self, turn: BeginTurn) -> Ownership:
        """Claim the next turn; stores the input ids before any work is done on them.

        A running turn whose lease has run out is taken over and forgotten.
        Raises NotFound, Conflict, TurnConflict, ModelChanged.
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
        """End the running turn as if it had never begun. Raises NotFound, Fenced."""
        ...

    async def delete(self, tenant: str, conversation_id: str) -> None:
        """Forget the conversation, running turn included. Raises NotFound."""
        ...

    async def match_history(self, tenant: str, history: str) -> HistoryMatch | None:
        """The conversation whose transcript hashes to `history`, if it is known."""
        ...

    async def ping(self) -> float:
        """Round-trip time in seconds."""
        ...

    async def close(self) -> None:
        """Close connections; idempotent."""
        ...
