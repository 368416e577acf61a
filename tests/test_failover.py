"""A reply whose replicas die is the reply: at every cut, in every way, to the last byte."""

from __future__ import annotations

import asyncio
import dataclasses
import json
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

import httpx
import numpy as np
import pytest

from cluster.conversation import GENESIS
from deployments.errors import ErrorInfo, ServiceError
from deployments.failover import FailoverPolicy, FailoverTurns, ReplicaHangs, ReplicaUnreachable
from deployments.turn_call import (
    FollowCall,
    TurnAccepted,
    TurnCall,
    TurnDone,
    TurnItem,
    TurnRefused,
    TurnTokens,
    TurnUsage,
)
from engine.sampling import SamplingParams
from tests.bad_requests import CHAT
from tests.fake_turns import MODEL, Death, FakeEngine, FakeTurn, Front, Script, make_front

Body = dict[str, Any]

REPLY = "h\u00e9 \U0001f600 \u4f60\u597d, ST STO"
DEATHS: tuple[Death, ...] = ("dead", "unreachable", "vanished", "handed_over")


def ask(text: str = "Hi", **more: Any) -> Body:
    return {"model": MODEL, "messages": [{"role": "user", "content": text}], **more}


def text_of(reply: Body) -> str:
    text = reply["choices"][0]["message"]["content"]
    assert isinstance(text, str)
    return text


def deltas(chunks: list[Body]) -> str:
    choices = [chunk["choices"][0] for chunk in chunks if chunk["choices"]]
    return "".join([choice["delta"].get("content", "") for choice in choices])


def cut(front: Front, *scripts: Script) -> None:
    """These runs of one turn, and one that goes through."""
    front.engine.scripts.extend(scripts)
    front.engine.scripts.append(dataclasses.replace(scripts[0], die_at=None, die_unaccepted=False))


async def content_over_http(front: Front, body: Body) -> bytes:
    """Every byte of the reply's content, as a client logs it."""
    transport = httpx.ASGITransport(front.app())
    async with httpx.AsyncClient(transport=transport, base_url="http://front") as http:
        response = await http.post(CHAT, json=body)
    assert response.status_code == 200
    if not body.get("stream"):
        return text_of(response.json()).encode()
    events = response.text.removesuffix("\n\n").split("\n\n")
    assert events[-1] == "data: [DONE]"
    chunks = [json.loads(event.split("\n")[1].removeprefix("data: ")) for event in events[:-1]]
    assert chunks[-1]["choices"][0]["finish_reason"] == "stop"
    return deltas(chunks).encode()


# Every cut.


@pytest.mark.parametrize("durability", ["token", "turn"])
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("reply", "stop", "due"),
    [
        (REPLY, [], REPLY),
        (REPLY, ["STOP"], REPLY),
        ("\U0001f600 before STOP after", ["STOP", "aft"], "\U0001f600 before "),
        ("ab\u00e9STOP", ["\u00e9STOP", "xyz"], "ab"),
    ],
)
async def test_a_reply_cut_anywhere_is_the_reply(
    durability: Any, stream: bool, reply: str, stop: list[str], due: str
) -> None:
    """Also in the middle of a character, or of a stop string, and with tokens stored but not shown.
    The four variants of a reply take turns, so that it is cut everywhere in each of the four ways."""
    turned = 2 * stream + (durability == "turn")
    for ahead in (0, 3) if durability == "token" else (0,):
        for k in range(len(reply.encode())):
            death = DEATHS[(k + turned) % 4]
            front = make_front()
            front.engine.durability = durability
            cut(front, Script(reply, die_at=k, death=death, ahead=ahead))
            body = ask(stop=stop, stream=stream)
            assert await content_over_http(front, body) == due.encode(), k
            if front.engine.deaths:
                assert len(front.engine.calls) >= 2
            page = await front.service.list_conversations()
            assert [entry["turn"] for entry in page["data"]] == [1]


async def test_a_turn_may_lose_many_replicas() -> None:
    front = make_front()
    dying = [Script(REPLY, die_at=k, death=DEATHS[k % 4]) for k in range(len(REPLY.encode()))]
    cut(front, *dying)
    assert await content_over_http(front, ask(stream=True)) == REPLY.encode()
    assert front.engine.deaths == len(dying)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("death", DEATHS)
