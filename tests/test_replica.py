"""A replica's turns end to end without Ray: toy engine, memory store, the slow oracle's replies."""

from __future__ import annotations

import asyncio
import random
import string
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from cluster.conversation import (
    BeginTurn,
    Checkpoint,
    Conversation,
    Fence,
    Ownership,
    TurnCommit,
)
from cluster.memory_store import MemoryStore
from cluster.store import Conflict, StoreError, StoreUnavailable
from deployments.config import Limits, Tunables
from deployments.turn_call import TurnAccepted, TurnDone, TurnItem, TurnRefused, TurnTokens
from deployments.turn_runner import TurnRunner
from engine.protocol import EngineDead, RowResult, StepPlan, StepResult
from engine.toy_engine import ToyEngine
from tests.toy_service import (
    SPEC,
    TENANT,
    TEXT,
    Talk,
    make_runner,
    refusal,
    run_turn,
    until,
)

Scenario = Callable[[], Awaitable[None]]


def run(scenario: Scenario) -> None:
    async def bounded() -> None:
        await asyncio.wait_for(scenario(), 60)

    asyncio.run(bounded())


def test_a_conversation_far_past_its_window_prefills_only_its_own_tokens() -> None:
    async def scenario() -> None:
        store = MemoryStore()
        runner = make_runner(store)
        talk = await Talk(store).create()
        for n in range(30):
            before = len(talk.log)
            done = await talk.say(runner, f"question {n}", max_tokens=12)
            assert done.usage.recovery == "none"
            assert done.usage.context_tokens == before
            # All but the last sampled token and the closing ids were still there.
            assert done.usage.prefill_tokens <= done.usage.input_tokens + 3
            assert done.usage.evicted_tokens == max(0, len(talk.log) - SPEC.capacity)
            # What has slid out of the window is not in the cache any more.
            assert min(before, 1) <= done.usage.cached_tokens <= SPEC.capacity
        record = await store.get(TENANT, talk.conversation_id)
        assert (record.turn, record.head, record.history) == (30, talk.head, talk.history)
        assert record.token_count == len(talk.log) > 10 * SPEC.capacity
        assert record.owner == "r1"
        assert set(done.timings) >= {"begin_s", "queue_s", "ttft_s", "commit_s", "turn_s"}
        await runner.close()

    run(scenario)


def test_more_conversations_than_slots_are_restored_exactly() -> None:
    async def scenario() -> None:
        store = MemoryStore()
        runner = make_runner(store)
        talks = [await Talk(store, sink_tokens=n % 3 * 4).create() for n in range(7)]
        recoveries = set()
        for n in range(12):
            dones = await asyncio.gather(*(t.say(runner, f"{n}", max_tokens=15) for t in talks))
            recoveries |= {done.usage.recovery for done in dones}
        assert recoveries == {"none", "exact", "replay"}
        await runner.close()

    run(scenario)


def test_another_replica_goes_on_where_the_first_one_died() -> None:
    async def scenario() -> None:
        store = MemoryStore()
        first, second = make_runner(store, "r1"), make_runner(store, "r2")
        talk = await Talk(store).create()
        for n in range(6):
            await talk.say(first, f"{n}")
        done = await talk.say(second, "still there?")
        assert done.usage.recovery == "replay"
        assert done.usage.cached_tokens == 0
        # The first one's slot is stale now, and its hash says so.
        done = await talk.say(first, "and here?")
        assert done.usage.recovery == "replay"
        await first.close()
        await second.close()

    run(scenario)


def test_items_stream_and_add_up() -> None:
    async def scenario() -> None:
        store = MemoryStore()
        runner = make_runner(store, engine=ToyEngine(SPEC, 4, TEXT, step_delay_s=0.002))
        talk = await Talk(store).create()
        call = talk.call("count", max_tokens=30, ignore_eos=True)
        accepted, *tokens, done = await run_turn(runner, call)
        assert accepted == TurnAccepted(1, "r1", "none")
        assert isinstance(done, TurnDone)
        assert len(tokens) > 3
        seen: list[int] = []
        for item in tokens:
            assert isinstance(item, TurnTokens)
            assert item.k == len(seen)
            seen.extend(item.token_ids)
        assert seen == talk.due(call)
        assert done.usage.output_tokens == 30
        await runner.close()

    run(scenario)


