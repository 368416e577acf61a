"""A replica that dies: from one moment on nothing of it reaches the store or a client."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import replace
from typing import Any, Literal

from cluster.conversation import Checkpoint, Conversation, TurnCommit
from cluster.store import ConversationStore, StoreError
from deployments.config import Tunables
from deployments.turn_call import TurnCall, TurnItem, TurnTokens
from deployments.turn_runner import TurnRunner
from engine.toy_engine import ToyEngine
from tests.toy_service import make_runner


class MortalStore:
    """The store as one replica reaches it. `dies_at`: as soon as that many output tokens are stored,
    or instead of the commit, the rest is lost and no answer comes back, ever."""

    def __init__(
        self, store: ConversationStore, dies_at: int | Literal["commit"] | None = None
    ) -> None:
        self._store = store
        self.dies_at = dies_at
        self.died = asyncio.Event()

    def __getattr__(self, name: str) -> Callable[..., Coroutine[Any, Any, Any]]:
        operation = getattr(self._store, name)

        async def call(*args: Any) -> Any:
            await self._alive()
            answer = await operation(*args)
            await self._alive()
            return answer

        return call

    async def checkpoint(self, batch: Sequence[Checkpoint]) -> Sequence[StoreError | None]:
        await self._alive()
        for one in batch:
            if isinstance(self.dies_at, int) and one.k + len(one.token_ids) > self.dies_at:
                stored = replace(one, token_ids=one.token_ids[: self.dies_at - one.k])
                await self._store.checkpoint([stored])
                self.died.set()
        await self._alive()
        return await self._store.checkpoint(batch)

    async def commit(self, commit: TurnCommit) -> Conversation:
        if self.dies_at == "commit":
            self.died.set()
        await self._alive()
        return await self._store.commit(commit)

    async def _alive(self) -> None:
        if self.died.is_set():
            await asyncio.Event().wait()


class MortalReplica:
    """A runner on a MortalStore, and one client of it."""

    def __init__(
        self,
        store: ConversationStore,
        name: str = "doomed",
        dies_at: int | Literal["commit"] | None = None,
        engine: ToyEngine | None = None,
        tunables: Tunables | None = None,
    ) -> None:
        self.store = MortalStore(store, dies_at)
        self.runner: TurnRunner = make_runner(self.store, name, engine, tunables)
        self.items: list[TurnItem] = []
        self._tasks: list[asyncio.Task[None]] = []

    @property
    def shown(self) -> tuple[int, ...]:
        """Output tokens that the client has seen."""
        return tokens_of(self.items)

    def start(self, call: TurnCall) -> None:
        async def read() -> None:
            async for item in self.runner.turn(call):
                if not self.store.died.is_set():
                    self.items.append(item)

        self._tasks.append(asyncio.create_task(read()))

    async def kill(self) -> None:
        """Now. Its engine's thread goes; its tasks stay where they are, as a dead process's do."""
        self.store.died.set()
        await asyncio.to_thread(self.runner._parts.loop.stop, drain=False, timeout_s=20.0)


def tokens_of(items: Sequence[TurnItem], k: int = 0) -> tuple[int, ...]:
    """The tokens of a stream, which must be numbered from `k` on without a gap."""
    found: list[int] = []
    for item in items:
        if isinstance(item, TurnTokens):
            assert item.k == k + len(found), "a token is missing or repeated"
            found += item.token_ids
    return tuple(found)
