"""Asking again: the same key finds the same turn, a stream goes on where it broke, for any front."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import time
from collections.abc import Sequence
from contextlib import aclosing
from typing import Any

import httpx
import pytest

from cluster.conversation import Conversation, Message
from cluster.store import Recovering, StoreLimits, StoreUnavailable
from deployments.chat_service import ChatService
from deployments.errors import ErrorInfo, ServiceError
from deployments.turn_identity import EventId
from tests.bad_requests import CHAT, CONVERSATIONS
from tests.fake_turns import HASTE, MODEL, Front, Script, make_front

Body = dict[str, Any]

REPLY = "h\u00e9 \U0001f600 \u4f60\u597d."


def user(text: str) -> Body:
    return {"role": "user", "content": text}


def ask(*messages: Body, **more: Any) -> Body:
    return {"model": MODEL, "messages": list(messages or (user("Hi"),)), **more}


def keyed(*messages: Body, **more: Any) -> Body:
    return ask(*messages, idempotency_key="key-1", **more)


def text_of(reply: Body) -> str:
    text = reply["choices"][0]["message"]["content"]
    assert isinstance(text, str)
    return text


def deltas(chunks: list[Body]) -> str:
    choices = [chunk["choices"][0] for chunk in chunks if chunk["choices"]]
    return "".join([choice["delta"].get("content", "") for choice in choices])


@pytest.fixture
def front() -> Front:
    front = make_front()
    front.engine.scripts.append(Script(REPLY))
    return front


def another(front: Front, **changes: Any) -> ChatService:
    """A second front on the same store and replicas: another proxy, or one that was restarted."""
    config = dataclasses.replace(front.service.config, **changes)
    return ChatService(config, front.store, front.codec, front.engine, None, HASTE)


async def refused(service: ChatService, body: Body) -> ErrorInfo:
    with pytest.raises(ServiceError) as caught:
        await service.chat(body)
    return caught.value.info


async def turns_of(front: Front) -> list[int]:
    page = await front.service.list_conversations(limit=100)
    return [entry["turn"] for entry in page["data"]]


def http_to(front: Front, service: ChatService | None = None) -> httpx.AsyncClient:
    app = dataclasses.replace(front, service=service or front.service).app()
    return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://front")


# The same key once more.


async def test_the_same_key_gets_the_same_bytes_from_anywhere(front: Front) -> None:
    async with http_to(front) as http, http_to(front, another(front)) as elsewhere:
        first = await http.post(CHAT, json=ask(), headers={"Idempotency-Key": "key-1"})
        again = await elsewhere.post(CHAT, json=keyed())
        assert again.content == first.content
        assert again.headers["etag"] == first.headers["etag"]
        streamed = await elsewhere.post(CHAT, json=keyed(stream=True))
        twice = await http.post(CHAT, json=keyed(stream=True))
    assert streamed.content == twice.content
    chunks = [json.loads(line[6:]) for line in streamed.text.split("\n") if line[:7] == "data: {"]
    assert deltas(chunks) == REPLY
    assert {chunk["id"] for chunk in chunks} == {first.json()["id"]}
    assert {chunk["created"] for chunk in chunks} == {first.json()["created"]}
    assert chunks[-1]["conversation"] == first.json()["conversation"]
    assert await turns_of(front) == [1]


async def test_without_a_key_the_same_request_is_another_turn(front: Front) -> None:
    first, second = await front.service.chat(ask()), await front.service.chat(ask())
    assert first["id"] != second["id"]
    assert await turns_of(front) == [1, 1]
    assert len({call.key for call in front.engine.calls}) == 2
    assert len({call.sampling.seed for call in front.engine.calls}) == 2


async def test_a_seed_follows_from_the_key(front: Front) -> None:
    other = make_front()
    for one in (front, other):
        await one.service.chat(keyed())
    seeds = [one.engine.calls[0].sampling.seed for one in (front, other)]
    assert seeds[0] == seeds[1]
    assert front.engine.calls[0].conversation_id == other.engine.calls[0].conversation_id
    await other.service.chat(ask(idempotency_key="key-2"))
    await other.service.chat(keyed(), "another tenant")
    assert len({call.sampling.seed for call in other.engine.calls}) == 3
    assert len({call.conversation_id for call in other.engine.calls}) == 3
    await other.service.chat(ask(idempotency_key="key-3", seed=7))
    assert other.engine.calls[-1].sampling.seed == 7


@pytest.mark.parametrize(
    "changes",
    [
        {"messages": [user("Ho")]},
        {"max_tokens": 5},
        {"seed": 1},
        {"temperature": 0},
        {"stop": ["x"]},
        {"metadata": {"a": "b"}},
    ],
)
async def test_the_same_key_with_another_body(front: Front, changes: Body) -> None:
    await front.service.chat(keyed())
    info = await refused(another(front), {**keyed(), **changes})
    assert (info.code, info.kind.status) == ("idempotency_key_reused", 422)
    # ... also while the first is running, and in a named conversation.
    named = (await front.service.chat(ask()))["conversation"]["id"]
    script = Script(gate=asyncio.Event())
    front.engine.scripts.append(script)
    body = keyed(conversation=named)
    running = asyncio.create_task(front.service.chat(body))
    await script.at_gate.wait()
    assert (await refused(another(front), {**body, **changes})).code == "idempotency_key_reused"
    assert script.gate is not None
    script.gate.set()
    assert (await running)["conversation"]["turn"] == 2
    assert (await refused(front.service, {**body, **changes})).code == "idempotency_key_reused"


async def test_a_key_of_an_opening_that_was_never_answered(front: Front) -> None:
    """Its conversation was made, and nothing else: whoever comes with another opening is told."""
    front.engine.scripts[0] = Script(fail=ErrorInfo("turn_failed", "NaN"))
    system = {"role": "system", "content": "Be brief."}
    await refused(front.service, keyed(system, user("a")))
    assert (await refused(front.service, keyed(user("a")))).code == "idempotency_key_reused"
    assert text_of(await front.service.chat(keyed(system, user("a")))) == "Good day."
    assert await turns_of(front) == [1]


@pytest.mark.parametrize("where", ["accept_gate", "gate"])
async def test_a_running_turn_is_joined(front: Front, where: str) -> None:
    script = Script(REPLY, gate_at=5)
    setattr(script, where, asyncio.Event())
    front.engine.scripts[0] = script
    front.engine.scripts.append(Script(REPLY))
    first = asyncio.create_task(front.service.chat(keyed()))
    await script.at_gate.wait()
    chunks = another(front).chat_stream(keyed())
    opened = None if where == "accept_gate" else await anext(chunks)
    gate = script.accept_gate or script.gate
    assert gate is not None
    gate.set()
    rest = [chunk async for chunk in chunks]
    reply = await first
    assert deltas(([opened] if opened else []) + rest) == text_of(reply) == REPLY
    assert rest[-1]["id"] == reply["id"]
    assert await turns_of(front) == [1]


async def test_a_match_that_the_first_try_moved_on_is_the_same_turn(front: Front) -> None:
    """A stateless client: its history names the conversation as it was before the turn."""
    await front.service.chat(ask(user("a")))
    history = [user("a"), {"role": "assistant", "content": REPLY}, user("b")]
    script = Script(gate=asyncio.Event())
    front.engine.scripts.append(script)
    first = asyncio.create_task(front.service.chat(keyed(*history)))
    await script.at_gate.wait()
    joined = asyncio.create_task(another(front).chat(keyed(*history)))
    await asyncio.sleep(0.01)
    assert script.gate is not None
    script.gate.set()
    assert (await joined) == (await first)
    again = await another(front).chat(keyed(*history))
    assert again == await first
    assert again["conversation"]["turn"] == 2
    assert await turns_of(front) == [2]


async def test_a_fork_is_found_again(front: Front) -> None:
    await front.service.chat(ask(user("a")))
    history = [user("a"), {"role": "assistant", "content": REPLY}, user("b")]
    await front.service.chat(ask(*history))
    # The match has moved on, so this starts a conversation of its own; once.
    fork = await front.service.chat(keyed(*history))
    assert fork["conversation"]["turn"] == 1
    assert await another(front).chat(keyed(*history)) == fork
    assert sorted(await turns_of(front)) == [1, 2]


async def test_a_fork_is_found_again_though_its_match_is_free_by_now(front: Front) -> None:
    first = await front.service.chat(ask(user("a")))
    history = [user("a"), {"role": "assistant", "content": REPLY}, user("b")]
    script = Script(gate=asyncio.Event())
    front.engine.scripts.append(script)
    chunks = front.service.chat_stream(ask(user("?"), conversation=first["conversation"]["id"]))
    await anext(chunks)
    await script.at_gate.wait()
    fork = await front.service.chat(keyed(*history))
    await chunks.aclose()
    assert await another(front).chat(keyed(*history)) == fork
    assert sorted(await turns_of(front)) == [1, 1]


@pytest.mark.parametrize("expectation", ["turn", "head"])
async def test_a_stale_view_under_a_known_key_is_no_conflict(
    front: Front, expectation: str
) -> None:
    first = await front.service.chat(ask())
    block = first["conversation"]
    body = keyed(conversation=block["id"])
    headers = {}
    if expectation == "turn":
        body["expect_turn"] = 1
    else:
        headers["If-Match"] = f'"{block["etag"]}"'
    async with http_to(front) as http, http_to(front, another(front)) as elsewhere:
        done = await http.post(CHAT, json=body, headers=headers)
        again = await elsewhere.post(CHAT, json=body, headers=headers)
        assert (done.status_code, again.content) == (200, done.content)
        stale = await http.post(CHAT, json=body | {"idempotency_key": "key-2"}, headers=headers)
    assert (stale.status_code, stale.json()["error"]["code"]) == (409, "turn_conflict")
    assert await turns_of(front) == [2]


async def test_another_key_meets_a_busy_conversation(front: Front) -> None:
    named = (await front.service.chat(ask()))["conversation"]["id"]
    script = Script(gate=asyncio.Event())
    front.engine.scripts.append(script)
    running = asyncio.create_task(front.service.chat(keyed(conversation=named)))
    await script.at_gate.wait()
    async with http_to(front) as http:
        busy = await http.post(CHAT, json=ask(conversation=named, idempotency_key="key-2"))
    assert (busy.status_code, busy.json()["error"]["code"]) == (409, "conversation_busy")
    assert int(busy.headers["retry-after"]) >= 1
    assert script.gate is not None
    script.gate.set()
    await running


# Streams that break.


@pytest.mark.parametrize("done", [False, True])
async def test_a_stream_goes_on_after_any_event(front: Front, done: bool) -> None:
    """The first front is gone; every prefix that a client may have seen is completed by another."""
    script = Script(REPLY, gate=None if done else asyncio.Event(), gate_at=len(REPLY.encode()) - 2)
    front.engine.scripts[0] = script
    if done:
        await front.service.chat(keyed())
    seen_events = ["1.0"]
    seen_text = [""]
    async with aclosing(front.service.chat_stream(keyed())) as chunks:
        async for chunk in chunks:
            text = deltas([chunk])
            if text:
                seen_events.append(chunk["event_id"])
                seen_text.append(seen_text[-1] + text)
            if not done and seen_text[-1] == REPLY[:-2]:
                break
    service = another(front)
    waiting = [
        asyncio.create_task(_all(service.chat_stream(keyed(last_event_id=event))))
        for event in seen_events
    ]
    await asyncio.sleep(0.01)
    if script.gate is not None:
        script.gate.set()
    for seen, event, chunks_task in zip(seen_text, seen_events, waiting, strict=True):
        rest = await chunks_task
        assert seen + deltas(rest) == REPLY
        assert rest[0]["event_id"] == event
        assert rest[-1]["event_id"] == f"1.{len(REPLY)}"
        assert rest[-1]["choices"][0]["finish_reason"] == "stop"
    assert await turns_of(front) == [1]


async def _all(chunks: Any) -> list[Body]:
    return [chunk async for chunk in chunks]


async def test_a_rejoined_stream_carries_the_log_probabilities_of_the_rest(front: Front) -> None:
    body = keyed(logprobs=True)
    script = Script(REPLY, gate=asyncio.Event(), gate_at=4)
    front.engine.scripts[0] = script
    whole = asyncio.create_task(front.service.chat(body))
    await script.at_gate.wait()
    rest = asyncio.create_task(_all(another(front).chat_stream({**body, "last_event_id": "1.3"})))
    await asyncio.sleep(0.01)
    assert script.gate is not None
    script.gate.set()
    due = (await whole)["choices"][0]["logprobs"]["content"]
    blocks = [chunk["choices"][0]["logprobs"] for chunk in await rest]
    entries = [entry for block in blocks if block for entry in block["content"]]
    assert entries == due[4:]
    shown = bytes(byte for entry in entries for byte in entry["bytes"])
    assert shown.decode() == REPLY[3:]


async def test_an_event_of_another_stream_is_refused(front: Front) -> None:
    await front.service.chat(keyed())
    for event in ("2.0", "0.0"):
        with pytest.raises(ServiceError) as caught:
            await _all(front.service.chat_stream(keyed(last_event_id=event)))
        assert (caught.value.info.code, caught.value.info.param) == (
            "invalid_value",
            "last_event_id",
        )
    beyond = front.service.chat_stream(keyed(last_event_id=f"1.{len(REPLY) + 1}"))
    with pytest.raises(ServiceError, match="last_event_id"):
        await _all(beyond)


@pytest.mark.parametrize(
    ("more", "finishes"),
    [
        ({"idempotency_key": "k"}, True),
        ({"on_disconnect": "finish"}, True),
        ({}, False),
        ({"idempotency_key": "k", "on_disconnect": "cancel"}, False),
    ],
)
async def test_what_a_disconnect_does(front: Front, more: Body, finishes: bool) -> None:
    script = Script(REPLY, gate=asyncio.Event())
    front.engine.scripts[0] = script
    async with aclosing(front.service.chat_stream(ask(**more))) as chunks:
        await anext(chunks)
        await script.at_gate.wait()
    assert script.gate is not None
    script.gate.set()
    while front.engine.running:  # noqa: ASYNC110 - seen from outside only
        await asyncio.sleep(0.001)
    await front.service.close()
    assert await turns_of(front) == ([1] if finishes else [])
    assert len(front.engine.aborted) == (not finishes)


async def test_who_leaves_does_not_cancel_a_turn_that_others_read(front: Front) -> None:
    script = Script(REPLY, gate=asyncio.Event())
    front.engine.scripts[0] = script
    body = keyed(on_disconnect="cancel")
    async with aclosing(front.service.chat_stream(body)) as chunks:
        await anext(chunks)
        await script.at_gate.wait()
        other = asyncio.create_task(another(front).chat(body))
        await asyncio.sleep(0.01)
    assert script.gate is not None
    script.gate.set()
    assert text_of(await other) == REPLY
    await front.service.close()
    assert await turns_of(front) == [1]


# By the conversation's name alone.


async def read_stream(
    http: httpx.AsyncClient, named: str, query: str = "", **headers: str
) -> tuple[int, str, list[Body]]:
    """Status, error code or text, chunks."""
    response = await http.get(f"{CONVERSATIONS}/{named}/stream{query}", headers=headers)
    if response.status_code != 200:
        return response.status_code, response.json()["error"]["code"], []
    lines = [line for line in response.text.split("\n") if line.startswith("data: {")]
    chunks = [json.loads(line[6:]) for line in lines]
    if "error" in chunks[-1]:
        return 200, chunks[-1]["error"]["code"], chunks[:-1]
    assert response.text.endswith("data: [DONE]\n\n")
    return 200, deltas(chunks), chunks


async def test_the_last_reply_can_be_read_again(front: Front) -> None:
    reply = await front.service.chat(ask())
    named = reply["conversation"]["id"]
    async with http_to(front) as http:
        status, text, chunks = await read_stream(http, named)
        assert (status, text) == (200, REPLY)
        assert chunks[-1]["conversation"] == reply["conversation"]
        assert {chunk["id"] for chunk in chunks} == {reply["id"]}
        assert {chunk["created"] for chunk in chunks} == {reply["created"]}
        for seen in range(len(REPLY) + 1):
            rest = await read_stream(http, named, f"?after=1.{seen}")
            assert rest[:2] == (200, REPLY[seen:])
        header = {"Last-Event-ID": "1.3"}
        assert (await read_stream(http, named, "?after=1.0", **header))[1] == REPLY[3:]
        assert (await read_stream(http, named, f"?after=1.{len(REPLY) + 1}"))[1] == "invalid_value"
        for other in ("0.0", "2.0"):
            assert (await read_stream(http, named, f"?after={other}"))[:2] == (409, "turn_conflict")
        made = await front.service.create_conversation({})
        assert (await read_stream(http, made["id"]))[:2] == (409, "turn_conflict")
        assert (await read_stream(http, "conv_" + "0" * 32))[0] == 404


async def test_a_running_reply_can_be_followed(front: Front) -> None:
    script = Script("ab STOP cd", gate=asyncio.Event(), gate_at=5)
    front.engine.scripts[0] = script
    running = asyncio.create_task(front.service.chat(ask(stop="STOP")))
    await script.at_gate.wait()
    named = front.engine.calls[0].conversation_id
    service = another(front)
    waiting = [
        asyncio.create_task(_all(service.rejoin_stream(named, after=after)))
        for after in ("", "1.0", "1.2")
    ]
    await asyncio.sleep(0.01)
    assert script.gate is not None
    script.gate.set()
    texts = [deltas(await chunks) for chunks in waiting]
    # Half a stop string is never shown, though whoever follows has not asked for the stop.
    assert texts == ["ab ", "ab ", " "]
    assert (await waiting[0])[0]["id"] == (await running)["id"]


async def test_a_stream_never_goes_on_with_the_next_reply(
    front: Front, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The turn ends, and another one begins, between the look at the record and what follows it."""
    front.engine.scripts[0] = Script("the first")
    named = (await front.service.chat(ask()))["conversation"]["id"]
    script = Script("a second", gate=asyncio.Event(), gate_at=3)
    front.engine.scripts.append(script)
    second = asyncio.create_task(front.service.chat(ask(conversation=named)))
    await script.at_gate.wait()
    third = Script("and a third", gate=asyncio.Event(), gate_at=3)
    front.engine.scripts.append(third)
    following: list[asyncio.Task[Body]] = []
    look = front.store.get

    async def late_look(tenant: str, conversation_id: str) -> Conversation:
        record = await look(tenant, conversation_id)
        if not following:
            following.append(second)
            assert script.gate is not None
            script.gate.set()
            await second
            following.append(asyncio.create_task(front.service.chat(ask(conversation=named))))
            await third.at_gate.wait()
        return record

    monkeypatch.setattr(front.store, "get", late_look)
    rest = await _all(another(front).rejoin_stream(named, after="2.2"))
    assert deltas(rest) == "second"
    assert {chunk["event_id"].split(".")[0] for chunk in rest} == {"2"}
    assert third.gate is not None
    third.gate.set()
    await following[1]