def test_the_end_token_is_neither_streamed_nor_in_the_reply() -> None:
    async def scenario() -> None:
        store = MemoryStore()
        runner = make_runner(store)
        ended = 0
        for seed in range(6):
            talk = await Talk(store).create()
            call = talk.call("hello", sampling=replace(talk.call("").sampling, seed=seed))
            items = await run_turn(runner, call)
            done = items[-1]
            assert isinstance(done, TurnDone)
            talk.accept(call, done)
            shown = [t for i in items if isinstance(i, TurnTokens) for t in i.token_ids]
            assert shown == done.output_ids.tolist()
            if done.finish_reason == "stop":
                ended += 1
                assert done.usage.output_tokens == len(shown) + 1
        assert ended > 0
        await runner.close()

    run(scenario)


def test_stop_strings_cut_the_reply_and_the_next_turns_still_agree() -> None:
    async def scenario() -> None:
        store = MemoryStore()
        runner = make_runner(store)
        talk = await Talk(store).create()
        pairs = tuple(first + second for first in "abcdef" for second in string.ascii_lowercase)
        stopped = 0
        for n in range(20):
            # Of two characters the first one is in the slot already when the second one comes.
            stop = pairs if n % 2 else ("a",)
            call = talk.call(f"{n}", stop=stop)
            done = await talk.say(runner, f"{n}", stop=stop)
            stopped += done.finish_reason == "stop" and len(talk.due_text(call)) > 0
            # A short cut is rewound in the slot: nothing but the new tokens is computed again.
            assert done.usage.recovery == "none"
        assert stopped > 5
        await runner.close()

    run(scenario)


def test_logprobs_come_only_when_asked_for() -> None:
    async def scenario() -> None:
        store = MemoryStore()
        runner = make_runner(store)
        talk = await Talk(store).create()
        sampling = replace(talk.call("").sampling, logprobs=True, top_logprobs=2)
        items = await run_turn(runner, talk.call("x", max_tokens=5, sampling=sampling))
        tokens = [item for item in items if isinstance(item, TurnTokens)]
        for item in tokens:
            assert [pair[0].token_id for pair in item.logprobs] == list(item.token_ids)
            assert all(len(pair[1]) == 2 for pair in item.logprobs)
        await runner.close()

    run(scenario)


async def started(talk: Talk) -> None:
    """Wait until a turn is claimed."""

    async def check() -> bool:
        return (await talk.store.get(TENANT, talk.conversation_id)).running

    await until(check)


async def until_one(runner: TurnRunner, what: str) -> None:
    async def check() -> bool:
        return runner.routing_stats()[what] == 1

    await until(check)


async def until_none(runner: TurnRunner, what: str) -> None:
    async def check() -> bool:
        return runner.routing_stats()[what] == 0

    await until(check)


async def until_free(runner: TurnRunner) -> None:
    """No slot is held by a turn any more."""

    async def check() -> bool:
        stats = runner._parts.loop.stats()
        return stats.free_slots + stats.clean_slots == stats.num_slots

    await until(check)


def resumable(items: Sequence[TurnItem]) -> tuple[str, bool]:
    """Code of the refusal at the end, and whether another replica can go on."""
    last = items[-1]
    assert isinstance(last, TurnRefused), last
    return last.error.code, last.resumable


async def read_until_tokens(runner: TurnRunner, talk: Talk, text: str) -> Any:
    """Start a turn and leave it in mid-stream: an open generator."""
    items = runner.turn(talk.call(text, max_tokens=400, ignore_eos=True))
    async for item in items:
        if isinstance(item, TurnTokens):
            return items
    raise AssertionError("the turn ended")


@pytest.mark.parametrize("turns_before", [0, 1, 12])
def test_a_closed_stream_leaves_no_trace(turns_before: int) -> None:
    async def scenario() -> None:
        store = MemoryStore()
        runner = make_runner(store, engine=ToyEngine(SPEC, 4, TEXT, step_delay_s=0.001))
        talk = await Talk(store).create()
        for n in range(turns_before):
            await talk.say(runner, f"{n}")
        before = await store.get(TENANT, talk.conversation_id)
        await (await read_until_tokens(runner, talk, "never mind")).aclose()
        after = await store.get(TENANT, talk.conversation_id)
        assert (after.turn, after.head, after.running) == (before.turn, before.head, False)
        await talk.say(runner, "now this")
        assert runner.stats().values["cancelled_turns"] == 1
        await runner.close()

    run(scenario)


