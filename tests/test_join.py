"""Several readers of one turn, readers that leave, and calls that are made again."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import aclosing
from dataclasses import replace
from typing import Any

import pytest

from cluster.memory_store import MemoryStore
from deployments.turn_call import (
    FollowCall,
    TurnAccepted,
    TurnCall,
    TurnDone,
    TurnItem,
    TurnRefused,
    TurnTokens,
)
from deployments.turn_runner import TurnRunner
from engine.toy_engine import ToyEngine
from tests.mortal import MortalReplica, tokens_of
from tests.toy_service import SPEC, TENANT, TEXT, Talk, make_runner, refusal, run_turn, until

BODY = "b" * 64


def run(scenario: Callable[[], Awaitable[None]]) -> None:
    async def bounded() -> None:
        await asyncio.wait_for(scenario(), 60)

    asyncio.run(bounded())


def slow_runner(store: MemoryStore, name: str = "r1") -> TurnRunner:
    return make_runner(store, name, ToyEngine(SPEC, 4, TEXT, step_delay_s=0.003))


def keyed(talk: Talk, max_tokens: int = 60, **more: Any) -> TurnCall:
    return talk.call("x", max_tokens, ignore_eos=True, key="k", request_hash=BODY, **more)


class Reader:
    """One call's client, that can leave."""

    def __init__(self, runner: TurnRunner, call: TurnCall | FollowCall) -> None:
        self.items: list[TurnItem] = []
        self._call = call
        self._task = asyncio.create_task(self._read(runner))

    async def _read(self, runner: TurnRunner) -> None:
        call = self._call
        items = runner.turn(call) if isinstance(call, TurnCall) else runner.follow(call)
        async with aclosing(items):
            async for item in items:
                self.items.append(item)

    @property
    def shown(self) -> tuple[int, ...]:
        first = next((item.k for item in self.items if isinstance(item, TurnTokens)), 0)
        return tokens_of(self.items, first)

    async def has(self, count: int) -> None:
        async def enough() -> bool:
            return len(self.shown) >= count

        await until(enough)

    async def leave(self) -> None:
        self._task.cancel()
        await asyncio.wait([self._task])

    async def done(self) -> TurnDone:
        await self._task
        assert isinstance(self.items[-1], TurnDone), self.items[-1]
        return self.items[-1]


async def running(store: MemoryStore, talk: Talk) -> bool:
    return (await store.get(TENANT, talk.conversation_id)).running


def test_a_second_call_joins_from_the_start_and_a_third_from_where_it_stood() -> None:
    async def scenario() -> None:
        store = MemoryStore()
        runner = slow_runner(store)
        talk = await Talk(store).create()
        call = keyed(talk, completion_id="chatcmpl-1", created_s=7)
        first = Reader(runner, call)
        await first.has(10)
        second = Reader(runner, replace(call, completion_id="chatcmpl-2", created_s=8))
        third = Reader(runner, replace(call, shown_ids=first.shown[:8]))
        follower = Reader(runner, FollowCall(TENANT, talk.conversation_id, "r1"))
        readers = (first, second, third, follower)
        done = [await reader.done() for reader in readers]
        due = tuple(talk.due(call))
        assert first.shown == second.shown == follower.shown == due
        assert third.shown == due[8:]
        assert all(one is done[0] for one in done)
        # All are told the name of the call that started the turn.
        assert {reader.items[0] for reader in readers} == {
            TurnAccepted(1, "r1", "none", "chatcmpl-1", 7)
        }
        assert runner.stats().values["joined_turns"] == 2
        assert runner.stats().values["committed_turns"] == 1
        assert (await store.get(TENANT, talk.conversation_id)).turn == 1
        await runner.close()

    run(scenario)


def test_calls_of_one_key_at_once_are_one_turn() -> None:
    async def scenario() -> None:
        store = MemoryStore()
        runner = slow_runner(store)
        talk = await Talk(store).create()
        call = keyed(talk, 20)
        dones = await asyncio.gather(*(Reader(runner, call).done() for _ in range(10)))
        assert len({done.head for done in dones}) == 1
        talk.accept(call, dones[0])
        assert runner.stats().values["generated_tokens"] == 20
        await runner.close()

    run(scenario)


def test_only_the_last_reader_that_leaves_cancels() -> None:
    async def scenario() -> None:
        store = MemoryStore()
        runner = slow_runner(store)
        talk = await Talk(store).create()
        call = keyed(talk, 400)
        first = Reader(runner, call)
        await first.has(5)
        second = Reader(runner, call)
        await second.has(5)
        await first.leave()
        count = len(second.shown)
        await second.has(count + 20)
        assert await running(store, talk)
        await second.leave()
        assert not await running(store, talk)
        assert runner.stats().values["cancelled_turns"] == 1
        # The key is free: the same call begins anew.
        call = keyed(talk, 20)
        talk.accept(call, await Reader(runner, call).done())
        await runner.close()

    run(scenario)


def test_a_call_that_comes_while_its_turn_is_being_undone_begins_anew() -> None:
    async def scenario() -> None:
        store = SlowAbort()
        runner = slow_runner(store)
        talk = await Talk(store).create()
        call = keyed(talk, 30)
        first = Reader(runner, call)
        await first.has(5)
        leaving = asyncio.create_task(first.leave())
        await store.aborting.wait()
        talk.accept(call, await Reader(runner, call).done())
        await leaving
        await runner.close()

    run(scenario)


