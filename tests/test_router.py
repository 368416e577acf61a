"""The router adapter on Ray's shipped fake replicas: no cluster, real `RequestRouter` base class."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from ray.serve._private.common import DeploymentHandleSource, DeploymentID, RequestMetadata
from ray.serve._private.request_router.common import PendingRequest
from ray.serve._private.test_utils import FakeRunningReplica

from cluster.conversation import GENESIS
from deployments.conversation_router import ConversationRouter
from deployments.errors import ServiceError
from deployments.turn_call import FollowCall, TurnCall
from engine.sampling import SamplingParams


class Replica(FakeRunningReplica):
    """Ray's fake, with routing statistics."""

    def __init__(self, name: str, free_slots: int = 8, max_ongoing_requests: int = 4) -> None:
        super().__init__(name, max_ongoing_requests=max_ongoing_requests)
        self.stats: dict[str, Any] = {"free_slots": free_slots}
        self.set_queue_len_response(0)

    @property
    def routing_stats(self) -> dict[str, Any]:
        return self.stats


def make_router(*replicas: Replica, **kwargs: float) -> ConversationRouter:
    router = ConversationRouter(
        DeploymentID(name="TEST_DEPLOYMENT"),
        DeploymentHandleSource.REPLICA,
        use_replica_queue_len_cache=True,
        initial_backoff_s=0.001,
        max_backoff_s=0.01,
    )
    router.initialize_state(**{"max_wait_s": 0.2, **kwargs})
    router.update_replicas(list(replicas))
    return router


def call(conversation_id: str, owner_hint: str = "") -> TurnCall:
    return TurnCall(
        tenant="t",
        conversation_id=conversation_id,
        input_ids=np.zeros(1, np.int32),
        messages=(),
        history=GENESIS,
        sampling=SamplingParams(),
        max_tokens=1,
        owner_hint=owner_hint,
    )


def request(*args: object, internal_request_id: str = "parent", session_id: str = "") -> Any:
    metadata = RequestMetadata(
        request_id="request", internal_request_id=internal_request_id, session_id=session_id
    )
    return PendingRequest(args=list(args), kwargs={}, metadata=metadata)


def run(test: Callable[[], Any]) -> None:
    asyncio.run(asyncio.wait_for(test(), 30))


def test_concurrent_calls_sharing_the_parents_id_all_get_their_own_conversations_owner() -> None:
    async def scenario() -> None:
        replicas = [Replica(name, max_ongoing_requests=100) for name in "abc"]
        router = make_router(*replicas)
        hints = ["abc"[n % 3] for n in range(20)]
        chosen = await asyncio.gather(
            *(
                router._choose_replica_for_request(request(call(f"conv_{n}", hint)))
                for n, hint in enumerate(hints)
            )
        )
        assert [r.replica_id.unique_id for r in chosen] == hints

    run(scenario)


async def choose(router: ConversationRouter, turn: TurnCall, *, is_retry: bool = False) -> str:
    replica = await router._choose_replica_for_request(request(turn), is_retry=is_retry)
    return str(replica.replica_id.unique_id)


def test_new_conversations_spread_before_statistics_catch_up_and_then_stay() -> None:
    async def scenario() -> None:
        router = make_router(Replica("a", 8), Replica("b", 8))
        first = [await choose(router, call(f"conv_{n}")) for n in range(8)]
        assert first.count("a") == first.count("b") == 4
        router.update_replicas([Replica("a", 0), Replica("b", 0), Replica("c", 99)])
        assert [await choose(router, call(f"conv_{n}")) for n in range(8)] == first
        assert await choose(router, call("conv_new")) == "c"

    run(scenario)


def test_a_call_made_again_avoids_the_replica_that_was_lost() -> None:
    """Also while Ray still lists it, and the conversation then stays where it went."""

    async def scenario() -> None:
        router = make_router(Replica("a"), Replica("b", 1))
        assert await choose(router, call("conv_1", "a")) == "a"
        again = dataclasses.replace(call("conv_1", "a"), avoid="a", steal=True)
        assert await choose(router, again) == "b"
        assert await choose(router, call("conv_1")) == "b"

    run(scenario)


def test_who_follows_a_turn_goes_to_its_owner_or_nowhere() -> None:
    async def scenario() -> None:
        router = make_router(Replica("a"), Replica("b"))
        for owner in "ab":
            following = request(FollowCall("t", "conv_1", owner))
            replica = await router._choose_replica_for_request(following)
            assert str(replica.replica_id.unique_id) == owner
        with pytest.raises(ServiceError, match="replica_lost"):
            await router._choose_replica_for_request(request(FollowCall("t", "conv_1", "gone")))

    run(scenario)