class SlowBegin(MemoryStore):
    """`begin` takes effect, but its answer is late."""

    async def begin(self, turn: BeginTurn) -> Any:
        ownership = await super().begin(turn)
        await asyncio.sleep(0.05)
        return ownership


@pytest.mark.parametrize("after_s", [0.0, 0.02, 0.06, 0.1])
def test_cancelling_at_any_time_gives_the_claim_back(after_s: float) -> None:
    async def scenario() -> None:
        store = SlowBegin()
        runner = make_runner(store, engine=ToyEngine(SPEC, 4, TEXT, step_delay_s=0.005))
        talk = await Talk(store).create()
        task = asyncio.create_task(run_turn(runner, talk.call("x", max_tokens=300)))
        await asyncio.sleep(after_s)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await talk.idle()
        await talk.say(runner, "again", max_tokens=5)
        await runner.close()

    run(scenario)


class SlowAbort(MemoryStore):
    """`abort` takes a while; its lease never ends by itself."""

    def __init__(self) -> None:
        super().__init__(clock=lambda: 1000.0)
        self.aborting = asyncio.Event()

    async def abort(self, tenant: str, conversation_id: str, fence: Fence) -> None:
        self.aborting.set()
        await asyncio.sleep(0.02)
        await super().abort(tenant, conversation_id, fence)


def test_a_second_cancellation_does_not_stop_the_cleaning_up() -> None:
    async def scenario() -> None:
        store = SlowAbort()
        runner = make_runner(store, engine=ToyEngine(SPEC, 4, TEXT, step_delay_s=0.002))
        talk = await Talk(store).create()
        task = asyncio.create_task(run_turn(runner, talk.call("x", 4000, ignore_eos=True)))
        await started(talk)
        task.cancel()
        await store.aborting.wait()
        task.cancel()
        await asyncio.wait([task])
        await talk.idle()
        await talk.say(runner, "again", max_tokens=5)
        await runner.close()

    run(scenario)


def test_overlapping_turns_are_refused_and_harm_nothing() -> None:
    async def scenario() -> None:
        store = MemoryStore()
        runner = make_runner(store, engine=ToyEngine(SPEC, 4, TEXT, step_delay_s=0.002))
        other = make_runner(store, "r2")
        talk = await Talk(store).create()
        call = talk.call("first", max_tokens=60, ignore_eos=True)
        running = asyncio.create_task(run_turn(runner, call))
        await started(talk)
        assert await refusal(runner, talk.call("second")) == "conversation_busy"
        assert await refusal(other, talk.call("third")) == "conversation_busy"
        done = (await running)[-1]
        assert isinstance(done, TurnDone)
        talk.accept(call, done)
        await talk.say(other, "fourth")
        await runner.close()
        await other.close()

    run(scenario)


def test_stale_foreign_and_missing_conversations_are_refused() -> None:
    async def scenario() -> None:
        store = MemoryStore()
        runner = make_runner(store)
        talk = await Talk(store).create()
        await talk.say(runner, "one")
        assert await refusal(runner, talk.call("x", expect_turn=0)) == "turn_conflict"
        assert await refusal(runner, talk.call("x", expect_head="0" * 64)) == "turn_conflict"
        assert await refusal(runner, talk.call("x", tenant="other")) == "conversation_not_found"
        other_model = await Talk(store).create(fingerprint="another")
        assert await refusal(runner, other_model.call("x")) == "model_changed"
        await talk.say(runner, "two", expect_turn=1, expect_head=talk.head)
        await runner.close()

    run(scenario)


@pytest.mark.parametrize(
    ("fields", "code"),
    [
        ({"input_ids": np.zeros(0, np.int32)}, "invalid_value"),
        ({"input_ids": np.array([-1], np.int32)}, "invalid_value"),
        ({"input_ids": np.array([259], np.int32)}, "invalid_value"),
        ({"input_ids": np.zeros((2, 2), np.int32)}, "invalid_type"),
        ({"input_ids": np.zeros(2, np.int64)}, "invalid_type"),
        ({"input_ids": [1, 2]}, "invalid_type"),
        ({"input_ids": np.zeros(501, np.int32)}, "input_too_long"),
        ({"max_tokens": 0}, "invalid_value"),
        ({"max_tokens": 10**9}, "invalid_value"),
    ],
)
def test_calls_that_would_harm_the_engine_are_refused(fields: dict[str, Any], code: str) -> None:
    async def scenario() -> None:
        store = MemoryStore()
        runner = make_runner(store)
        talk = await Talk(store).create()
        assert await refusal(runner, talk.call("x", **fields)) == code
        await talk.say(runner, "fine")
        await runner.close()

    run(scenario)


