"""Replicas that hang without dying: stopped processes, networks that swallow everything.

Ray tells of a replica that died; of one that is silent nobody tells until Serve's health check gives up.
But the lease tells: whoever runs a turn renews it. So a call from which nothing comes for a while looks
at the record; a turn whose lease is over is nobody's, and its call counts as lost with its replica.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator
from contextlib import aclosing

from cluster.store import ConversationStore, StoreError
from deployments.chat_service import ReplicaClient
from deployments.failover import ReplicaHangs
from deployments.turn_call import FollowCall, ReplicaStats, TurnAccepted, TurnCall, TurnItem

log = logging.getLogger(__name__)


class WatchedReplicas:
    """`replicas`, each call with an eye on its turn's lease.

    The record is looked at after every `silence_s` without an item; the lease must be over in
    `num_looks` looks in a row. On a machine that is choked this process may wake up before the owner,
    which then needs a moment to renew its lease. A call that no replica has accepted may be waiting for
    its turn to be claimed, so it is not lost before `unclaimed_s`.
    """

    def __init__(
        self,
        replicas: ReplicaClient,
        store: ConversationStore,
        silence_s: float = 1.0,
        num_looks: int = 3,
        unclaimed_s: float = 15.0,
    ) -> None:
        self._replicas = replicas
        self._store = store
        self._silence_s = silence_s
        self._num_looks = num_looks
        self._unclaimed_s = unclaimed_s

    async def stats(self) -> tuple[ReplicaStats, ...]:
        """See `ReplicaClient.stats`."""
        return await self._replicas.stats()

    async def turn(self, call: TurnCall) -> AsyncGenerator[TurnItem, None]:
        """See `EngineClient.turn`. Raises ReplicaHangs."""
        async with aclosing(self._watched(self._replicas.turn(call), call)) as items:
            async for item in items:
                yield item

    async def follow(self, call: FollowCall) -> AsyncGenerator[TurnItem, None]:
        """See `EngineClient.follow`. Raises as `turn`."""
        async with aclosing(self._watched(self._replicas.follow(call), call)) as items:
            async for item in items:
                yield item

    async def _watched(
        self, items: AsyncGenerator[TurnItem, None], call: TurnCall | FollowCall
    ) -> AsyncGenerator[TurnItem, None]:
        clock, accepted = asyncio.get_running_loop().time, False
        pending: asyncio.Task[TurnItem] | None = None
        looks_without = 0
        try:
            asked_s = clock()
            while True:
                pending = pending or asyncio.ensure_future(anext(items))
                await asyncio.wait((pending,), timeout=self._silence_s)
                if pending.done():
                    item = pending.result()
                    pending, asked_s, looks_without = None, clock(), 0
                    accepted = accepted or isinstance(item, TurnAccepted)
                    yield item
                elif accepted or clock() - asked_s > self._unclaimed_s:
                    looks_without = 0 if await self._has_lease(call) else looks_without + 1
                    if looks_without >= self._num_looks:
                        log.warning(
                            "the replica of %s hangs: its lease is over", call.conversation_id
                        )
                        raise ReplicaHangs
        except StopAsyncIteration:
            return
        finally:
            if pending is not None:
                pending.cancel()
                await asyncio.wait((pending,))
            await items.aclose()

    async def _has_lease(self, call: TurnCall | FollowCall) -> bool:
        """Whether somebody holds the conversation, as far as the store can tell."""
        try:
            record = await self._store.get(call.tenant, call.conversation_id)
        except StoreError as error:
            # It has troubles of its own; the replica may have none.
            log.debug("no look at the lease of %s: %s", call.conversation_id, error)
            return True
        return record.running