async def test_a_turn_committed_by_a_replica_that_could_not_say_so(
    stream: bool, death: Death
) -> None:
    front = make_front()
    cut(front, Script(REPLY, die_at=-1, death=death))
    assert await content_over_http(front, ask(stream=stream)) == REPLY.encode()
    assert len(front.engine.scripts) == 1, "a committed turn was run again"
    page = await front.service.list_conversations()
    assert [entry["turn"] for entry in page["data"]] == [1]


@pytest.mark.parametrize("death", ["dead", "vanished", "handed_over"])
async def test_a_replica_that_dies_before_it_accepts(death: Death) -> None:
    front = make_front()
    cut(front, Script(REPLY, die_unaccepted=True, death=death))
    assert text_of(await front.service.chat(ask())) == REPLY
    assert [call.steal for call in front.engine.calls] == [False, True]


async def test_handles_go_on_as_well() -> None:
    front = make_front()
    cut(front, Script(REPLY, die_at=4), Script(REPLY, die_at=9))
    chunks = [chunk async for chunk in front.service.chat_stream(ask())]
    assert deltas(chunks) == REPLY
    assert len({chunk["id"] for chunk in chunks}) == 1
    assert [chunk["event_id"] for chunk in chunks][-1] == f"1.{len(REPLY)}"


async def test_log_probabilities_survive_a_cut() -> None:
    whole, broken = make_front(), make_front()
    body = ask(logprobs=True, top_logprobs=2)
    whole.engine.scripts.append(Script(REPLY))
    due = (await whole.service.chat(body))["choices"][0]["logprobs"]
    cut(broken, Script(REPLY, die_at=5, ahead=2))
    assert (await broken.service.chat(body))["choices"][0]["logprobs"] == due


async def test_what_the_next_replica_is_told() -> None:
    front = make_front()
    cut(front, Script(REPLY, die_at=5))
    await front.service.chat(ask())
    first, second = front.engine.calls
    assert (first.steal, first.shown_ids, first.avoid) == (False, (), "")
    assert (second.steal, second.avoid) == (True, "replica-a")
    assert second.shown_ids == tuple(REPLY.encode()[:5])
    assert 0 < second.timeout_s < first.timeout_s
    same = ("key", "request_hash", "sampling", "expect_turn", "completion_id", "created_s")
    assert [getattr(first, name) for name in same] == [getattr(second, name) for name in same]


async def test_failovers_are_counted() -> None:
    front = make_front()
    cut(front, Script(REPLY, die_at=5))
    await front.service.chat(ask())
    metrics = (await front.service.metrics_text()).decode()
    assert 'sinkserve_turn_failovers_total{code="replica_lost",ingress="0"} 1.0' in metrics
    assert 'sinkserve_turns_total{finish_reason="stop",ingress="0",recovery="none"} 1.0' in metrics


async def test_poison_is_not_run_again() -> None:
    front = make_front()
    front.engine.scripts.extend(Script(REPLY, die_at=0) for _ in range(9))
    with pytest.raises(ServiceError, match="turn_quarantined"):
        await front.service.chat(ask(idempotency_key="k"))
    assert front.engine.deaths == 2
    with pytest.raises(ServiceError, match="turn_quarantined"):
        await front.service.chat(ask(idempotency_key="k"))
    assert front.engine.deaths == 2