class TimeIsCheckpoints(MemoryStore):
    """Its clock moves by most of a lease with every checkpoint, and only then."""

    def __init__(self) -> None:
        self.now_s = 1000.0
        self.renewed: list[int] = []
        super().__init__(clock=lambda: self.now_s)

    async def checkpoint(self, batch: Sequence[Checkpoint]) -> Sequence[StoreError | None]:
        answers = await super().checkpoint(batch)
        self.now_s += 0.9 * batch[0].lease_s
        self.renewed += [len(checkpoint.token_ids) for checkpoint in batch]
        return answers


@pytest.mark.parametrize("durability", ["token", "turn"])
def test_a_long_turn_keeps_its_lease(durability: Any) -> None:
    async def scenario() -> None:
        store = TimeIsCheckpoints()
        tunables = Tunables.model_construct(limits=Limits(), lease_s=0.15, durability=durability)
        engine = ToyEngine(SPEC, 4, TEXT, step_delay_s=0.002)
        runner = make_runner(store, engine=engine, tunables=tunables)
        talk = await Talk(store).create()
        call = talk.call("long", max_tokens=4000, ignore_eos=True)
        running = asyncio.create_task(run_turn(runner, call))
        await started(talk)
        thief = BeginTurn(
            talk.conversation_id, TENANT, "thief", call.input_ids, SPEC.fingerprint, 1.0
        )
        while len(store.renewed) < 4:
            with pytest.raises(Conflict):
                await store.begin(thief)
            await asyncio.sleep(0.01)
        running.cancel()
        await asyncio.wait([running])
        await talk.idle()
        await talk.say(runner, "again", max_tokens=5)
        await runner.close()

    run(scenario)


def test_a_turn_that_waits_for_the_engine_keeps_its_lease() -> None:
    async def scenario() -> None:
        store = TimeIsCheckpoints()
        tunables = Tunables.model_construct(limits=Limits(), lease_s=0.15, durability="turn")
        engine = ToyEngine(SPEC, max_resident=1, text=TEXT, step_delay_s=0.002)
        runner = make_runner(store, engine=engine, tunables=tunables)
        talk, other = await Talk(store).create(), await Talk(store).create()
        stream = await read_until_tokens(runner, other, "holds the slot")
        call = talk.call("waits", max_tokens=5)
        waiting = asyncio.create_task(run_turn(runner, call))
        await until_one(runner, "waiting")
        while len(store.renewed) < 8:
            assert (await store.get(TENANT, talk.conversation_id)).running
            await asyncio.sleep(0.01)
        await stream.aclose()
        done = (await waiting)[-1]
        assert isinstance(done, TurnDone), done
        talk.accept(call, done)
        await runner.close()

    run(scenario)


class StealingStore(MemoryStore):
    """Another owner appears at checkpoint number `at`."""

    def __init__(self, at: int) -> None:
        super().__init__()
        self.at = at

    async def checkpoint(self, batch: Sequence[Checkpoint]) -> Sequence[StoreError | None]:
        self.at -= 1
        if not self.at:
            record = self._records[batch[0].conversation_id]
            assert record.running is not None
            key, input_ids = record.running.key, record.running.input_ids
            thief = BeginTurn(
                batch[0].conversation_id, TENANT, "thief", input_ids, SPEC.fingerprint, 10.0,
                key=key, steal=True,
            )  # fmt: skip
            assert isinstance(await self.begin(thief), Ownership)
        return await super().checkpoint(batch)


