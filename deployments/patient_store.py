"""The store as the front asks it to open a turn: the seconds after a restart are waited out.

Then only owners may write, to bring it up to date, and nobody is told of a record that its owner may
know newer. It is over soon, so a turn waits, where a plain read is told to come again.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Protocol, TypeVar

from cluster.conversation import Conversation, Message, NewConversation, Rebase
from cluster.store import HistoryMatch, Recovering

T = TypeVar("T")

PATIENCE_S = 10.0
_MAX_PAUSE_S = 0.5


class OpeningStore(Protocol):
    """What of `cluster.store.ConversationStore` a turn is opened with."""

    async def create(self, new: NewConversation) -> Conversation: ...

    async def get(self, tenant: str, conversation_id: str) -> Conversation: ...

    async def transcript(
        self, tenant: str, conversation_id: str, limit: int = 100, before: int | None = None
    ) -> tuple[int, Sequence[Message]]: ...

    async def system_messages(self, tenant: str, conversation_id: str) -> Sequence[Message]: ...

    async def rebase(self, rebase: Rebase) -> Conversation: ...

    async def delete(self, tenant: str, conversation_id: str) -> None: ...

    async def match_history(self, tenant: str, history: str) -> HistoryMatch | None: ...


class PatientStore:
    """`store`, with Recovering raised only after `patience_s` seconds of it."""

    def __init__(self, store: OpeningStore, patience_s: float = PATIENCE_S) -> None:
        self._store = store
        self._patience_s = patience_s

    async def create(self, new: NewConversation) -> Conversation:
        """As in `ConversationStore`; so are all of these."""
        return await self._waiting(lambda: self._store.create(new))

    async def get(self, tenant: str, conversation_id: str) -> Conversation:
        return await self._waiting(lambda: self._store.get(tenant, conversation_id))

    async def transcript(
        self, tenant: str, conversation_id: str, limit: int = 100, before: int | None = None
    ) -> tuple[int, Sequence[Message]]:
        return await self._waiting(
            lambda: self._store.transcript(tenant, conversation_id, limit, before)
        )

    async def system_messages(self, tenant: str, conversation_id: str) -> Sequence[Message]:
        return await self._waiting(lambda: self._store.system_messages(tenant, conversation_id))

    async def rebase(self, rebase: Rebase) -> Conversation:
        return await self._waiting(lambda: self._store.rebase(rebase))

    async def delete(self, tenant: str, conversation_id: str) -> None:
        await self._waiting(lambda: self._store.delete(tenant, conversation_id))

    async def match_history(self, tenant: str, history: str) -> HistoryMatch | None:
        return await self._waiting(lambda: self._store.match_history(tenant, history))

    async def _waiting(self, ask: Callable[[], Awaitable[T]]) -> T:
        clock = asyncio.get_running_loop().time
        until_s = clock() + self._patience_s
        while True:
            try:
                return await ask()
            except Recovering as error:
                if clock() + error.retry_after_s > until_s:
                    raise
                pause_s = min(error.retry_after_s, _MAX_PAUSE_S)
            await asyncio.sleep(pause_s)
