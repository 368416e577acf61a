"""The front's flow: which conversation a request belongs to, what is encoded, what comes back."""

from __future__ import annotations

import asyncio
import dataclasses
from contextlib import aclosing
from typing import Any

import numpy as np
import pytest

from cluster.conversation import Conversation, Message
from cluster.store import StoreUnavailable
from deployments.chat_service import ChatService
from deployments.errors import ErrorInfo, ServiceError
from tests.fake_turns import CAPACITY, HASTE, Front, Script, make_front

Body = dict[str, Any]


def user(text: str) -> Body:
    return {"role": "user", "content": text}


def assistant(text: str) -> Body:
    return {"role": "assistant", "content": text}


def system(text: str) -> Body:
    return {"role": "system", "content": text}


def ask(*messages: Body, **more: Any) -> Body:
    return {"model": "toy", "messages": list(messages), **more}


@pytest.fixture
def front() -> Front:
    return make_front()


def replies(front: Front, *texts: str) -> None:
    front.engine.scripts.extend(Script(text) for text in texts)


def text_of(reply: Body) -> str:
    text = reply["choices"][0]["message"]["content"]
    assert isinstance(text, str)
    return text


def last_input(front: Front) -> list[int]:
    ids: list[int] = front.engine.calls[-1].input_ids.tolist()
    return ids


def encoded(front: Front, *messages: Body) -> list[int]:
    pairs = [Message(message["role"], message["content"]) for message in messages]
    ids: list[int] = front.codec.encode_opening(pairs).tolist()
    return ids


async def refused(front: Front, body: Body, tenant: str = "default") -> ErrorInfo:
    with pytest.raises(ServiceError) as caught:
        await front.service.chat(body, tenant)
    return caught.value.info


async def streamed(front: Front, body: Body) -> list[Body]:
    return [chunk async for chunk in front.service.chat_stream(body)]


def pieces(chunks: list[Body]) -> list[str]:
    choices = [chunk["choices"][0] for chunk in chunks if chunk["choices"]]
    return [choice["delta"].get("content", "") for choice in choices]


async def all_ids(front: Front) -> list[str]:
    page = await front.service.list_conversations(limit=100)
    return [entry["id"] for entry in page["data"]]


# Stateful conversations.


async def test_a_named_conversation_gets_only_the_new_messages(front: Front) -> None:
    first = await front.service.chat(ask(user("one")))
    named = first["conversation"]["id"]
    second = await front.service.chat(ask(user("two"), conversation=named))
    assert second["conversation"]["id"] == named
    assert second["conversation"]["turn"] == 2
    assert second["conversation"]["etag"] != first["conversation"]["etag"]
    assert last_input(front) == front.codec.encode_turn([Message("user", "two")]).tolist()
    assert (await front.service.get_conversation(named))["etag"] == second["conversation"]["etag"]


async def test_the_token_log_is_the_template_of_the_whole_transcript(front: Front) -> None:
    """Concatenated inputs and committed replies equal one rendering of everything."""
    replies(front, "first", "zweite \u00e9", "third")
    history = [system("Be brief."), user("a")]
    reply = await front.service.chat(ask(*history))
    named = reply["conversation"]["id"]
    log: list[int] = last_input(front)
    for question in ("b", "c"):
        text = text_of(reply)
        closed = front.codec.close_reply(list(text.encode()))
        log += [*closed.output_ids.tolist(), *closed.closing_ids.tolist()]
        history += [assistant(text), user(question)]
        reply = await front.service.chat(ask(user(question), conversation=named))
        log += last_input(front)
        assert log == encoded(front, *history)


async def test_a_created_conversation_starts_with_its_system_prompt(front: Front) -> None:
    made = await front.service.create_conversation(
        {"system": "Be brief.", "metadata": {"topic": "x"}}
    )
    assert made["turn"] == 0
    assert made["metadata"] == {"topic": "x"}
    assert made["sink_tokens"] == front.codec.pinned_tokens([Message("system", "Be brief.")])
    assert made["sink_tokens"] + made["window_tokens"] == CAPACITY
    reply = await front.service.chat(ask(user("hi"), conversation=made["id"]))
    assert last_input(front) == encoded(front, system("Be brief."), user("hi"))
    page = await front.service.transcript(made["id"])
    assert [entry["role"] for entry in page["data"]] == ["system", "user", "assistant"]
    # ... and a stateless client that resends it all finds it.
    again = await front.service.chat(
        ask(system("Be brief."), user("hi"), assistant(text_of(reply)), user("more"))
    )
    assert again["conversation"]["id"] == made["id"]


