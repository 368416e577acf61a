"""A replica that hangs is told by its lease, and only by it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass, field, replace

import numpy as np
import pytest

from cluster.conversation import GENESIS, BeginTurn, Conversation, NewConversation, Ownership
from cluster.memory_store import MemoryStore
from cluster.store import StoreUnavailable
from deployments.errors import ServiceError
from deployments.hung_replicas import WatchedReplicas
from deployments.turn_call import (
    FollowCall,
    ReplicaStats,
    TurnAccepted,
    TurnCall,
    TurnItem,
    TurnTokens,
)
from engine.sampling import SamplingParams

NAME = "conv_" + "0" * 32
CALL = TurnCall(
    tenant="t",
    conversation_id=NAME,
    input_ids=np.ones(1, np.int32),
    messages=(),
    history=GENESIS,
    sampling=SamplingParams(),
    max_tokens=4,
)
ACCEPTED = TurnAccepted(1, "r", "none")


@dataclass
class Replica:
    """Sends what it is told to, then hangs until `go` is set."""

    items: list[TurnItem]
    rest: list[TurnItem] = field(default_factory=list)
    go: asyncio.Event = field(default_factory=asyncio.Event)
    left: bool = False

    async def turn(self, call: TurnCall) -> AsyncGenerator[TurnItem, None]:
        try:
            for item in self.items:
                yield item
            await self.go.wait()
            for item in self.rest:
                yield item
        finally:
            self.left = True

    def follow(self, call: FollowCall) -> AsyncGenerator[TurnItem, None]:
        return self.turn(CALL)

    async def stats(self) -> tuple[ReplicaStats, ...]:
        return ()


class AwayStore(MemoryStore):
    """Counts who asks, and does not answer."""

    def __init__(self) -> None:
        super().__init__()
        self.asked = 0
        self.often = asyncio.Event()

    async def get(self, tenant: str, conversation_id: str) -> Conversation:
        self.asked += 1
        if self.asked == 3:
            self.often.set()
        raise StoreUnavailable("away")


async def claimed(store: MemoryStore, lease_s: float) -> Ownership:
    await store.create(NewConversation(NAME, "t", "f", 4, 28, 2))
    begun = await store.begin(BeginTurn(NAME, "t", "r", np.ones(1, np.int32), "f", lease_s))
    assert isinstance(begun, Ownership)
    return begun


async def read(items: AsyncGenerator[TurnItem, None], into: list[TurnItem]) -> None:
    async with aclosing(items):
        async for item in items:
            into.extend([item])


async def test_silence_beyond_the_lease_is_a_lost_replica() -> None:
    store, replica, seen = MemoryStore(), Replica([ACCEPTED, TurnTokens(0, (1,))]), list[TurnItem]()
    owned = await claimed(store, 60.0)
    reading = asyncio.create_task(read(WatchedReplicas(replica, store, 0.005).turn(CALL), seen))
    await asyncio.sleep(0.05)
    # As long as the lease lasts, silence is work.
    assert not reading.done()
    await store.renew("t", NAME, owned.fence, 0.001)
    with pytest.raises(ServiceError) as lost:
        await reading
    assert (lost.value.info.code, seen, replica.left) == ("replica_lost", replica.items, True)


async def test_who_follows_is_told_too() -> None:
    store, replica = MemoryStore(), Replica([ACCEPTED])
    await claimed(store, 0.001)
    call = FollowCall("t", NAME, "r", 60.0)
    with pytest.raises(ServiceError):
        await read(WatchedReplicas(replica, store, 0.005).follow(call), [])
    assert replica.left


async def test_nothing_is_lost_of_what_comes_late() -> None:
    store, seen = MemoryStore(), list[TurnItem]()
    replica = Replica([ACCEPTED], [TurnTokens(0, (1, 2)), TurnTokens(2, (3,))])
    await claimed(store, 60.0)
    reading = asyncio.create_task(read(WatchedReplicas(replica, store, 0.005).turn(CALL), seen))
    await asyncio.sleep(0.05)
    replica.go.set()
    await reading
    assert seen == [*replica.items, *replica.rest]


async def test_a_call_that_waits_to_be_claimed_has_more_time() -> None:
    store, seen = MemoryStore(), list[TurnItem]()
    replica = Replica([], [ACCEPTED])
    await store.create(NewConversation(NAME, "t", "f", 4, 28, 2))
    watched = WatchedReplicas(replica, store, 0.005, unclaimed_s=3600.0)
    reading = asyncio.create_task(read(watched.turn(CALL), seen))
    await asyncio.sleep(0.05)
    replica.go.set()
    await reading
    assert seen == [ACCEPTED]
    with pytest.raises(ServiceError):
        await read(WatchedReplicas(Replica([]), store, 0.005, unclaimed_s=0.01).turn(CALL), [])


async def test_a_store_that_is_away_says_nothing_about_replicas() -> None:
    store, seen = AwayStore(), list[TurnItem]()
    replica = Replica([ACCEPTED], [TurnTokens(0, (1,))])
    reading = asyncio.create_task(read(WatchedReplicas(replica, store, 0.005).turn(CALL), seen))
    await store.often.wait()
    replica.go.set()
    await reading
    assert seen == [*replica.items, *replica.rest]


async def test_leaving_closes_the_call() -> None:
    store, replica = MemoryStore(), Replica([ACCEPTED])
    await claimed(store, 60.0)
    async with aclosing(WatchedReplicas(replica, store, 0.005).turn(CALL)) as items:
        assert await anext(items) == ACCEPTED
        waiting = asyncio.ensure_future(anext(items))
        await asyncio.sleep(0.02)
        waiting.cancel()
        await asyncio.wait((waiting,))
    assert replica.left


class StutteringStore(MemoryStore):
    """Sees the lease over in all looks but every third."""

    def __init__(self) -> None:
        super().__init__()
        self.looks = 0
        self.often = asyncio.Event()

    async def get(self, tenant: str, conversation_id: str) -> Conversation:
        self.looks += 1
        if self.looks == 9:
            self.often.set()
        record = await super().get(tenant, conversation_id)
        return replace(record, running=self.looks % 3 == 0)


async def test_a_lease_that_is_renewed_late_is_no_reason() -> None:
    store, seen = StutteringStore(), list[TurnItem]()
    replica = Replica([ACCEPTED], [TurnTokens(0, (1,))])
    await claimed(store, 60.0)
    reading = asyncio.create_task(read(WatchedReplicas(replica, store, 0.001).turn(CALL), seen))
    await store.often.wait()
    replica.go.set()
    await reading
    assert seen == [*replica.items, *replica.rest]