async def test_a_committed_reply_is_not_read_from_a_later_transcript(
    front: Front, monkeypatch: pytest.MonkeyPatch
) -> None:
    front.engine.scripts[0] = Script("the first")
    named = (await front.service.chat(ask()))["conversation"]["id"]
    read = front.store.transcript

    async def late_read(*args: Any, **kwargs: Any) -> tuple[int, Sequence[Message]]:
        front.engine.scripts.append(Script("a second"))
        await front.service.chat(ask(conversation=named))
        return await read(*args, **kwargs)

    monkeypatch.setattr(front.store, "transcript", late_read)
    assert deltas(await _all(another(front).rejoin_stream(named))) == "the first"


async def test_who_follows_cancels_nothing(front: Front) -> None:
    script = Script(REPLY, gate=asyncio.Event())
    front.engine.scripts[0] = script
    running = asyncio.create_task(front.service.chat(ask()))
    await script.at_gate.wait()
    named = front.engine.calls[0].conversation_id
    async with aclosing(front.service.rejoin_stream(named)) as chunks:
        await anext(chunks)
    assert script.gate is not None
    script.gate.set()
    assert text_of(await running) == REPLY


async def test_who_follows_does_not_notice_a_failover(front: Front) -> None:
    gates = [asyncio.Event(), asyncio.Event()]
    front.engine.scripts.clear()
    front.engine.scripts.extend(
        [
            Script(REPLY, gate=gates[0], gate_at=6, die_at=6),
            Script(REPLY, gate=gates[1], gate_at=9),
        ]
    )
    scripts = list(front.engine.scripts)
    running = asyncio.create_task(front.service.chat(ask()))
    await scripts[0].at_gate.wait()
    named = front.engine.calls[0].conversation_id
    followed = asyncio.create_task(_all(another(front).rejoin_stream(named)))
    await asyncio.sleep(0.01)
    gates[0].set()
    await scripts[1].at_gate.wait()
    gates[1].set()
    assert deltas(await followed) == REPLY == text_of(await running)