async def test_a_reply_committed_otherwise_than_shown_is_a_conflict(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Never a contradiction: what was shown stays, the client is told to read."""
    original = FakeEngine._items

    async def otherwise(
        engine: FakeEngine, turn: FakeTurn, script: Script
    ) -> AsyncGenerator[TurnItem, None]:
        async for item in original(engine, turn, script):
            if isinstance(item, TurnDone):
                item = dataclasses.replace(item, output_ids=np.array(list(b"Goof"), np.int32))
            yield item

    monkeypatch.setattr(FakeEngine, "_items", otherwise)
    front = make_front()
    chunks = front.service.chat_stream(ask())
    seen = [await anext(chunks) for _ in range(1 + len("Good day."))]
    assert deltas(seen) == "Good day."
    with pytest.raises(ServiceError, match="turn_conflict"):
        await anext(chunks)


# The policy, call by call.

USAGE = TurnUsage(1, 3, 0, 0, 1, 0, "none")
LOST = ErrorInfo("replica_lost", "gone")
CALL = TurnCall(
    tenant="t",
    conversation_id="c",
    input_ids=np.zeros(1, np.int32),
    messages=(),
    history=GENESIS,
    sampling=SamplingParams(),
    max_tokens=9,
    owner_hint="owner",
    timeout_s=5.0,
)
QUICK = FailoverPolicy(first_pause_s=0.0001, max_pause_s=0.001)

Play = list[TurnItem | Exception]


class Scripted:
    """Plays one list of items for each call; the last one again and again."""

    def __init__(self, *plays: Play) -> None:
        self.plays = list(plays)
        self.calls: list[TurnCall] = []

    async def turn(self, call: TurnCall) -> AsyncGenerator[TurnItem, None]:
        self.calls.append(call)
        for item in self.plays.pop(0) if len(self.plays) > 1 else self.plays[0]:
            if isinstance(item, Exception):
                raise item
            yield item

    def follow(self, call: FollowCall) -> AsyncGenerator[TurnItem, None]:
        raise AssertionError(call)


def accepted(replica: str = "r1", turn: int = 1) -> TurnItem:
    return TurnAccepted(turn, replica, "none")


def tokens(k: int, *ids: int) -> TurnItem:
    return TurnTokens(k, ids)


def done(*ids: int) -> TurnItem:
    return TurnDone(1, "head", "stop", np.array(ids, np.int32), USAGE)


async def played(engine: Scripted, policy: FailoverPolicy = QUICK) -> list[TurnItem]:
    async with aclosing(FailoverTurns(engine, policy).turn(CALL)) as items:
        return [item async for item in items]


async def ends(engine: Scripted, policy: FailoverPolicy = QUICK) -> str:
    with pytest.raises(ServiceError) as caught:
        await played(engine, policy)
    return caught.value.info.code


def told(engine: Scripted) -> list[tuple[bool, tuple[int, ...], str]]:
    return [(call.steal, call.shown_ids, call.avoid) for call in engine.calls]


async def test_tokens_come_once_whatever_is_sent_again() -> None:
    engine = Scripted(
        [accepted(), tokens(0, 1, 2), ServiceError(LOST)],
        [accepted("r2"), tokens(0, 1), tokens(1, 2, 3), tokens(3, 4), done(1, 2, 3, 4)],
    )
    items = await played(engine)
    assert [item for item in items if isinstance(item, TurnAccepted)] == [accepted()]
    assert [item for item in items if isinstance(item, TurnTokens)] == [
        TurnTokens(0, (1, 2)),
        TurnTokens(2, (3,)),
        TurnTokens(3, (4,)),
    ]


@pytest.mark.parametrize(
    "again",
    [
        [accepted("r2"), tokens(0, 1, 9)],
        [accepted("r2"), tokens(3, 4)],
        [accepted("r2", turn=2)],
    ],
)
async def test_a_contradiction_is_not_shown(again: Play) -> None:
    engine = Scripted([accepted(), tokens(0, 1, 2), ServiceError(LOST)], again)
    assert await ends(engine) == "internal_error"
    assert len(engine.calls) == 2


async def test_who_was_taken_over_joins_and_does_not_steal_back() -> None:
    fenced = TurnRefused(ErrorInfo("replica_lost", "taken over"))
    engine = Scripted([accepted(), tokens(0, 1), fenced], [accepted("r2"), done(1)])
    await played(engine)
    assert told(engine) == [(False, (), ""), (False, (1,), "r1")]


async def test_an_unreachable_owner_is_asked_once_more_before_its_turn_is_taken() -> None:
    silent = ReplicaUnreachable()
    engine = Scripted([accepted(), tokens(0, 1), silent], [silent], [accepted("r2"), done(1)])
    await played(engine)
    assert told(engine) == [(False, (), ""), (False, (1,), ""), (True, (1,), "r1")]
    early = Scripted([silent], [silent], [accepted("r2"), done(1)])
    await played(early)
    assert told(early) == [(False, (), ""), (False, (), ""), (True, (), "owner")]


async def test_a_turn_that_nobody_can_see_is_taken_over() -> None:
    """Its owner went silent, and another replica waits for what it stores: not for long."""

    class Waiting(Scripted):
        async def turn(self, call: TurnCall) -> AsyncGenerator[TurnItem, None]:
            async for item in super().turn(call):
                yield item
            if len(self.calls) == 2:
                await asyncio.Event().wait()

    silent = ReplicaUnreachable()
    engine = Waiting(
        [accepted(), tokens(0, 1), silent],
        [accepted("r2")],
        [accepted("r2"), tokens(1, 2), done(1, 2)],
    )
    await played(engine, dataclasses.replace(QUICK, silence_s=0.01))
    assert [call.steal for call in engine.calls] == [False, False, True]


@pytest.mark.parametrize("code", ["not_ready", "overloaded", "conversation_busy"])
async def test_a_turn_that_has_begun_waits_for_a_replica(code: str) -> None:
    nobody = TurnRefused(ErrorInfo(code, "not now"))
    play: list[Play] = [[accepted(), tokens(0, 1), ServiceError(LOST)], [nobody], [nobody]]
    engine = Scripted(*play, [accepted("r2"), done(1)])
    await played(engine)
    # The claim of the dead owner is still to be taken over.
    assert [call.steal for call in engine.calls] == [False, True, True, True]
    assert await ends(Scripted([nobody])) == code


@pytest.mark.parametrize(
    ("ends_with", "blameless"),
    [
        ([ServiceError(LOST)], False),
        ([TurnRefused(LOST, resumable=True, fatal=True)], False),
        ([], False),
        ([TurnRefused(LOST, resumable=True)], True),
        ([TurnRefused(ErrorInfo("overloaded", "full"), resumable=True)], True),
        ([ReplicaHangs()], True),
    ],
)
async def test_only_a_death_is_held_against_the_turn(ends_with: Play, blameless: bool) -> None:
    """And it stays, until somebody has taken the turn: the next to be asked may be gone as well."""
    nobody = TurnRefused(ErrorInfo("not_ready", "not now"))
    hangs: list[Play] = [[nobody], [ReplicaHangs()]]
    engine = Scripted([accepted(), *ends_with], *hangs, [accepted("r2"), done(1)])
    await played(engine)
    steals = [(call.steal, call.blameless) for call in engine.calls]
    assert steals == [(False, False), *[(True, blameless)] * 3]
    engine = Scripted([accepted(), ReplicaHangs()], [ServiceError(LOST)], [accepted("r2"), done(1)])
    await played(engine)
    assert [call.blameless for call in engine.calls] == [False, True, False]


async def test_a_store_that_recovers_is_waited_for() -> None:
    recovering = TurnRefused(ErrorInfo("store_recovering", "wait", None, 0.0001))
    engine = Scripted([recovering], [recovering], [recovering], [accepted(), done(1)])
    await played(engine)
    assert len(engine.calls) == 4
    assert await ends(Scripted([recovering])) == "store_recovering"
    late = TurnRefused(ErrorInfo("store_recovering", "wait", None, 60.0))
    engine = Scripted([late])
    assert await ends(engine, FailoverPolicy(give_up_s=1.0)) == "store_recovering"
    assert len(engine.calls) == 1


@pytest.mark.parametrize(
    "code", ["turn_quarantined", "turn_failed", "timeout", "idempotency_key_reused"]
)
@pytest.mark.parametrize("begun", [False, True])
async def test_what_is_final(code: str, begun: bool) -> None:
    refusal = TurnRefused(ErrorInfo(code, "no"))
    engine = Scripted([accepted(), tokens(0, 1), refusal] if begun else [refusal])
    assert await ends(engine) == code
    assert len(engine.calls) == 1


async def test_tries_are_bounded_and_counted_anew_after_progress() -> None:
    policy = dataclasses.replace(QUICK, max_tries=4)
    engine = Scripted([accepted(), ServiceError(LOST)])
    assert await ends(engine, policy) == "replica_lost"
    assert len(engine.calls) == 4
    lost = ServiceError(LOST)
    steps: list[Play] = [[accepted(), tokens(k, k), lost] for k in range(10)]
    engine = Scripted(*steps, [accepted(), lost])
    assert await ends(engine, policy) == "replica_lost"
    assert len(engine.calls) == 10 + 3
    refused = TurnRefused(LOST)
    engine = Scripted([refused])
    assert await ends(engine, dataclasses.replace(QUICK, first_tries=3)) == "replica_lost"
    assert len(engine.calls) == 3


async def test_a_turn_given_up_by_its_client_is_not_called_again() -> None:
    engine = Scripted([accepted(), tokens(0, 1), tokens(1, 2), ServiceError(LOST)])
    async with aclosing(FailoverTurns(engine, QUICK).turn(CALL)) as items:
        async for item in items:
            if isinstance(item, TurnTokens):
                break
    await asyncio.sleep(0.01)
    assert len(engine.calls) == 1