@pytest.mark.parametrize("at", [1, 5])
def test_a_fenced_turn_shows_no_more_and_stops_within_a_step(at: int) -> None:
    async def scenario() -> None:
        store = StealingStore(at)
        runner = make_runner(store, engine=ToyEngine(SPEC, 4, TEXT, step_delay_s=0.005))
        talk = await Talk(store).create()
        items = await run_turn(runner, talk.call("x", 400, ignore_eos=True))
        last = items[-1]
        assert isinstance(last, TurnRefused)
        # Whoever calls again finds the new owner; it must not steal from it.
        assert (last.error.code, last.resumable) == ("replica_lost", False)
        shown = [t for item in items if isinstance(item, TurnTokens) for t in item.token_ids]
        record = store._records[talk.conversation_id]
        assert record.running is not None
        assert shown == record.running.output_ids.tolist()
        assert record.running.replica == "thief"
        stats = runner.stats().values
        assert (stats["fenced_turns"], stats["committed_turns"]) == (1, 0)
        steps = stats["engine_steps"]
        await until_none(runner, "running")
        assert runner.stats().values["engine_steps"] <= steps + 1
        await until_free(runner)
        await runner.close()

    run(scenario)


# Leases of these turns are renewed every few seconds only, not with every token.
BY_TURN = Tunables(limits=Limits(max_input_tokens=500), durability="turn")


def test_a_turn_whose_lease_ran_out_makes_way_on_its_own_replica() -> None:
    async def scenario() -> None:
        now_s = 1000.0
        store = MemoryStore(clock=lambda: now_s)
        engine = ToyEngine(SPEC, 4, TEXT, step_delay_s=0.002)
        runner = make_runner(store, engine=engine, tunables=BY_TURN)
        talk = await Talk(store).create()
        await talk.say(runner, "one")
        old = asyncio.create_task(run_turn(runner, talk.call("x", 4000, ignore_eos=True)))
        await started(talk)
        now_s += 100.0
        await talk.say(runner, "two")
        assert "replica_lost" in str((await old)[-1])
        await runner.close()

    run(scenario)


class FlakyStore(MemoryStore):
    """The first `failures` commits get no answer; whether they took effect is for `applied` to say."""

    def __init__(self, failures: int, applied: bool = False) -> None:
        super().__init__()
        self.failures = failures
        self.applied = applied

    async def commit(self, commit: TurnCommit) -> Conversation:
        if self.failures:
            self.failures -= 1
            if self.applied:
                await super().commit(commit)
            raise StoreUnavailable("no answer")
        return await super().commit(commit)


@pytest.mark.parametrize("applied", [False, True])
@pytest.mark.parametrize("failures", [1, 3])
def test_a_turn_is_committed_once_although_the_store_was_away(failures: int, applied: bool) -> None:
    async def scenario() -> None:
        store = FlakyStore(failures, applied)
        runner = make_runner(store)
        talk = await Talk(store).create()
        await talk.say(runner, "x", max_tokens=9)
        record = await store.get(TENANT, talk.conversation_id)
        assert (record.turn, record.head, record.running) == (1, talk.head, False)
        assert (await talk.say(runner, "next")).usage.recovery == "none"
        await runner.close()

    run(scenario)


IMPATIENT = Tunables.model_construct(limits=Limits(), lease_s=0.2)


def test_a_turn_whose_commit_found_no_store_can_be_resumed() -> None:
    async def scenario() -> None:
        store = FlakyStore(failures=10**9)
        runner = make_runner(store, tunables=IMPATIENT)
        talk = await Talk(store).create()
        call = talk.call("x", key="k")
        last = (await run_turn(runner, call))[-1]
        assert isinstance(last, TurnRefused)
        assert (last.error.code, last.resumable) == ("store_unavailable", True)
        assert 10**9 - store.failures > 2
        # Every token is stored: whoever asks again gets them, and the commit.
        store.failures = 0
        done = (await run_turn(runner, replace(call, steal=True)))[-1]
        assert isinstance(done, TurnDone)
        talk.accept(call, done)
        for n in range(5):
            await talk.say(runner, f"{n}")
        await runner.close()

    run(scenario)


def test_a_commit_whose_answer_was_lost_is_found_by_the_next_turn() -> None:
    async def scenario() -> None:
        store = FlakyStore(failures=10**9, applied=True)
        runner = make_runner(store, tunables=IMPATIENT)
        talk = await Talk(store).create()
        call = talk.call("x", max_tokens=9)
        assert await refusal(runner, call) == "store_unavailable"
        record = await store.get(TENANT, talk.conversation_id)
        assert (record.turn, record.running) == (1, False)
        await talk.adopt(call)
        store.failures = 0
        await talk.say(runner, "next")
        await runner.close()

    run(scenario)