async def test_a_lost_turn_that_nobody_asks_for_is_said_to_be_lost(
    front: Front, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("deployments.rejoin._RETRY_PAUSES_S", (0.001, 0.001))
    named = (await front.service.chat(ask()))["conversation"]["id"]
    gate = asyncio.Event()
    script = Script(REPLY, gate=gate, gate_at=6, die_at=6)
    front.engine.scripts.append(script)
    asking = asyncio.create_task(front.service.chat(keyed(conversation=named)))
    await script.at_gate.wait()
    chunks = another(front).rejoin_stream(named)
    seen = [await anext(chunks) for _ in range(4)]
    # The front that ran the turn dies first, then the replica.
    asking.cancel()
    await asyncio.gather(asking, return_exceptions=True)
    gate.set()
    with pytest.raises(ServiceError, match="replica_lost"):
        seen.extend([chunk async for chunk in chunks])
    async with http_to(front) as http:
        assert (await read_stream(http, named))[:2] == (503, "replica_lost")
    # Its request brings it back, and the bytes go on.
    after = seen[-1]["event_id"]
    front.engine.scripts.append(Script(REPLY))
    monkeypatch.setattr(front.store, "_clock", lambda: time.time() + 60)
    body = keyed(conversation=named, last_event_id=after)
    rest = await _all(another(front).chat_stream(body))
    assert deltas(seen) + deltas(rest) == REPLY


# Another model.


async def test_a_conversation_goes_on_with_another_model(front: Front) -> None:
    made = await front.service.create_conversation({"system": "Be brief."})
    named = made["id"]
    for question in ("one", "two"):
        await front.service.chat(ask(user(question), conversation=named))
    before = await front.service.get_conversation(named)
    front.engine.fingerprint = "e" * 64
    service = another(front, fingerprint="e" * 64, capacity=200, max_input_tokens=150)
    reply = await service.chat(ask(user("three"), conversation=named))
    assert reply["conversation"]["turn"] == 3
    assert reply["usage"]["sinkserve"]["recovery"] == "restart"
    assert reply["usage"]["sinkserve"]["context_tokens"] == 0
    after = await service.get_conversation(named)
    assert after["sink_tokens"] == before["sink_tokens"]
    assert after["sink_tokens"] + after["window_tokens"] == 200
    ids = bytes(token for token in front.engine.calls[-1].input_ids.tolist() if token < 256)
    # The system prompt, and of the transcript what fits half of 150 tokens.
    assert ids.startswith(b"system:Be brief.")
    assert b"two" in ids
    assert b"one" not in ids
    assert ids.endswith(b"user:threeassistant:")
    page = await service.transcript(named)
    assert [entry["content"] for entry in page["data"]][::2] == [
        *("Be brief.", REPLY, "Good day.", "Good day."),
    ]
    # From here on it is a conversation like any other.
    again = await service.chat(ask(user("four"), conversation=named))
    assert again["usage"]["sinkserve"]["recovery"] == "none"
    assert again["conversation"]["turn"] == 4


async def test_the_system_prompt_outlives_the_transcript(front: Front) -> None:
    made = await front.service.create_conversation({"system": "Be brief."})
    named = made["id"]
    front.store._limits = StoreLimits(transcript_messages=4)
    for _ in range(4):
        await front.service.chat(ask(user("one"), conversation=named))
    page = await front.service.transcript(named)
    assert "Be brief." not in [entry["content"] for entry in page["data"]]
    front.engine.fingerprint = "e" * 64
    service = another(front, fingerprint="e" * 64, capacity=200)
    reply = await service.chat(ask(user("two"), conversation=named))
    assert reply["usage"]["sinkserve"]["recovery"] == "restart"
    ids = bytes(token for token in front.engine.calls[-1].input_ids.tolist() if token < 256)
    assert ids.startswith(b"system:Be brief.user:one")
    assert ids.count(b"Be brief.") == 1
    after = await service.get_conversation(named)
    assert after["sink_tokens"] == made["sink_tokens"]


async def test_a_restart_that_broke_off_is_picked_up(front: Front) -> None:
    """The record was restarted, its turn never began: the next one still brings the transcript."""
    named = (await front.service.chat(ask()))["conversation"]["id"]
    front.engine.fingerprint = "e" * 64
    service = another(front, fingerprint="e" * 64)
    front.engine.scripts.append(Script(refuse=ErrorInfo("overloaded", "full")))
    assert (await refused(service, ask(conversation=named))).code == "overloaded"
    reply = await service.chat(ask(user("now"), conversation=named))
    ids = bytes(token for token in front.engine.calls[-1].input_ids.tolist() if token < 256)
    assert REPLY.encode() in ids
    assert reply["usage"]["sinkserve"]["recovery"] == "restart"


async def test_a_stateless_client_keeps_its_conversation_over_a_change_of_model(
    front: Front,
) -> None:
    first = await front.service.chat(ask())
    front.engine.fingerprint = "e" * 64
    service = another(front, fingerprint="e" * 64)
    history = [user("Hi"), {"role": "assistant", "content": REPLY}, user("b")]
    reply = await service.chat(ask(*history))
    assert reply["conversation"]["id"] == first["conversation"]["id"]
    assert reply["usage"]["sinkserve"]["recovery"] == "restart"


async def test_a_reply_from_before_the_change_is_still_found(front: Front) -> None:
    first = await front.service.chat(ask())
    body = keyed(conversation=first["conversation"]["id"])
    second = await front.service.chat(body)
    front.engine.fingerprint = "e" * 64
    for policy in ("restart", "refuse"):
        service = another(front, fingerprint="e" * 64, on_model_change=policy)
        reply = await service.chat(body)
        assert text_of(reply) == text_of(second)
        assert reply["conversation"] == second["conversation"]
    info = await refused(service, ask(conversation=first["conversation"]["id"]))
    assert (info.code, info.kind.status) == ("model_changed", 409)


# The store in trouble.


@pytest.mark.parametrize(
    ("error", "code", "retry_after"),
    [
        (StoreUnavailable("out of memory"), "store_unavailable", "2"),
        (Recovering(11.0), "store_recovering", "11"),
    ],
)
async def test_a_store_in_trouble_has_its_status(
    front: Front, error: Exception, code: str, retry_after: str
) -> None:
    named = (await front.service.chat(ask()))["conversation"]["id"]

    async def fails(*_: Any, **__: Any) -> Any:
        raise error

    for name in ("get", "create", "match_history", "transcript", "list", "delete", "begin"):
        setattr(front.store, name, fails)
    gets = ["", "/transcript", "/stream"]
    async with http_to(front) as http:
        answers = [await http.get(f"{CONVERSATIONS}/{named}{path}") for path in gets]
        answers += [await http.post(CHAT, json=body) for body in (ask(), ask(conversation=named))]
        answers += [await http.post(CHAT, json=keyed(stream=True)), await http.get(CONVERSATIONS)]
        answers += [await http.delete(f"{CONVERSATIONS}/{named}")]
    assert [answer.status_code for answer in answers] == [503] * len(answers)
    assert {answer.json()["error"]["code"] for answer in answers} == {code}
    assert {answer.headers["retry-after"] for answer in answers} == {retry_after}


async def test_a_turn_waits_while_the_store_recovers(front: Front) -> None:
    named = (await front.service.chat(ask()))["conversation"]["id"]
    begin, times = front.store.begin, [0]

    async def recovering(turn: Any) -> Any:
        times[0] += 1
        if times[0] < 4:
            raise Recovering(0.001)
        return await begin(turn)

    front.store.begin = recovering  # type: ignore[method-assign]
    reply = await front.service.chat(ask(conversation=named))
    assert reply["conversation"]["turn"] == 2
    assert times == [4]


async def test_a_view_from_before_a_roll_back_is_a_conflict(front: Front) -> None:
    """What the store has forgotten is not answered as if nothing had happened."""
    first = await front.service.chat(ask())
    named = first["conversation"]["id"]
    front.store._records[named].turn = 0
    front.store._records[named].head = "0" * 64
    stale = ask(user("b"), conversation=named, expect_turn=1)
    assert (await refused(front.service, stale)).code == "turn_conflict"


def test_event_ids_are_what_they_were() -> None:
    assert str(EventId(12, 345)) == "12.345"