async def test_few_shot_messages_of_a_created_conversation(front: Front) -> None:
    opening = [user("2+2"), assistant("4")]
    made = await front.service.create_conversation({"messages": opening})
    await front.service.chat(ask(user("3+3"), conversation=made["id"]))
    assert last_input(front) == encoded(front, *opening, user("3+3"))


@pytest.mark.parametrize("size", [2000, 600_000])
async def test_what_the_first_turn_could_not_hold_is_refused_at_creation(
    front: Front, size: int
) -> None:
    opening = [user("x" * size), assistant("ok")]
    with pytest.raises(ServiceError, match="input_too_long"):
        await front.service.create_conversation({"messages": opening})
    assert await all_ids(front) == []


async def test_a_record_that_moved_is_read_and_encoded_again(front: Front) -> None:
    """Between our read (turn 0) and the claim another request's turn was committed."""
    made = await front.service.create_conversation({})
    stale = await front.store.get("default", made["id"])
    await front.service.chat(ask(user("first"), conversation=made["id"]))
    real_get, served = front.store.get, [stale]

    async def get(tenant: str, conversation_id: str) -> Conversation:
        return served.pop() if served else await real_get(tenant, conversation_id)

    front.store.get = get  # type: ignore[method-assign]
    reply = await front.service.chat(ask(user("second"), conversation=made["id"]))
    assert reply["conversation"]["turn"] == 2
    assert last_input(front) == front.codec.encode_turn([Message("user", "second")]).tolist()


