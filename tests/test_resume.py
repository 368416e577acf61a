"""Turns whose replica dies: another one goes on, and the client sees one uncut reply."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any, Literal

import pytest

from cluster.memory_store import MemoryStore
from deployments.config import Limits, Tunables
from deployments.turn_call import TurnAccepted, TurnCall, TurnDone, TurnItem, TurnRefused
from deployments.turn_runner import TurnRunner
from engine.sampling import SamplingParams
from engine.toy_engine import NoisyToyEngine, ToyEngine, ToyText
from tests.mortal import MortalReplica, tokens_of
from tests.toy_service import SPEC, TENANT, TEXT, Talk, make_runner, run_turn, until

CUTS = 256


def run(scenario: Callable[[], Awaitable[None]], patience_s: float = 60) -> None:
    async def bounded() -> None:
        await asyncio.wait_for(scenario(), patience_s)

    asyncio.run(bounded())


async def cut(
    store: MemoryStore, call: TurnCall, k: int | Literal["commit"], **parts: Any
) -> MortalReplica:
    """A replica that dies in mid-turn: `k` tokens are stored, and as many or fewer were shown."""
    doomed = MortalReplica(store, dies_at=k, **parts)
    doomed.start(call)
    await doomed.store.died.wait()
    await doomed.kill()
    return doomed


async def rest(runner: TurnRunner, call: TurnCall, shown: tuple[int, ...]) -> list[TurnItem]:
    return await run_turn(runner, replace(call, steal=True, shown_ids=shown))


def test_every_cut_of_a_turn_is_invisible() -> None:
    async def scenario() -> None:
        store = MemoryStore()
        heir = make_runner(store, "heir", ToyEngine(SPEC, max_resident=4, text=TEXT))
        lengths: set[int] = set()
        due: tuple[int, ...] = ()
        for k in range(CUTS):
            talk = await Talk(store).create()
            call = talk.call("count", max_tokens=CUTS, ignore_eos=True, key="k")
            due = due or tuple(talk.due(call))
            doomed = await cut(store, call, k)
            items = await rest(heir, call, doomed.shown)
            accepted, done = items[0], items[-1]
            assert isinstance(accepted, TurnAccepted)
            assert accepted.recovery == "none"
            assert isinstance(done, TurnDone), done
            assert doomed.shown + tokens_of(items, len(doomed.shown)) == due, k
            assert tuple(done.output_ids.tolist()) == due
            assert done.usage.output_tokens == CUTS
            lengths.add(len(doomed.shown))
        assert heir.stats().values["resumed_turns"] == CUTS
        # Clients had seen anything from nothing to all but the last token.
        assert len(lengths) > CUTS // 2
        await heir.close()

    run(scenario, 300)


PENALTIES = SamplingParams(
    temperature=1.0, seed=3, repetition_penalty=1.4, presence_penalty=0.6, frequency_penalty=0.8
)
FEW = ToyText(words=tuple(b"abcdef "), stop_period=40)


@pytest.mark.parametrize("stop", [(), ("ab", "cde"), ("f",)])
@pytest.mark.parametrize("turns_before", [0, 9])
def test_penalties_stop_strings_and_old_conversations_survive_a_cut(
    stop: tuple[str, ...], turns_before: int
) -> None:
    async def scenario() -> None:
        store = MemoryStore()
        heir = make_runner(store, "heir", ToyEngine(SPEC, 4, FEW))
        for k in (0, 1, 2, 3, 7, 12, 19):
            talk = await Talk(store).create()
            for n in range(turns_before):
                await run_turn(heir, talk.call(f"{n}", 30, expect_turn=n))
                talk.turn = n + 1
            call = talk.call("x", 40, stop, sampling=PENALTIES, key="k")
            uncut = await Talk(store).create()
            for n in range(turns_before):
                await run_turn(heir, uncut.call(f"{n}", 30, expect_turn=n))
                uncut.turn = n + 1
            whole = await run_turn(heir, replace(call, conversation_id=uncut.conversation_id))
            due, end = tokens_of(whole), whole[-1]
            assert isinstance(end, TurnDone)
            if len(due) <= k:
                continue
            doomed = await cut(store, call, k, engine=ToyEngine(SPEC, 4, FEW))
            items = await rest(heir, call, doomed.shown)
            done = items[-1]
            assert isinstance(done, TurnDone), done
            assert doomed.shown + tokens_of(items, len(doomed.shown)) == due
            assert (done.finish_reason, done.head) == (end.finish_reason, end.head)
            assert done.output_ids.tolist() == end.output_ids.tolist()
            # The conversation goes on from there.
            record = await store.get(TENANT, talk.conversation_id)
            assert (record.turn, record.running) == (turns_before + 1, False)
        await heir.close()

    run(scenario)


@pytest.mark.parametrize("k", [0, 1, 20, 59])
def test_what_was_shown_stays_whoever_goes_on(k: int) -> None:
    """Two noisy replicas would say different things: the reply is the first one's up to the cut."""

    async def scenario() -> None:
        store = MemoryStore()
        talk = await Talk(store).create()
        call = talk.call("count", max_tokens=60, ignore_eos=True, key="k")
        alone = []
        for name in "ab":
            uncut = (await Talk(store).create()).call("count", 60, ignore_eos=True)
            alone.append(tokens_of(await run_turn(noisy(store, name), uncut)))
        assert alone[0] != alone[1]
        doomed = await cut(store, call, k, engine=NoisyToyEngine("a", SPEC, 4, TEXT))
        heir = noisy(store, "b")
        items = await rest(heir, call, doomed.shown)
        whole = doomed.shown + tokens_of(items, len(doomed.shown))
        assert whole[:k] == alone[0][:k]
        assert (whole == alone[1]) == (k == 0)
        done = items[-1]
        assert isinstance(done, TurnDone)
        assert tuple(done.output_ids.tolist()) == whole
        await heir.close()

    run(scenario)