class SlowAbort(MemoryStore):
    def __init__(self) -> None:
        super().__init__()
        self.aborting = asyncio.Event()

    async def abort(self, *args: object) -> None:
        self.aborting.set()
        await asyncio.sleep(0.05)
        await super().abort(*args)  # type: ignore[arg-type]


@pytest.mark.parametrize("joiner_finishes", [False, True])
def test_a_turn_that_is_to_be_finished_is_whoever_leaves(joiner_finishes: bool) -> None:
    async def scenario() -> None:
        store = MemoryStore()
        runner = slow_runner(store)
        talk = await Talk(store).create()
        call = keyed(talk, 40)
        finishing = replace(call, on_disconnect="finish")
        if joiner_finishes:
            first = Reader(runner, call)
            await first.has(3)
            second = Reader(runner, finishing)
            await second.has(3)
            await second.leave()
        else:
            first = Reader(runner, finishing)
            await first.has(3)
        await first.leave()
        assert await running(store, talk)
        await talk.idle()
        assert (await store.get(TENANT, talk.conversation_id)).turn == 1
        # Whoever asks again, at any replica, gets the committed reply.
        other = make_runner(store, "r2")
        for asked in (runner, other):
            items = await run_turn(asked, call)
            done = items[-1]
            assert isinstance(done, TurnDone)
            assert done.output_ids.tolist() == talk.due(call)
            assert done.usage.output_tokens == 40
            assert done.finish_reason == "length"
            assert isinstance(items[0], TurnAccepted)
            last = done
        talk.accept(call, last)
        await talk.say(runner, "next")
        await runner.close()
        await other.close()

    run(scenario)


def test_one_key_names_one_request() -> None:
    async def scenario() -> None:
        store = MemoryStore()
        runner, other = slow_runner(store), make_runner(store, "r2")
        talk = await Talk(store).create()
        call = keyed(talk)
        another = replace(call, request_hash="c" * 64)
        reader = Reader(runner, call)
        await reader.has(3)
        assert await refusal(runner, another) == "idempotency_key_reused"
        assert await refusal(other, another) == "idempotency_key_reused"
        talk.accept(call, await reader.done())
        assert await refusal(runner, another) == "idempotency_key_reused"
        await runner.close()
        await other.close()

    run(scenario)


def test_a_call_at_another_replica_reads_the_running_turn_from_the_store() -> None:
    async def scenario() -> None:
        store = MemoryStore()
        runner, other = slow_runner(store), make_runner(store, "r2")
        talk = await Talk(store).create()
        call = keyed(talk, 150)
        first = Reader(runner, call)
        await first.has(10)
        second = Reader(other, call)
        await second.has(20)
        assert await running(store, talk)
        done = await first.done()
        elsewhere = await second.done()
        assert elsewhere.output_ids.tolist() == done.output_ids.tolist() == talk.due(call)
        assert (elsewhere.head, elsewhere.usage) == (done.head, done.usage)
        due = tuple(talk.due(call))
        assert second.shown == due[: len(second.shown)]
        assert other.stats().values["engine_steps"] == 0
        await runner.close()
        await other.close()

    run(scenario)


@pytest.mark.parametrize("owner_is_seen_dead", [False, True])
def test_who_follows_a_turn_goes_on_with_it_when_its_owner_dies(owner_is_seen_dead: bool) -> None:
    async def scenario() -> None:
        now_s = 1000.0
        store = MemoryStore(clock=lambda: now_s)
        engine = ToyEngine(SPEC, 4, TEXT, step_delay_s=0.003)
        doomed, other = MortalReplica(store, engine=engine), make_runner(store, "r2")
        talk = await Talk(store).create()
        call = keyed(talk, 200)
        doomed.start(call)
        follower = Reader(other, call)
        await follower.has(20)
        await doomed.kill()
        if owner_is_seen_dead:
            joiner = Reader(other, replace(call, steal=True, shown_ids=doomed.shown))
            done = await joiner.done()
            assert doomed.shown + joiner.shown == tuple(talk.due(call))
        else:
            now_s += 60.0
        done = await follower.done()
        assert follower.shown == tuple(talk.due(call))
        talk.accept(call, done)
        assert other.stats().values["resumed_turns"] == 1
        await other.close()

    run(scenario)


def test_a_follower_that_leaves_cancels_nothing_here_or_there() -> None:
    async def scenario() -> None:
        store = MemoryStore()
        runner, other = slow_runner(store), make_runner(store, "r2")
        talk = await Talk(store).create()
        call = keyed(talk, 100)
        first = Reader(runner, call)
        await first.has(3)
        elsewhere = Reader(other, call)
        here = Reader(runner, FollowCall(TENANT, talk.conversation_id, "r1"))
        await elsewhere.has(3)
        await here.has(3)
        await elsewhere.leave()
        await here.leave()
        talk.accept(call, await first.done())
        await runner.close()
        await other.close()

    run(scenario)


def test_there_is_nothing_to_follow_where_no_turn_runs() -> None:
    async def scenario() -> None:
        store = MemoryStore()
        runner = slow_runner(store)
        talk = await Talk(store).create()
        reader = Reader(runner, keyed(talk, 100))
        await reader.has(3)
        for tenant, name in ((TENANT, "conv_" + "0" * 32), ("other", talk.conversation_id)):
            items = [item async for item in runner.follow(FollowCall(tenant, name, "r1"))]
            assert [type(item) for item in items] == [TurnRefused]
        await reader.leave()
        await runner.close()

    run(scenario)