class StoreBehindACommit(MemoryStore):
    """Away at the first commit until the lease has been renewed `renewals` times since."""

    def __init__(self, renewals: int) -> None:
        super().__init__()
        self.renewals = renewals
        self.asked = False

    async def checkpoint(self, batch: Sequence[Checkpoint]) -> Sequence[StoreError | None]:
        self.renewals -= self.asked
        return await super().checkpoint(batch)

    async def commit(self, commit: TurnCommit) -> Conversation:
        self.asked = True
        if self.renewals > 0:
            raise StoreUnavailable("no answer")
        return await super().commit(commit)


def test_the_lease_lives_on_while_a_commit_is_sent_again() -> None:
    async def scenario() -> None:
        store = StoreBehindACommit(renewals=1)
        runner = make_runner(store, tunables=Tunables(lease_s=1.0))
        talk = await Talk(store).create()
        await talk.say(runner, "x", max_tokens=9)
        await runner.close()

    run(scenario)


class FailingStore(MemoryStore):
    """Checkpoints fail in a way that nobody has foreseen."""

    attempts = 0

    async def checkpoint(self, batch: Sequence[Checkpoint]) -> Sequence[StoreError | None]:
        self.attempts += 1
        raise (ValueError("surprise") if self.attempts % 2 else StoreError("the store failed: ERR"))


@pytest.mark.parametrize("durability", ["token", "turn"])
def test_a_checkpoint_that_fails_wedges_nothing(durability: Any) -> None:
    async def scenario() -> None:
        store = FailingStore()
        engine = ToyEngine(SPEC, 4, TEXT, step_delay_s=0.005)
        tunables = Tunables.model_construct(
            limits=Limits(), lease_s=0.1, durability=durability, store_hold_s=0.1
        )
        runner = make_runner(store, engine=engine, tunables=tunables)
        talk = await Talk(store).create()
        call = talk.call("x", 60, ignore_eos=True, key="k")
        last = (await run_turn(runner, call))[-1]
        assert store.attempts > 0
        if durability == "turn":
            # Nothing but the lease hangs on it.
            assert isinstance(last, TurnDone)
        else:
            assert isinstance(last, TurnRefused)
            assert last.error.code == "store_unavailable"
        await runner.close()

    run(scenario)


def test_a_stream_that_nobody_reads_makes_way_once_its_lease_is_over() -> None:
    async def scenario() -> None:
        now_s = 1000.0
        store = MemoryStore(clock=lambda: now_s)
        engine = ToyEngine(SPEC, 4, TEXT, step_delay_s=0.002)
        runner = make_runner(store, engine=engine, tunables=BY_TURN)
        talk = await Talk(store).create()
        await talk.say(runner, "one")
        unread = await read_until_tokens(runner, talk, "x")
        now_s += 100.0
        await talk.say(runner, "two")
        assert "replica_lost" in str([item async for item in unread][-1])
        await talk.say(runner, "three")
        await runner.close()

    run(scenario)


def test_a_reader_that_stalls_holds_up_neither_its_turn_nor_others() -> None:
    async def scenario() -> None:
        store = MemoryStore()
        runner = make_runner(store)
        talk, other = await Talk(store).create(), await Talk(store).create()
        call = talk.call("x", max_tokens=30, ignore_eos=True)
        unread = runner.turn(call)
        assert isinstance(await anext(unread), TurnAccepted)
        await other.say(runner, "y")
        await talk.idle()
        *tokens, done = [item async for item in unread]
        assert isinstance(done, TurnDone)
        seen = [t for item in tokens if isinstance(item, TurnTokens) for t in item.token_ids]
        assert seen == talk.due(call)
        talk.accept(call, done)
        await runner.close()

    run(scenario)


