"""What `benchmarks.failover` computes by itself: old records, and when a stream went on."""

from __future__ import annotations

import pytest

from benchmarks.chaos.client import TurnLog
from benchmarks.chaos.oracle import Asked
from benchmarks.chaos.rig import NotHappened
from benchmarks.failover import grow_old, resumption_s
from cluster.conversation import BeginTurn, NewConversation, Ownership
from cluster.memory_store import MemoryStore
from cluster.restore import plan_restore
from deployments.auth import DEFAULT_TENANT
from deployments.text import ChatCodec


@pytest.mark.parametrize(("age", "recovery"), [(100, "exact"), (600, "replay"), (10_000, "replay")])
async def test_a_record_grows_old_to_the_token_and_is_restored_by_bounded_replay(
    age: int, recovery: str
) -> None:
    store, codec = MemoryStore(), ChatCodec.for_toy()
    await store.create(NewConversation("conv", DEFAULT_TENANT, "toy", 4, 124, 4))
    assert (await grow_old(store, codec, "conv", age)).token_count == age
    claim = BeginTurn("conv", DEFAULT_TENANT, "r", codec.encode_turn([]), "toy", 10.0)
    begun = await store.begin(claim)
    assert isinstance(begun, Ownership)
    plan = plan_restore(begun.replay, claim.input_ids, None)
    assert plan.recovery == recovery
    assert plan.num_tokens == min(age, 4 + 4 * 124) + len(claim.input_ids)


def shown_at(*times_s: float) -> TurnLog:
    return TurnLog(Asked("", 9), "key", 0.0, texts=[(at, "x") for at in times_s])


def test_what_was_under_way_at_the_kill_does_not_count_as_resumed() -> None:
    assert resumption_s(shown_at(1.0, 9.0, 10.01, 10.02, 14.0, 14.1, 15.0), 10.0) == 4.0
    assert resumption_s(shown_at(9.0, 13.0, 13.1), 10.0) == 3.0


def test_no_text_after_the_kill_is_no_measurement() -> None:
    with pytest.raises(NotHappened):
        resumption_s(shown_at(1.0, 9.0), 10.0)