def noisy(store: MemoryStore, name: str) -> TurnRunner:
    return make_runner(store, name, NoisyToyEngine(name, SPEC, 4, TEXT))


@pytest.mark.parametrize(
    ("stop", "max_tokens", "reason"), [((), 200, "stop"), ((), 5, "length"), (("e",), 200, "stop")]
)
def test_a_reply_that_was_complete_is_committed_without_the_engine(
    stop: tuple[str, ...], max_tokens: int, reason: str
) -> None:
    async def scenario() -> None:
        store = MemoryStore()
        talk = await Talk(store).create()
        call = talk.call("count", max_tokens, stop, key="k")
        doomed = await cut(store, call, "commit")
        heir = make_runner(store, "heir")
        items = await rest(heir, call, doomed.shown)
        done = items[-1]
        assert isinstance(done, TurnDone), done
        assert done.finish_reason == reason
        assert heir.stats().values["engine_steps"] == 0
        assert done.usage.prefill_tokens == 0
        talk.accept(call, done)
        await talk.say(heir, "next")
        await heir.close()

    run(scenario)


@pytest.mark.parametrize("shown_wrong", [False, True])
def test_durability_turn_resumes_after_what_the_client_has_seen(shown_wrong: bool) -> None:
    """Nothing was stored: the client's own tokens are the reply's beginning, as it was told."""

    async def scenario() -> None:
        store = MemoryStore()
        tunables = Tunables(limits=Limits(max_input_tokens=500), durability="turn")
        talk = await Talk(store).create()
        call = talk.call("count", max_tokens=60, ignore_eos=True, key="k")
        due = tuple(talk.due(call))
        engine = ToyEngine(SPEC, 4, TEXT, step_delay_s=0.002)
        doomed = MortalReplica(store, engine=engine, tunables=tunables)
        doomed.start(call)

        async def has_seen_some() -> bool:
            return len(doomed.shown) >= 20

        await until(has_seen_some)
        await doomed.kill()
        shown = doomed.shown
        assert due[: len(shown)] == shown
        running = store._records[call.conversation_id].running
        assert running is not None
        assert not len(running.output_ids)
        if shown_wrong:
            shown = (*shown[:-1], 65)
        heir = make_runner(store, "heir", tunables=tunables)
        items = await rest(heir, call, shown)
        done = items[-1]
        assert isinstance(done, TurnDone)
        assert tuple(done.output_ids.tolist())[: len(shown)] == shown
        assert (shown + tokens_of(items, len(shown)) == due) is not shown_wrong
        await heir.close()

    run(scenario)


def test_a_client_that_was_shown_other_tokens_gets_a_conflict_and_nothing_else() -> None:
    async def scenario() -> None:
        store = MemoryStore()
        talk = await Talk(store).create()
        call = talk.call("count", max_tokens=60, ignore_eos=True, key="k")
        await cut(store, call, 10)
        heir = make_runner(store, "heir")
        items = await rest(heir, call, (1, 2, 3))
        assert [type(item) for item in items] == [TurnRefused]
        refused = items[0]
        assert isinstance(refused, TurnRefused)
        assert (refused.error.code, refused.resumable) == ("turn_conflict", False)
        # The conversation is free again, as it was.
        await talk.say(heir, "next")
        await heir.close()

    run(scenario)