def test_turns_that_take_over_from_one_another_on_one_replica_end_one_by_one() -> None:
    async def scenario() -> None:
        now_s = 1000.0
        store = SlowAbort()
        store._clock = lambda: now_s
        engine = ToyEngine(SPEC, 4, TEXT, step_delay_s=0.002)
        runner = make_runner(store, engine=engine, tunables=BY_TURN)
        talk = await Talk(store).create()
        turns = []
        for n in range(3):
            call = talk.call(f"{n}", 400, ignore_eos=True)
            turns.append(asyncio.create_task(run_turn(runner, call)))
            # The next one begins while the one before is being cleared away.
            await asyncio.sleep(0.01)
            now_s += 100.0
        last = [(await turn)[-1] for turn in turns]
        assert [isinstance(item, TurnDone) for item in last] == [False, False, True], last
        runner._parts.loop.check_integrity()
        await runner.close()

    run(scenario)


class BreakingEngine(ToyEngine):
    """Fails as told, once."""

    trouble: Exception | str | None = None

    def step(self, plan: StepPlan) -> StepResult:
        trouble, self.trouble = self.trouble, None
        if isinstance(trouble, Exception):
            raise trouble
        if trouble is not None:
            return StepResult(tuple(RowResult(failed=trouble) for _ in plan.rows))
        return super().step(plan)


def test_a_failed_turn_leaves_the_replica_well() -> None:
    async def scenario() -> None:
        store, engine = MemoryStore(), BreakingEngine(SPEC, 4, TEXT)
        runner = make_runner(store, engine=engine)
        talk = await Talk(store).create()
        await talk.say(runner, "one")
        engine.trouble = "NaN logits"
        assert await refusal(runner, talk.call("x")) == "turn_failed"
        runner.check_health(60.0)
        await talk.say(runner, "two")
        await runner.close()

    run(scenario)


def test_a_dead_engine_is_unhealthy_and_its_conversations_live_on() -> None:
    async def scenario() -> None:
        store, engine = MemoryStore(), BreakingEngine(SPEC, 4, TEXT)
        runner, heir = make_runner(store, engine=engine), make_runner(store, "r2")
        talk = await Talk(store).create()
        await talk.say(runner, "one")
        engine.trouble = EngineDead("out of memory")
        call = talk.call("x", key="k")
        assert resumable(await run_turn(runner, call)) == ("replica_lost", True)
        # It is not asked to run anything again, and the router is told.
        assert resumable(await run_turn(runner, call)) == ("replica_lost", False)
        assert runner.routing_stats()["draining"]
        with pytest.raises(RuntimeError, match="out of memory"):
            runner.check_health(60.0)
        done = (await run_turn(heir, replace(call, steal=True)))[-1]
        assert isinstance(done, TurnDone), done
        talk.accept(call, done)
        assert heir.stats().values["resumed_turns"] == 1
        await talk.say(heir, "two")
        await runner.close()
        await heir.close()

    run(scenario)


def test_a_step_that_hangs_is_unhealthy() -> None:
    async def scenario() -> None:
        store = MemoryStore()
        runner = make_runner(store, engine=ToyEngine(SPEC, 4, TEXT, step_delay_s=0.3))
        talk = await Talk(store).create()
        running = asyncio.create_task(run_turn(runner, talk.call("x", max_tokens=1)))
        await asyncio.sleep(0.1)
        runner.check_health(60.0)
        with pytest.raises(RuntimeError, match="step has been running"):
            runner.check_health(0.01)
        # Who waits for it is sent elsewhere, long before Serve has killed the replica.
        assert resumable(await running) == ("replica_lost", True)
        await runner.close()

    run(scenario)


def test_a_late_turn_times_out_and_leaves_no_trace() -> None:
    async def scenario() -> None:
        store = MemoryStore()
        runner = make_runner(store, engine=ToyEngine(SPEC, 4, TEXT, step_delay_s=0.01))
        talk = await Talk(store).create()
        late = talk.call("x", max_tokens=2000, ignore_eos=True, timeout_s=0.1)
        assert await refusal(runner, late) == "timeout"
        assert not (await store.get(TENANT, talk.conversation_id)).running
        await talk.say(runner, "again", max_tokens=5)
        await runner.close()

    run(scenario)


def test_a_full_queue_is_overloaded_and_recovers() -> None:
    async def scenario() -> None:
        store = MemoryStore()
        engine = ToyEngine(SPEC, max_resident=1, text=TEXT, step_delay_s=0.002)
        runner = make_runner(store, engine=engine, max_waiting=1)
        talks = [await Talk(store).create() for _ in range(3)]
        stream = await read_until_tokens(runner, talks[0], "holds the slot")
        waiting = asyncio.create_task(talks[1].say(runner, "waits"))
        await until_one(runner, "waiting")
        assert await refusal(runner, talks[2].call("x")) == "overloaded"
        await stream.aclose()
        await waiting
        await talks[2].say(runner, "now")
        assert runner.routing_stats() == {
            "free_slots": 0,
            "clean_slots": 1,
            "running": 0,
            "waiting": 0,
            "draining": False,
        }
        await runner.close()

    run(scenario)