async def test_the_next_turn_needs_no_look_at_the_store(
    front: Front, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = await front.service.chat(ask(user("a")))
    name = first["conversation"]["id"]
    second = await front.service.chat(ask(user("b"), conversation=name))

    async def away(*args: object) -> None:
        raise StoreUnavailable("the store is not asked")

    monkeypatch.setattr(front.store, "get", away)
    monkeypatch.setattr(front.store, "match_history", away)
    third = await front.service.chat(ask(user("c"), conversation=name))
    texts = [text_of(reply) for reply in (first, second, third)]
    history = [user("a"), assistant(texts[0]), user("b"), assistant(texts[1])]
    fourth = await front.service.chat(ask(*history, user("c"), assistant(texts[2]), user("d")))
    assert [reply["conversation"]["turn"] for reply in (third, fourth)] == [3, 4]
    assert fourth["conversation"]["id"] == name
    # A client's own expectation is compared with what the store has.
    refusal = await refused(front, ask(user("e"), conversation=name, expect_turn=4))
    assert refusal.code == "store_unavailable"


async def test_what_another_ingress_did_is_noticed(front: Front) -> None:
    other = ChatService(front.service.config, front.store, front.codec, front.engine, None, HASTE)
    first = await front.service.chat(ask(user("a")))
    name = first["conversation"]["id"]
    await other.chat(ask(user("b"), conversation=name))
    third = await front.service.chat(ask(user("c"), conversation=name))
    assert third["conversation"]["turn"] == 3
    fork = await other.chat(ask(user("a"), assistant(text_of(first)), user("x")))
    assert fork["conversation"]["id"] != name
    await other.delete_conversation(name)
    refusal = await refused(front, ask(user("d"), conversation=name))
    assert refusal.code == "conversation_not_found"


async def test_a_stated_turn_that_moved_is_a_conflict(front: Front) -> None:
    reply = await front.service.chat(ask(user("a")))
    named = reply["conversation"]["id"]
    assert (await refused(front, ask(user("b"), conversation=named, expect_turn=0))).code == (
        "turn_conflict"
    )
    good = await front.service.chat(ask(user("b"), conversation=named, expect_turn=1))
    assert good["conversation"]["turn"] == 2


async def test_endless_conflicts_end(front: Front) -> None:
    made = await front.service.create_conversation({})
    conflict = ErrorInfo("turn_conflict", "always")
    front.engine.scripts.extend(Script(refuse=conflict) for _ in range(50))
    assert (await refused(front, ask(user("a"), conversation=made["id"]))).code == "turn_conflict"
    assert len(front.engine.calls) == 4


# Stateless clients.


async def test_a_resent_history_continues_its_conversation(front: Front) -> None:
    history = [system("Be brief.")]
    ids = set()
    for turn, question in enumerate(["a", "b", "c"], start=1):
        history.append(user(question))
        replies(front, f"reply {turn}")
        reply = await front.service.chat(ask(*history))
        ids.add(reply["conversation"]["id"])
        assert reply["conversation"]["turn"] == turn
        if turn > 1:
            assert (
                last_input(front) == front.codec.encode_turn([Message("user", question)]).tolist()
            )
        assert reply["usage"]["prompt_tokens"] == len(encoded(front, *history))
        history.append(assistant(text_of(reply)))
    assert len(ids) == 1
    assert await all_ids(front) == list(ids)


async def test_a_history_nobody_knows_starts_a_conversation(front: Front) -> None:
    history = [user("a"), assistant("from elsewhere"), user("b")]
    reply = await front.service.chat(ask(*history))
    assert reply["conversation"]["turn"] == 1
    assert last_input(front) == encoded(front, *history)
    history += [assistant(text_of(reply)), user("c")]
    assert (await front.service.chat(ask(*history)))["conversation"]["turn"] == 2


@pytest.mark.parametrize(
    "edit",
    [
        [user("A"), assistant("Good day."), user("b")],
        [user("a"), assistant("Good day!"), user("b")],
        [system("x"), user("a"), assistant("Good day."), user("b")],
        [user("b")],
    ],
)
async def test_a_history_that_diverges_forks(front: Front, edit: list[Body]) -> None:
    first = await front.service.chat(ask(user("a")))
    other = await front.service.chat(ask(*edit))
    assert other["conversation"]["id"] != first["conversation"]["id"]
    assert last_input(front) == encoded(front, *edit)


async def test_a_history_that_its_conversation_has_left_behind_forks(front: Front) -> None:
    """Regenerating the second reply, or branching off after the first."""
    first = await front.service.chat(ask(user("a")))
    history = [user("a"), assistant("Good day."), user("b")]
    await front.service.chat(ask(*history))
    again = await front.service.chat(ask(*history))
    assert again["conversation"] != first["conversation"]
    assert again["conversation"]["turn"] == 1
    assert last_input(front) == encoded(front, *history)
    # The latest branch is the one that is continued.
    more = await front.service.chat(ask(*history, assistant("Good day."), user("c")))
    assert more["conversation"]["id"] == again["conversation"]["id"]


async def test_a_history_whose_conversation_is_running_forks(front: Front) -> None:
    await front.service.chat(ask(user("a")))
    history = [user("a"), assistant("Good day."), user("b")]
    script = Script(gate=asyncio.Event())
    front.engine.scripts.append(script)
    running = asyncio.create_task(front.service.chat(ask(*history)))
    await script.at_gate.wait()
    fork = await front.service.chat(ask(*history))
    # The busy owner was not even asked.
    assert len({call.conversation_id for call in front.engine.calls[2:]}) == 1
    assert script.gate is not None
    script.gate.set()
    assert fork["conversation"]["id"] == front.engine.calls[2].conversation_id
    assert fork["conversation"]["id"] != (await running)["conversation"]["id"]


@pytest.mark.parametrize("code", ["conversation_busy", "turn_conflict", "conversation_not_found"])
async def test_a_match_that_is_lost_at_the_claim_forks(front: Front, code: str) -> None:
    await front.service.chat(ask(user("a")))
    history = [user("a"), assistant("Good day."), user("b")]
    # First on the record that this process remembers, then on the one that the store has.
    front.engine.scripts += [Script(refuse=ErrorInfo(code, "lost the race")) for _ in range(2)]
    reply = await front.service.chat(ask(*history))
    assert reply["conversation"]["turn"] == 1
    assert last_input(front) == encoded(front, *history)


async def test_a_full_owner_of_a_match_is_no_reason_to_fork(front: Front) -> None:
    await front.service.chat(ask(user("a")))
    full = ErrorInfo("overloaded", "full", retry_after_s=3.0)
    front.engine.scripts.append(Script(refuse=full))
    info = await refused(front, ask(user("a"), assistant("Good day."), user("b")))
    assert info == full
    assert len(await all_ids(front)) == 1


async def test_tenants_do_not_meet(front: Front) -> None:
    mine = await front.service.chat(ask(user("a")), "alice")
    history = [user("a"), assistant("Good day."), user("b")]
    theirs = await front.service.chat(ask(*history), "bob")
    assert theirs["conversation"]["id"] != mine["conversation"]["id"]
    named = ask(user("b"), conversation=mine["conversation"]["id"])
    assert (await refused(front, named, "bob")).code == "conversation_not_found"
    assert (await front.service.list_conversations("carol"))["data"] == []


async def test_another_model_refuses_by_name_and_forks_by_history(front: Front) -> None:
    first = await front.service.chat(ask(user("a")))
    config = dataclasses.replace(
        front.service.config, fingerprint="e" * 64, on_model_change="refuse"
    )
    front.service = ChatService(config, front.store, front.codec, front.engine)
    named = ask(user("b"), conversation=first["conversation"]["id"])
    assert (await refused(front, named)).code == "model_changed"
    calls = len(front.engine.calls)
    # The fake replica still has the old model and refuses the fork, as in a redeployment.
    info = await refused(front, ask(user("a"), assistant("Good day."), user("b")))
    assert info.code == "not_ready"
    assert front.engine.calls[calls].conversation_id != first["conversation"]["id"]


# Limits.


async def test_the_system_prompt_may_take_half_the_window(front: Front) -> None:
    half = CAPACITY // 2
    spare = half - front.codec.pinned_tokens([Message("system", "")])
    reply = await front.service.chat(ask(system("s" * spare), user("a")))
    record = await front.service.get_conversation(reply["conversation"]["id"])
    assert record["sink_tokens"] == half
    info = await refused(front, ask(system("s" * (spare + 1)), user("a")))
    assert info.code == "system_prompt_too_long"
    assert str(half + 1) in info.message
    assert str(half) in info.message


async def test_a_turn_may_exceed_the_window_but_not_the_limit(front: Front) -> None:
    front_tokens = len(encoded(front, user("")))
    limit = front.service.config.max_input_tokens
    good = await front.service.chat(ask(user("x" * (limit - front_tokens))))
    assert good["usage"]["prompt_tokens"] == limit > CAPACITY
    info = await refused(front, ask(user("x" * (limit - front_tokens + 1))))
    assert info.code == "input_too_long"


# Replies.


@pytest.mark.parametrize("logprobs", [False, True])
@pytest.mark.parametrize(
    "script",
    [
        Script("Good day."),
        Script("h\u00e9 \U0001f600!"),
        Script("cut STOP here"),
        Script("almost STO"),
        Script(""),
        Script("long enough", finish_reason="length"),
    ],
)
async def test_a_stream_is_the_completion_in_pieces(script: Script, logprobs: bool) -> None:
    asked = ask(user("a"), stop=["STOP", "xyz"], max_tokens=7, logprobs=logprobs)
    whole, parts = make_front(), make_front()
    whole.engine.scripts.append(dataclasses.replace(script))
    parts.engine.scripts.append(dataclasses.replace(script))
    reply = await whole.service.chat(asked)
    body = {**asked, "stream": True, "stream_options": {"include_usage": True}}
    chunks = await streamed(parts, body)
    assert "".join(pieces(chunks)) == text_of(reply)
    assert not any("\ufffd" in piece for piece in pieces(chunks))
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    ends = [chunk["choices"][0]["finish_reason"] for chunk in chunks[:-1]]
    assert ends == [None] * (len(ends) - 1) + [reply["choices"][0]["finish_reason"]]
    assert [chunk["usage"] for chunk in chunks] == [None] * (len(chunks) - 1) + [reply["usage"]]
    assert {key: chunks[-1]["conversation"][key] for key in ("turn", "etag")} == {
        key: reply["conversation"][key] for key in ("turn", "etag")
    }
    assert chunks[0]["conversation"] == {"id": chunks[-1]["conversation"]["id"], "turn": 1}
    assert len({chunk["id"] for chunk in chunks}) == 1
    spread = [chunk["choices"][0]["logprobs"] or {"content": []} for chunk in chunks[:-1]]
    content = [entry for block in spread for entry in block["content"]]
    assert content == ((reply["choices"][0]["logprobs"] or {"content": []})["content"])
    if logprobs:
        shown = bytes(byte for entry in content for byte in entry["bytes"])
        assert shown.decode() == text_of(reply)


async def test_the_reply_ends_before_the_stop_string(front: Front) -> None:
    replies(front, "cut STOP here", "next")
    reply = await front.service.chat(ask(user("a"), stop="STOP"))
    assert text_of(reply) == "cut "
    assert reply["choices"][0]["finish_reason"] == "stop"
    assert front.engine.calls[-1].stop == ("STOP",)
    # What was shown is what a stateless client sends back.
    again = await front.service.chat(ask(user("a"), assistant("cut "), user("b")))
    assert again["conversation"]["id"] == reply["conversation"]["id"]


async def test_logprobs_have_openai_shape(front: Front) -> None:
    replies(front, "\u00e9")
    reply = await front.service.chat(ask(user("a"), logprobs=True, top_logprobs=2))
    first, second = reply["choices"][0]["logprobs"]["content"]
    assert first["bytes"] == [0xC3]
    assert first["token"] == "\ufffd"
    assert second["bytes"] == [0xA9]
    assert first["logprob"] == -0.5
    assert [entry["logprob"] for entry in first["top_logprobs"]] == [-2.0, -3.0]


async def test_usage(front: Front) -> None:
    first = await front.service.chat(ask(user("a")))
    second = await front.service.chat(
        ask(user("b" * 300), conversation=first["conversation"]["id"])
    )
    usage = second["usage"]
    context = first["usage"]["total_tokens"] + 1  # the template's end of turn
    assert usage["sinkserve"]["context_tokens"] == context
    assert usage["prompt_tokens"] == context + len(last_input(front))
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    assert 0 < usage["prompt_tokens_details"]["cached_tokens"] < usage["prompt_tokens"]
    assert usage["sinkserve"]["evicted_tokens"] > 0
    assert usage["sinkserve"]["recovery"] == "none"


async def test_usage_in_every_chunk(front: Front) -> None:
    first = await front.service.chat(ask(user("a")))
    options = {"include_usage": True, "continuous_usage_stats": True}
    body = ask(user("b"), conversation=first["conversation"]["id"], stream_options=options)
    usages = [chunk["usage"] for chunk in await streamed(front, body)]
    counted = [usage["completion_tokens"] for usage in usages]
    assert counted == [0, *range(1, 10), 9, 9]
    assert {usage["prompt_tokens"] for usage in usages} == {usages[-1]["prompt_tokens"]}
    assert all(u["total_tokens"] == u["prompt_tokens"] + u["completion_tokens"] for u in usages)


async def test_the_call_carries_what_the_replica_needs(front: Front) -> None:
    made = await front.service.chat(ask(user("a")))
    named = made["conversation"]["id"]
    await front.service.chat(
        ask(user("b"), conversation=named, seed=7, temperature=0, ignore_eos=True, max_tokens=9)
    )
    call = front.engine.calls[-1]
    assert (call.sampling.seed, call.sampling.temperature) == (7, 0)
    assert (call.max_tokens, call.ignore_eos, call.owner_hint) == (9, True, "replica-a")
    assert (call.expect_turn, call.expect_head) == (1, made["conversation"]["etag"])
    assert call.input_ids.dtype == np.int32


# Failures.


@pytest.mark.parametrize("code", ["overloaded", "not_ready", "replica_lost", "timeout"])
async def test_a_turn_that_is_refused_leaves_no_empty_conversation(front: Front, code: str) -> None:
    front.engine.scripts.extend(Script(refuse=ErrorInfo(code, "no")) for _ in range(9))
    assert (await refused(front, ask(user("a")))).code == code
    assert front.engine.ended == len(front.engine.calls), "a turn's generator was left open"
    await front.service.close()
    assert await all_ids(front) == []


@pytest.mark.parametrize(
    ("script", "code"),
    [
        (Script(lose=2), "internal_error"),
        (Script(fail=ErrorInfo("turn_failed", "NaN")), "turn_failed"),
        (Script(fail=RuntimeError("boom")), "internal_error"),
        (Script(finish_reason="cancelled"), "turn_failed"),
    ],
)
async def test_a_turn_that_fails_midway(front: Front, script: Script, code: str) -> None:
    front.engine.scripts.append(script)
    chunks = front.service.chat_stream(ask(user("a")))
    seen = [await anext(chunks) for _ in range(3)]
    with pytest.raises(ServiceError) as caught:
        seen.extend([chunk async for chunk in chunks])
    assert caught.value.info.code == code
    assert "".join(pieces(seen)).startswith("Go")
    assert all(chunk["choices"][0]["finish_reason"] is None for chunk in seen)
    if script.fail is not None:
        await front.service.close()
        assert await all_ids(front) == []


async def test_a_named_conversation_survives_a_failed_turn(front: Front) -> None:
    made = await front.service.chat(ask(user("a")))
    named = made["conversation"]["id"]
    front.engine.scripts.append(Script(fail=RuntimeError("boom")))
    assert (await refused(front, ask(user("b"), conversation=named))).code == "internal_error"
    again = await front.service.chat(ask(user("b"), conversation=named, expect_turn=1))
    assert again["conversation"]["turn"] == 2


@pytest.mark.parametrize("where", ["accept_gate", "gate"])
async def test_a_late_turn_is_cancelled(where: str) -> None:
    front = make_front(turn_timeout_s=0.02)
    script = Script()
    setattr(script, where, asyncio.Event())
    front.engine.scripts.append(script)
    assert (await refused(front, ask(user("a")))).code == "timeout"
    await front.service.close()
    assert await all_ids(front) == []
    assert len(front.engine.aborted) == (where == "gate")


async def test_leaving_a_stream_cancels_its_turn(front: Front) -> None:
    front.engine.scripts.append(Script(gate=asyncio.Event()))
    async with aclosing(front.service.chat_stream(ask(user("a")))) as chunks:
        async for chunk in chunks:
            if chunk["choices"][0]["delta"].get("content"):
                break
    await front.service.close()
    assert len(front.engine.aborted) == 1
    assert await all_ids(front) == []
    metrics = await front.service.metrics_text()
    assert b'sinkserve_running_turns{ingress="0"} 0.0' in metrics
    assert b'sinkserve_turns_abandoned_total{ingress="0"} 1.0' in metrics


@pytest.mark.parametrize("where", ["accept_gate", "gate"])
async def test_cancelling_a_call_cancels_its_turn(front: Front, where: str) -> None:
    script = Script()
    setattr(script, where, asyncio.Event())
    front.engine.scripts.append(script)
    call = asyncio.create_task(front.service.chat(ask(user("a"))))
    await script.at_gate.wait()
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    await front.service.close()
    assert await all_ids(front) == []


async def test_a_store_that_does_not_answer(front: Front) -> None:
    async def gone(*_: Any, **__: Any) -> Any:
        raise StoreUnavailable("connection refused")

    for name in ("create", "get", "list", "match_history", "ping"):
        setattr(front.store, name, gone)
    for body in (ask(user("a")), ask(user("a"), conversation="conv_" + "0" * 32)):
        assert (await refused(front, body)).code == "store_unavailable"
    ready, detail = await front.service.health()
    assert not ready
    assert detail["error"]["code"] == "not_ready"
    assert not detail["store"]["ok"]


# The rest of the API.


async def test_health_follows_the_replicas(front: Front) -> None:
    ready, detail = await front.service.health()
    assert ready
    assert detail["replicas"] == [{"replica": "replica-a", "free_slots": 3.0, "running_turns": 0.0}]
    front.engine.up = False
    assert (await front.service.health())[0] is False


async def test_lists_are_paged(front: Front) -> None:
    made = [(await front.service.create_conversation({}))["id"] for _ in range(5)]
    page = await front.service.list_conversations(limit=3)
    assert [entry["id"] for entry in page["data"]] == made[:1:-1]
    rest = await front.service.list_conversations(limit=3, after=page["last_id"])
    assert [entry["id"] for entry in rest["data"]] == made[1::-1]
    assert (page["has_more"], rest["has_more"]) == (True, False)


async def test_transcripts_are_paged(front: Front) -> None:
    named = (await front.service.chat(ask(user("a"))))["conversation"]["id"]
    await front.service.chat(ask(user("b"), conversation=named))
    page = await front.service.transcript(named, limit=3)
    assert [entry["position"] for entry in page["data"]] == [1, 2, 3]
    assert page["has_more"]
    rest = await front.service.transcript(named, limit=3, before=page["first_position"])
    assert [entry["content"] for entry in rest["data"]] == ["a"]
    assert not rest["has_more"]


async def test_a_deleted_conversation_is_gone(front: Front) -> None:
    named = (await front.service.chat(ask(user("a"))))["conversation"]["id"]
    gone = await front.service.delete_conversation(named)
    assert gone == {"id": named, "object": "conversation.deleted", "deleted": True}
    assert (await refused(front, ask(user("b"), conversation=named))).code == (
        "conversation_not_found"
    )
    # Its history finds nothing either.
    reply = await front.service.chat(ask(user("a"), assistant("Good day."), user("b")))
    assert reply["conversation"]["id"] != named