def full(name: str, clean_slots: int = 4, running: int = 0) -> Replica:
    """A replica as it is in the long run: no slot was never used."""
    replica = Replica(name)
    replica.stats = {"free_slots": 0, "clean_slots": clean_slots, "running": running, "waiting": 0}
    return replica


def test_full_replicas_share_new_conversations_before_statistics_catch_up() -> None:
    async def scenario() -> None:
        router = make_router(full("a"), full("b"))
        chosen = [await choose(router, call(f"conv_{n}")) for n in range(8)]
        assert chosen.count("a") == chosen.count("b") == 4
        router = make_router(full("a", 2, running=2), full("b"))
        chosen = [await choose(router, call(f"conv_{n}")) for n in range(4)]
        assert chosen.count("b") == 3

    run(scenario)


def test_a_replica_without_statistics_is_taken_for_free_among_full_ones() -> None:
    async def scenario() -> None:
        fresh = Replica("c")
        fresh.stats = {}
        router = make_router(full("a"), full("b"), fresh)
        assert await choose(router, call("conv")) == "c"

    run(scenario)


def test_a_replica_without_statistics_yet_gets_its_share() -> None:
    async def scenario() -> None:
        fresh = Replica("b")
        fresh.stats = {}
        router = make_router(Replica("a", 8), fresh)
        chosen = [await choose(router, call(f"conv_{n}")) for n in range(8)]
        assert chosen.count("a") == chosen.count("b") == 4

    run(scenario)


def test_the_records_owner_beats_what_this_router_remembers() -> None:
    async def scenario() -> None:
        router = make_router(Replica("a", 8), Replica("b", 0))
        assert await choose(router, call("conv")) == "a"
        assert await choose(router, call("conv", owner_hint="b")) == "b"
        assert await choose(router, call("conv", owner_hint="dead")) == "b"

    run(scenario)


def test_session_id_alone_has_affinity_too() -> None:
    async def scenario() -> None:
        router = make_router(Replica("a", 1), Replica("b", 0), stats_lag_s=0.0)
        first = await router._choose_replica_for_request(request("x", session_id="s"))
        router.update_replicas([Replica("a", 0), Replica("b", 9)])
        second = await router._choose_replica_for_request(request("x", session_id="s"))
        assert first.replica_id == second.replica_id

    run(scenario)


def test_full_owner_is_waited_for() -> None:
    async def scenario() -> None:
        owner = Replica("a")
        router = make_router(owner, Replica("b"), max_wait_s=20.0)
        owner.set_queue_len_response(4)
        router.on_new_queue_len_info(owner.replica_id, 4)
        waiting = asyncio.ensure_future(choose(router, call("conv", "a"), is_retry=True))
        await asyncio.sleep(0.1)
        assert not waiting.done()
        owner.set_queue_len_response(3)
        assert await waiting == "a"

    run(scenario)


def test_owner_that_stays_full_is_overloaded() -> None:
    async def scenario() -> None:
        owner = Replica("a")
        router = make_router(owner, Replica("b"))
        owner.set_queue_len_response(4)
        router.on_new_queue_len_info(owner.replica_id, 4)
        with pytest.raises(ServiceError) as refusal:
            await choose(router, call("conv", "a"))
        assert refusal.value.info.code == "overloaded"

    run(scenario)


def test_dead_owner_is_replaced_at_once() -> None:
    async def scenario() -> None:
        owner = Replica("a", 8)
        router = make_router(owner, Replica("b", 0))
        assert await choose(router, call("conv")) == "a"
        router.on_replica_actor_died(owner.replica_id)
        assert await choose(router, call("conv"), is_retry=True) == "b"

    run(scenario)


def test_a_call_made_before_the_first_replica_waits_for_it() -> None:
    async def scenario() -> None:
        router = make_router()
        waiting = asyncio.ensure_future(choose(router, call("conv")))
        await asyncio.sleep(0.05)
        assert not waiting.done()
        router.update_replicas([Replica("a")])
        assert await waiting == "a"

    run(scenario)


def test_no_replica_at_all_is_not_ready() -> None:
    async def scenario() -> None:
        router = make_router(no_replica_wait_s=0.05)
        with pytest.raises(ServiceError) as refusal:
            await choose(router, call("conv"))
        assert refusal.value.info.code == "not_ready"

    run(scenario)


def test_choose_replicas_returns_the_owner_alone() -> None:
    async def scenario() -> None:
        replicas = [Replica("a"), Replica("b")]
        router = make_router(*replicas)
        ranked = await router.choose_replicas(list(replicas), request(call("conv", "b")))
        assert ranked == [[replicas[1]]]

    run(scenario)
