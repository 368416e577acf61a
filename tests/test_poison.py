"""Turns that kill their engine, and replicas that come back after they were given up."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest

from cluster.conversation import BeginTurn, Begun, Checkpoint
from cluster.memory_store import MemoryStore
from cluster.store import StoreError, StoreLimits, StoreUnavailable
from deployments.config import Tunables
from deployments.turn_call import TurnCall, TurnDone, TurnItem, TurnRefused, TurnTokens
from deployments.turn_runner import TurnRunner
from engine.protocol import EngineDead, StepPlan, StepResult
from engine.toy_engine import ToyEngine
from tests.mortal import tokens_of
from tests.toy_service import SPEC, TENANT, TEXT, Talk, make_runner, refusal, run_turn, until

POISON = ord("!")


def run(scenario: Callable[[], Awaitable[None]]) -> None:
    async def bounded() -> None:
        await asyncio.wait_for(scenario(), 60)

    asyncio.run(bounded())


class FragileEngine(ToyEngine):
    """Dies of one token id in its input."""

    def __init__(self) -> None:
        super().__init__(SPEC, 8, TEXT, step_delay_s=0.002)

    def step(self, plan: StepPlan) -> StepResult:
        if any(POISON in row.tokens.tolist() for row in plan.rows):
            raise EngineDead("illegal instruction")
        return super().step(plan)


def fragile(store: MemoryStore, name: str) -> TurnRunner:
    return make_runner(store, name, FragileEngine())


async def failing_over(
    runners: list[TurnRunner], call: TurnCall
) -> tuple[tuple[int, ...], TurnItem]:
    """What an ingress does: from replica to replica, until there is an answer."""
    shown: tuple[int, ...] = ()
    steal = False
    for runner in runners:
        items = await run_turn(runner, replace(call, steal=steal, shown_ids=shown))
        shown += tokens_of(items, len(shown))
        last = items[-1]
        if not (isinstance(last, TurnRefused) and last.error.code == "replica_lost"):
            break
        steal = last.resumable
    return shown, last


def test_a_poisonous_turn_takes_two_engines_down_and_nobody_elses_turn() -> None:
    async def scenario() -> None:
        store = MemoryStore()
        runners = [fragile(store, f"r{n}") for n in range(4)]
        innocents = [await Talk(store).create() for _ in range(2)]
        calls = [talk.call("hello", 120, ignore_eos=True, key="k") for talk in innocents]
        villain = await Talk(store).create()
        poison = villain.call("!", 120, key="k")
        ends = [asyncio.create_task(failing_over(runners, call)) for call in calls]
        running = runners[0]._parts.loop

        async def both_run() -> bool:
            return running.stats().running == 2

        await until(both_run)
        shown, last = await failing_over(runners, poison)
        assert isinstance(last, TurnRefused), last
        assert (last.error.code, last.resumable) == ("turn_quarantined", False)
        assert shown == ()
        for talk, call, end in zip(innocents, calls, ends, strict=True):
            shown, last = await end
            assert isinstance(last, TurnDone), last
            assert shown == tuple(talk.due(call))
            talk.accept(call, last)
        dead = [runner._parts.loop.stats().dead is not None for runner in runners]
        assert dead == [True, True, False, False]
        # It stays so, and the conversation is free for something else.
        _, again = await failing_over(runners[2:], poison)
        assert isinstance(again, TurnRefused)
        assert again.error.code == "turn_quarantined"
        await villain.say(runners[2], "sorry")
        for runner in runners:
            await runner.close()

    run(scenario)


class SlowToStore(MemoryStore):
    """The first checkpoint of every turn waits for `go`."""

    def __init__(self) -> None:
        super().__init__()
        self.go = asyncio.Event()

    async def checkpoint(self, batch: Sequence[Checkpoint]) -> Sequence[StoreError | None]:
        await self.go.wait()
        return await super().checkpoint(batch)


def test_turns_resume_one_at_a_time_and_those_that_wait_are_not_claimed() -> None:
    async def scenario() -> None:
        store = SlowToStore()
        store.go.set()
        first, heir = fragile(store, "first"), fragile(store, "heir")
        talks = [await Talk(store).create() for _ in range(3)]
        calls = [talk.call("hello", 150, ignore_eos=True, key="k") for talk in talks]
        streams = [asyncio.create_task(run_turn(first, call)) for call in calls]

        async def all_stored() -> bool:
            found = [store._records[talk.conversation_id].running for talk in talks]
            return all(one is not None and len(one.output_ids) for one in found)

        await until(all_stored)
        first.hand_over()
        shown = [tokens_of(await stream) for stream in streams]
        store.go.clear()
        rest = [
            asyncio.create_task(run_turn(heir, replace(call, steal=True, shown_ids=ids)))
            for call, ids in zip(calls, shown, strict=True)
        ]
        await asyncio.sleep(0.1)
        owners = [(await store.get(TENANT, talk.conversation_id)).owner for talk in talks]
        assert sorted(owners) == ["first", "first", "heir"]
        # A new turn does not wait for them.
        new = await Talk(store).create()
        newcomer = asyncio.create_task(run_turn(heir, new.call("me too", 3)))

        async def begun() -> bool:
            return (await store.get(TENANT, new.conversation_id)).running

        await until(begun)
        # Nor does one that is cancelled while it waits wait any longer.
        waiting = owners.index("first")
        rest[waiting].cancel()
        await asyncio.wait([rest[waiting]])
        store.go.set()
        assert isinstance((await newcomer)[-1], TurnDone)

        # Once it has a token, the next one resumes beside it.
        async def side_by_side() -> bool:
            return heir._parts.loop.stats().running == 2

        await asyncio.wait_for(until(side_by_side), 20)
        for n, (talk, call) in enumerate(zip(talks, calls, strict=True)):
            if n != waiting:
                done = (await rest[n])[-1]
                assert isinstance(done, TurnDone), done
                talk.accept(call, done)
        await first.close()
        await heir.close()

    run(scenario)


class Stopped:
    """The store as a replica reaches it that can be stopped and go on, as by SIGSTOP and SIGCONT."""

    def __init__(self, store: MemoryStore) -> None:
        self._store = store
        self.going = asyncio.Event()
        self.going.set()

    def __getattr__(self, name: str) -> Any:
        operation = getattr(self._store, name)

        async def call(*args: Any) -> Any:
            await self.going.wait()
            return await operation(*args)

        return call


@pytest.mark.parametrize("stopped_at", ["a token", "the commit"])
def test_a_replica_that_comes_back_shows_nothing_stops_and_frees_its_slot(stopped_at: str) -> None:
    async def scenario() -> None:
        store = MemoryStore()
        front = Stopped(store)
        old = make_runner(front, "old", ToyEngine(SPEC, 4, TEXT, step_delay_s=0.003))
        heir = make_runner(store, "heir")
        talk = await Talk(store).create()
        call = talk.call("x", 300 if stopped_at == "a token" else 12, ignore_eos=True, key="k")
        items: list[TurnItem] = []
        last_token = 11 if stopped_at == "the commit" else 10**6

        async def read() -> None:
            async for item in old.turn(call):
                items.append(item)
                if isinstance(item, TurnTokens) and tokens_of(items)[last_token:]:
                    front.going.clear()

        reading = asyncio.create_task(read())

        async def shown() -> bool:
            return len(tokens_of(items)) >= (10 if stopped_at == "a token" else 12)

        await until(shown)
        front.going.clear()
        await asyncio.sleep(0.02)
        before = tokens_of(items)
        rest = await run_turn(heir, replace(call, steal=True, shown_ids=before))
        done = rest[-1]
        assert isinstance(done, TurnDone), done
        front.going.set()
        await reading
        last = items[-1]
        if isinstance(last, TurnDone):
            # Stopped after its commit had reached the store.
            assert (last.head, stopped_at) == (done.head, "the commit")
        else:
            assert isinstance(last, TurnRefused)
            assert (last.error.code, last.resumable) == ("replica_lost", False)
            assert old.stats().values["fenced_turns"] == 1
        assert tokens_of(items) == before
        assert before + tokens_of(rest, len(before)) == tuple(talk.due(call))
        talk.accept(call, done)

        async def free() -> bool:
            stats = old._parts.loop.stats()
            return stats.running == 0 and stats.free_slots + stats.clean_slots == 4

        await until(free)
        # What it holds of the conversation is stale, and it knows.
        assert (await talk.say(old, "next")).usage.cached_tokens == 0
        await old.close()
        await heir.close()

    run(scenario)


class SilentStore(MemoryStore):
    """The first `silent` calls of `begin` take effect and get no answer."""

    silent = 0

    async def begin(self, turn: BeginTurn) -> Begun:
        begun = await super().begin(turn)
        if self.silent:
            self.silent -= 1
            raise StoreUnavailable("no answer")
        return begun


def test_a_turn_that_began_without_an_answer_is_taken_over_from_oneself() -> None:
    """Its lease is not waited for, and it is not held against the turn."""

    async def scenario() -> None:
        store = SilentStore(StoreLimits(max_attempts=1))
        store.silent = 1
        runner = make_runner(store, tunables=Tunables(lease_s=300.0))
        talk = await Talk(store).create()
        call = talk.call("x", key="k")
        assert await refusal(runner, call) == "store_unavailable"
        items = await run_turn(runner, call)
        assert isinstance(items[-1], TurnDone)
        talk.accept(call, items[-1])
        await runner.close()

    run(scenario)


def test_a_turn_that_began_without_an_answer_is_withdrawn(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Another request need not wait for its lease either, at whichever replica."""
    monkeypatch.setattr("deployments.turn_begin._WITHDRAW_PAUSE_S", 0.01)

    async def scenario() -> None:
        store = SilentStore()
        store.silent = 1
        runner = make_runner(store, tunables=Tunables(lease_s=300.0))
        other = make_runner(store, "other")
        talk = await Talk(store).create()
        assert await refusal(runner, talk.call("x", key="k")) == "store_unavailable"
        assert (await store.get(TENANT, talk.conversation_id)).running
        await talk.idle()
        await talk.say(other, "y", key="another")
        await runner.close()
        await other.close()

    run(scenario)


def test_a_withdrawal_touches_nobody_elses_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deployments.turn_begin._WITHDRAW_PAUSE_S", 0.01)

    async def scenario() -> None:
        now_s = 1000.0
        store = SilentStore(clock=lambda: now_s)
        store.silent = 1
        runner = make_runner(store, tunables=Tunables(lease_s=1.0))
        other = make_runner(store, "other", ToyEngine(SPEC, 8, TEXT, step_delay_s=0.005))
        talk = await Talk(store).create()
        assert await refusal(runner, talk.call("x", key="k")) == "store_unavailable"
        now_s += 2.0
        await talk.say(other, "y", key="another", max_tokens=30)
        await asyncio.sleep(0.05)
        assert (await store.get(TENANT, talk.conversation_id)).turn == 1
        await runner.close()
        await other.close()

    run(scenario)