def test_closing_drains_running_turns_and_refuses_new_ones() -> None:
    async def scenario() -> None:
        store = MemoryStore()
        runner = make_runner(store, engine=ToyEngine(SPEC, 4, TEXT, step_delay_s=0.002))
        talk, late = await Talk(store).create(), await Talk(store).create()
        call = talk.call("x", max_tokens=50, ignore_eos=True)
        running = asyncio.create_task(run_turn(runner, call))
        await until_one(runner, "running")
        closing = asyncio.create_task(runner.close(drain_s=30.0))
        await asyncio.sleep(0)
        assert await refusal(runner, late.call("x")) == "replica_lost"
        done = (await running)[-1]
        assert isinstance(done, TurnDone)
        talk.accept(call, done)
        await closing

    run(scenario)


def test_closing_without_time_hands_running_turns_over() -> None:
    async def scenario() -> None:
        store = MemoryStore()
        runner = make_runner(store, engine=ToyEngine(SPEC, 4, TEXT, step_delay_s=0.002))
        talk = await Talk(store).create()
        call = talk.call("x", 300, ignore_eos=True, key="k")
        running = asyncio.create_task(run_turn(runner, call))
        await until_one(runner, "running")
        await asyncio.sleep(0.05)
        await runner.close(drain_s=0.0)
        items = await running
        assert resumable(items) == ("replica_lost", True)
        assert runner.stats().values["handed_over_turns"] == 1
        shown = tuple(t for i in items if isinstance(i, TurnTokens) for t in i.token_ids)
        assert 0 < len(shown) < 300
        heir = make_runner(store, "r2")
        done = (await run_turn(heir, replace(call, steal=True, shown_ids=shown)))[-1]
        assert isinstance(done, TurnDone), done
        talk.accept(call, done)
        # Not begun anew: what was stored and not shown yet is part of it.
        assert heir.stats().values["resumed_turns"] == 1
        await heir.close()

    run(scenario)


def test_closing_does_not_wait_for_a_stream_that_nobody_reads() -> None:
    async def scenario() -> None:
        store = MemoryStore()
        runner = make_runner(store, engine=ToyEngine(SPEC, 4, TEXT, step_delay_s=0.002))
        talk = await Talk(store).create()
        stream = await read_until_tokens(runner, talk, "x")
        await runner.close()
        assert isinstance([item async for item in stream][-1], TurnRefused)

    run(scenario)


@pytest.mark.parametrize("seed", range(4))
def test_random_turns_cancels_evictions_and_moves_always_agree_with_the_oracle(seed: int) -> None:
    async def converse(talk: Talk, runners: list[TurnRunner], dice: random.Random) -> None:
        for _ in range(25):
            runner = dice.choice(runners) if dice.random() < 0.2 else runners[0]
            stop = dice.choice([(), (), ("b",), ("the", "q ")])
            text = "?" * dice.randrange(1, 70)
            if dice.random() < 0.3:
                call = talk.call(text, 200, stop)
                task = asyncio.create_task(run_turn(runner, call))
                await asyncio.sleep(dice.random() * 0.01)
                task.cancel()
                await asyncio.wait([task])
                await talk.idle()
                # Cancelled too late, the turn was committed all the same.
                await talk.adopt(call)
                continue
            await talk.say(runner, text, max_tokens=dice.randrange(1, 30), stop=stop)

    async def scenario() -> None:
        dice = random.Random(seed)
        store = MemoryStore()
        runners = [make_runner(store, name) for name in ("r1", "r2")]
        talks = [await Talk(store, sink_tokens=dice.randrange(0, 20)).create() for _ in range(6)]
        await asyncio.gather(
            *(converse(talk, runners, random.Random(f"{seed} {n}")) for n, talk in enumerate(talks))
        )
        for runner in runners:
            await runner.close()
            runner._parts.loop.check_integrity()

    run(scenario)
