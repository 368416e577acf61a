"""A replica's turns while the store is away, slow, restarted or older than it was; on both stores."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing
from dataclasses import replace
from typing import Any

import pytest

from cluster.conversation import Checkpoint, Conversation, TurnCommit
from cluster.memory_store import MemoryStore
from cluster.store import StoreError, StoreLimits, StoreUnavailable
from deployments.config import Limits, Tunables
from deployments.turn_call import TurnCall, TurnDone, TurnItem, TurnRefused, TurnTokens
from deployments.turn_runner import TurnRunner
from engine.toy_engine import ToyEngine
from tests.mortal import tokens_of
from tests.store_envs import HandClock, MemoryEnv, RedisEnv
from tests.toy_service import SPEC, TENANT, TEXT, Talk, make_runner, run_turn, until
from tests.valkey_fixture import ValkeyServer

LIMITS = StoreLimits(recovery_s=0.7)
TUNABLES = Tunables(limits=Limits(max_input_tokens=500))


@pytest.fixture(params=["memory", "valkey"])
async def env(request: pytest.FixtureRequest) -> AsyncIterator[MemoryEnv | RedisEnv]:
    if request.param == "memory":
        yield MemoryEnv(MemoryStore(LIMITS), HandClock())
        return
    server: ValkeyServer = request.getfixturevalue("valkey_server")
    request.getfixturevalue("redis_url")
    env = await RedisEnv.make(server, LIMITS)
    yield env
    await env.close()


def slow_runner(store: Any, name: str = "r1", tunables: Tunables = TUNABLES) -> TurnRunner:
    engine = ToyEngine(SPEC, 4, TEXT, step_delay_s=0.004)
    return make_runner(store, name, engine, tunables)


class Reading:
    """A client of one turn."""

    def __init__(self, runner: TurnRunner, call: TurnCall) -> None:
        self.items: list[TurnItem] = []
        self._task = asyncio.create_task(self._read(runner, call))

    async def _read(self, runner: TurnRunner, call: TurnCall) -> None:
        async with aclosing(runner.turn(call)) as items:
            async for item in items:
                self.items.append(item)

    @property
    def shown(self) -> tuple[int, ...]:
        return tokens_of(self.items)

    async def has(self, count: int) -> None:
        async def enough() -> bool:
            return len(self.shown) >= count or self._task.done()

        await until(enough)

    async def last(self) -> TurnItem:
        await asyncio.wait_for(self._task, 30)
        return self.items[-1]


async def test_a_restart_that_lost_nothing_is_not_noticed_by_clients(env: Any) -> None:
    runner = slow_runner(env.store)
    talk = await Talk(env.store).create()
    await talk.say(runner, "one")
    call = talk.call("x", 200, ignore_eos=True)
    reading = Reading(runner, call)
    await reading.has(30)
    await env.restart()
    done = await reading.last()
    assert isinstance(done, TurnDone), done
    assert reading.shown == tuple(talk.due(call))
    talk.accept(call, done)
    await runner.close()


@pytest.mark.parametrize("saved", ["before the conversation", "before the turn", "in mid-turn"])
async def test_a_running_turn_survives_a_store_that_lost_its_latest_writes(
    env: Any, saved: str
) -> None:
    runner, other = slow_runner(env.store), make_runner(env.store, "r2")
    old = await env.save()
    talk = await Talk(env.store).create()
    await talk.say(runner, "one")
    if saved == "before the turn":
        old = await env.save()
    call = talk.call("x", 300, ignore_eos=True, key="k")
    reading = Reading(runner, call)
    await reading.has(30)
    if saved == "in mid-turn":
        old = await env.save()
        await reading.has(60)
    await env.roll_back(old)
    # Nobody else gets hold of it meanwhile, and then it is the same turn.
    elsewhere = Reading(other, call)
    done = await reading.last()
    assert isinstance(done, TurnDone), done
    assert reading.shown == tuple(talk.due(call))
    same = await elsewhere.last()
    assert isinstance(same, TurnDone), same
    assert same.output_ids.tolist() == done.output_ids.tolist()
    talk.accept(call, done)
    assert (await talk.say(other, "next")).usage.recovery != "none"
    position, messages = await env.store.transcript(TENANT, talk.conversation_id)
    assert [m.content for m in messages if m.role == "user"] == ["one", "x", "next"]
    assert position == 0
    assert runner.stats().values["repaired_conversations"] >= 1
    await runner.close()
    await other.close()


@pytest.mark.parametrize("saved_after", [None, 0, 1])
async def test_committed_turns_that_the_store_lost_are_put_back(
    env: Any, saved_after: int | None
) -> None:
    runner, other = slow_runner(env.store), make_runner(env.store, "r2")
    old = await env.save()
    talk = await Talk(env.store).create()
    for n in range(3):
        if n == saved_after:
            old = await env.save()
        call = talk.call(f"{n}", key=f"key {n}")
        last = (await run_turn(runner, call))[-1]
        assert isinstance(last, TurnDone)
        done = last
        talk.accept(call, done)
    # The watch must have seen this life before the next one begins.
    await asyncio.sleep(0.6)
    await env.roll_back(old)

    async def is_back() -> bool:
        try:
            record = await env.store.get(TENANT, talk.conversation_id)
        except StoreError:
            return False
        return bool(record.turn == 3)

    await asyncio.wait_for(until(is_back), 10)
    assert runner.stats().values["store_restarts"] == 1
    again = (await run_turn(other, call))[-1]
    assert isinstance(again, TurnDone), again
    assert (again.head, again.output_ids.tolist()) == (done.head, done.output_ids.tolist())
    for n in range(3, 5):
        await talk.say(other, f"{n}")
    _, messages = await env.store.transcript(TENANT, talk.conversation_id)
    assert [m.content for m in messages if m.role == "user"] == list("01234")
    await runner.close()
    await other.close()


async def test_what_another_replica_has_gone_on_with_is_not_put_back(env: Any) -> None:
    runner, other = slow_runner(env.store), make_runner(env.store, "r2")
    talk = await Talk(env.store).create()
    await talk.say(runner, "one")
    await talk.say(other, "two")
    await asyncio.sleep(0.6)
    await env.restart()

    async def noticed() -> bool:
        return runner.stats().values["store_restarts"] == 1

    await asyncio.wait_for(until(noticed), 10)
    await talk.say(runner, "three")
    await runner.close()
    await other.close()


class Pulseless(MemoryStore):
    """Restarts without a sign: only the answers to writes tell. Forgets all before commit number `at`."""

    def __init__(self, at: int = 0) -> None:
        super().__init__(StoreLimits(recovery_s=0.0))
        self.env = MemoryEnv(self, HandClock())
        self.commits_left = at

    async def pulse(self) -> str:
        return "always the same"

    async def commit(self, commit: TurnCommit) -> Conversation:
        self.commits_left -= 1
        if not self.commits_left:
            await self.env.roll_back(({}, {}, {}))
        return await super().commit(commit)


async def test_a_checkpoint_that_finds_an_older_store_repairs_it() -> None:
    store = Pulseless()
    runner = slow_runner(store)
    talk = await Talk(store).create()
    await talk.say(runner, "one")
    old = await store.env.save()
    call = talk.call("x", 150, ignore_eos=True)
    reading = Reading(runner, call)
    await reading.has(30)
    await store.env.roll_back(old)
    done = await reading.last()
    assert isinstance(done, TurnDone), done
    assert reading.shown == tuple(talk.due(call))
    talk.accept(call, done)
    await runner.close()


async def test_a_commit_that_finds_an_empty_store_repairs_it() -> None:
    store = Pulseless(at=2)
    runner = slow_runner(store)
    talk = await Talk(store).create()
    await talk.say(runner, "one")
    await talk.say(runner, "two", max_tokens=5)
    record = await store.get(TENANT, talk.conversation_id)
    assert (record.turn, record.head, record.num_messages) == (2, talk.head, 4)
    await talk.say(runner, "three")
    await runner.close()


class LateAnswers(MemoryStore):
    """Checkpoints take effect at once; while `late`, their answers come after a second and a half."""

    late = False

    def __init__(self) -> None:
        super().__init__(LIMITS)
        self.ks: list[int] = []

    async def checkpoint(self, batch: Sequence[Checkpoint]) -> Sequence[StoreError | None]:
        self.ks += [one.k for one in batch]
        answers = await super().checkpoint(batch)
        if self.late:
            await asyncio.sleep(1.5)
        return answers


async def test_a_repair_that_meets_a_later_checkpoint_of_the_same_turn_is_no_loss() -> None:
    store = LateAnswers()
    runner = slow_runner(store)
    talk = await Talk(store).create()
    call = talk.call("x", 200, ignore_eos=True)
    reading = Reading(runner, call)
    await reading.has(20)
    store.late = True
    await asyncio.sleep(0.2)
    # Noticed, and repaired with what was acknowledged, while a checkpoint's answer is on its way.
    store.restart()
    await asyncio.sleep(1.0)
    store.late = False
    done = await reading.last()
    assert isinstance(done, TurnDone), done
    assert runner.stats().values["store_restarts"] == 1
    talk.accept(call, done)
    await runner.close()


async def test_a_resumed_turn_stores_only_what_is_new() -> None:
    store = LateAnswers()
    runner, heir = slow_runner(store), make_runner(store, "r2")
    talk = await Talk(store).create()
    call = talk.call("x", 60, ignore_eos=True, key="k")
    reading = Reading(runner, call)
    await reading.has(20)
    runner.hand_over()
    await reading.last()
    running = store._records[talk.conversation_id].running
    assert running is not None
    stored = len(running.output_ids)
    store.ks.clear()
    done = (await run_turn(heir, replace(call, steal=True, shown_ids=reading.shown)))[-1]
    assert isinstance(done, TurnDone), done
    assert min(store.ks) == stored
    talk.accept(call, done)
    await runner.close()
    await heir.close()


class Away(MemoryStore):
    """Checkpoints find no store while `away`; `lag_s` is how long each takes else."""

    away = False
    lag_s = 0.0
    batches: int = 0

    async def checkpoint(self, batch: Sequence[Checkpoint]) -> Sequence[StoreError | None]:
        if self.away:
            raise StoreUnavailable("nobody answers")
        if self.lag_s:
            await asyncio.sleep(self.lag_s)
        self.batches += 1
        return await super().checkpoint(batch)

    def stored(self, talk: Talk) -> int:
        running = self._records[talk.conversation_id].running
        return 0 if running is None else len(running.output_ids)


async def test_output_is_held_while_the_store_is_away_and_then_goes_on() -> None:
    store = Away()
    runner = slow_runner(store)
    talk = await Talk(store).create()
    call = talk.call("x", 200, ignore_eos=True)
    reading = Reading(runner, call)
    await reading.has(20)
    store.away = True
    await asyncio.sleep(0.3)
    count = len(reading.shown)
    assert count == store.stored(talk)
    await asyncio.sleep(0.2)
    assert len(reading.shown) == count
    store.away = False
    done = await reading.last()
    assert isinstance(done, TurnDone), done
    assert reading.shown == tuple(talk.due(call))
    assert 0.3 < runner.stats().values["held_s"] < 2
    talk.accept(call, done)
    await runner.close()


@pytest.mark.parametrize("hangs", [False, True])
async def test_a_store_that_stays_away_ends_the_turn_and_it_can_be_resumed(hangs: bool) -> None:
    store = Away()
    runner = slow_runner(store, tunables=TUNABLES.model_copy(update={"store_hold_s": 0.3}))
    talk = await Talk(store).create()
    call = talk.call("x", 200, ignore_eos=True, key="k")
    reading = Reading(runner, call)
    await reading.has(20)
    store.away, store.lag_s = not hangs, 1000.0
    last = await reading.last()
    assert isinstance(last, TurnRefused)
    assert (last.error.code, last.resumable) == ("store_unavailable", True)
    # What was shown is stored, and the slot is free again.
    assert len(reading.shown) == store.stored(talk)
    store.away, store.lag_s = False, 0.0

    async def free() -> bool:
        return runner.routing_stats()["free_slots"] == 4

    await until(free)
    resumed = replace(call, steal=True, shown_ids=reading.shown)
    items = await run_turn(runner, resumed)
    done = items[-1]
    assert isinstance(done, TurnDone)
    assert reading.shown + tokens_of(items, len(reading.shown)) == tuple(talk.due(call))
    talk.accept(call, done)
    await runner.close()


async def test_nothing_is_shown_before_it_is_stored_and_a_slow_store_stalls_no_engine() -> None:
    store = Away()
    store.lag_s = 0.03
    runner = slow_runner(store)
    talks = [await Talk(store).create() for _ in range(3)]
    calls = [talk.call("x", 120, ignore_eos=True) for talk in talks]

    async def read(talk: Talk, call: TurnCall) -> TurnDone:
        async with aclosing(runner.turn(call)) as items:
            async for item in items:
                if isinstance(item, TurnTokens) and talk.turn == 0:
                    running = store._records[talk.conversation_id].running
                    if running is not None:
                        assert len(running.output_ids) >= item.k + len(item.token_ids)
        assert isinstance(item, TurnDone), item
        return item

    dones = await asyncio.gather(
        *(read(talk, call) for talk, call in zip(talks, calls, strict=True))
    )
    for talk, call, done in zip(talks, calls, dones, strict=True):
        talk.accept(call, done)
    # One round trip for what all turns have sampled during the one before.
    assert store.batches < 120
    assert runner.stats().values["checkpointed_tokens"] == 360
    assert runner.stats().values["checkpoints"] == store.batches
    await runner.close()
