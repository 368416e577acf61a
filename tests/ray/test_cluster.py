"""The service on a real Ray cluster, toy engine: two replicas, the router, HTTP and handles."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from cluster.conversation import Conversation
from cluster.redis_store import RedisStore
from deployments.auth import DEFAULT_TENANT
from deployments.errors import ServiceError
from tests.ray_fixture import RayService

pytestmark = [pytest.mark.ray, pytest.mark.xdist_group("ray")]

PATH = "/v1/chat/completions"
QUESTIONS = [f"question {n}, and some more words of it" for n in range(6)]


def body(text: str, conversation_id: str | None = None, **more: Any) -> dict[str, Any]:
    named = {} if conversation_id is None else {"conversation": conversation_id}
    messages = [{"role": "user", "content": text}]
    return {"model": "toy", "messages": messages, "temperature": 0, **named, **more}


def ask(client: httpx.Client, text: str, conversation_id: str | None = None) -> dict[str, Any]:
    response = client.post(PATH, json=body(text, conversation_id))
    assert response.status_code == 200, response.text
    reply: dict[str, Any] = response.json()
    return reply


def text_of(reply: dict[str, Any]) -> str:
    text: str = reply["choices"][0]["message"]["content"]
    return text


def recovery_of(reply: dict[str, Any]) -> str:
    recovery: str = reply["usage"]["sinkserve"]["recovery"]
    return recovery


def id_of(reply: dict[str, Any]) -> str:
    identifier: str = reply["conversation"]["id"]
    return identifier


def record(service: RayService, conversation_id: str) -> Conversation:
    """What the store has, behind the service's back."""

    async def read() -> Conversation:
        store = await RedisStore.connect(service.fields["redis_url"])
        try:
            return await store.get(DEFAULT_TENANT, conversation_id)
        finally:
            await store.close()

    return asyncio.run(read())


@pytest.fixture
def client(toy_service: RayService) -> Iterator[httpx.Client]:
    with toy_service.client() as client:
        yield client


@pytest.fixture
def undisturbed(client: httpx.Client) -> list[str]:
    """What the toy answers to QUESTIONS, one turn each, when nothing happens in between."""
    return converse(client, QUESTIONS)[1]


def converse(
    client: httpx.Client,
    questions: Sequence[str],
    before: dict[int, Callable[[str], None]] = {},  # noqa: B006
) -> tuple[str, list[str], list[str]]:
    """Id, replies and recovery classes of a conversation; `before[n]` happens before question n."""
    conversation_id: str | None = None
    replies, recoveries = [], []
    for n, question in enumerate(questions):
        if n in before and conversation_id is not None:
            before[n](conversation_id)
        reply = ask(client, question, conversation_id)
        conversation_id = id_of(reply)
        replies.append(text_of(reply))
        recoveries.append(recovery_of(reply))
    return conversation_id or "", replies, recoveries


def test_every_turn_goes_to_the_replica_that_holds_the_slot(
    toy_service: RayService, client: httpx.Client
) -> None:
    with ThreadPoolExecutor(6) as pool:
        talks = list(pool.map(lambda _: converse(client, QUESTIONS), range(6)))
    owners = {record(toy_service, talk[0]).owner for talk in talks}
    assert owners == set(toy_service.replicas())
    assert [talk[2] for talk in talks] == [["none"] * len(QUESTIONS)] * 6
    assert len({tuple(talk[1]) for talk in talks}) == 1


def test_handles_and_http_say_the_same(toy_service: RayService, client: httpx.Client) -> None:
    handle = toy_service.handle()
    over_http = ask(client, "the same question")
    by_handle = handle.chat.remote(body("the same question")).result(timeout_s=60)
    assert text_of(by_handle) == text_of(over_http)
    assert by_handle["usage"] == over_http["usage"]
    # Each goes on with the other's conversation.
    following = handle.chat.remote(body("go on", id_of(over_http))).result(timeout_s=60)
    assert text_of(following) == text_of(ask(client, "go on", id_of(by_handle)))
    chunks = list(handle.options(stream=True).chat_stream.remote(body("the same question")))
    deltas = [chunk["choices"][0]["delta"].get("content", "") for chunk in chunks]
    assert "".join(deltas) == text_of(over_http)


def test_handles_and_http_refuse_the_same(toy_service: RayService, client: httpx.Client) -> None:
    for wrong in (
        body("x", "conv_" + "0" * 32),
        body("x", "no id"),
        body("x", max_tokens=0),
        {"model": "toy"},
        body("x") | {"model": "other"},
    ):
        response = client.post(PATH, json=wrong)
        error = response.json()["error"]
        with pytest.raises(ServiceError) as refusal:
            toy_service.handle().chat.remote(wrong).result(timeout_s=60)
        info = refusal.value.info
        assert (info.kind.status, info.code, info.param) == (
            response.status_code,
            error["code"],
            error["param"],
        )


def test_a_request_that_fans_out_gets_all_its_answers(
    toy_service: RayService, client: httpx.Client
) -> None:
    """One parent request, 20 concurrent calls: they share its internal id, see the router."""
    from ray import serve

    made = [client.post("/v1/conversations", json={}).json()["id"] for _ in range(20)]

    class Fan:
        async def __call__(self, conversation_ids: list[str]) -> list[tuple[str, str]]:
            from ray import serve

            from cluster.conversation import GENESIS, Message
            from deployments.text import ChatCodec
            from deployments.turn_call import TurnAccepted, TurnCall, TurnDone
            from engine.sampling import SamplingParams

            replicas = serve.get_deployment_handle("SinkReplica", "sinkserve").options(stream=True)
            message = Message("user", "everybody")

            async def turn(conversation_id: str) -> tuple[str, str]:
                call = TurnCall(
                    tenant="default",
                    conversation_id=conversation_id,
                    input_ids=ChatCodec.for_toy().encode_opening([message]),
                    messages=(message,),
                    history=GENESIS,
                    sampling=SamplingParams(temperature=0),
                    max_tokens=20,
                )
                turns: Any = replicas.options(session_id=conversation_id)
                items = [item async for item in turns.turn.remote(call)]
                assert isinstance(items[0], TurnAccepted)
                assert isinstance(items[-1], TurnDone)
                return items[0].replica, ChatCodec.for_toy().decode(items[-1].output_ids)

            return await asyncio.gather(*(turn(one) for one in conversation_ids))

    fan: Any = serve.deployment(Fan)
    handle: Any = serve.run(fan.bind(), name="fan", route_prefix=None)
    try:
        answers = handle.remote(made).result(timeout_s=60)
    finally:
        serve.delete("fan")
    assert len(answers) == 20
    assert len({text for _, text in answers}) == 1
    assert {replica for replica, _ in answers} == set(toy_service.replicas())


def test_a_client_that_leaves_cancels_its_turn(
    toy_service: RayService, client: httpx.Client
) -> None:
    first = ask(client, "hello")

    def cancelled() -> float:
        return sum(one["cancelled_turns"] for one in toy_service.replicas().values())

    before = cancelled()
    # By itself this turn would go on for many seconds and be committed.
    endless = body("count", id_of(first), stream=True, max_tokens=4096, ignore_eos=True)
    with client.stream("POST", PATH, json=endless) as response:
        assert next(response.iter_lines()).startswith("id:")
    toy_service.wait(lambda: cancelled() == before + 1)
    after = record(toy_service, id_of(first))
    assert (after.turn, after.running) == (1, False)
    going_on = ask(client, "go on", id_of(first))
    undisturbed = ask(client, "hello")
    assert text_of(ask(client, "go on", id_of(undisturbed))) == text_of(going_on)


def test_a_busy_conversation_is_refused_not_copied(
    toy_service: RayService, client: httpx.Client
) -> None:
    conversation_id = id_of(ask(client, "hello"))
    endless = body("count", conversation_id, stream=True, max_tokens=4096, ignore_eos=True)
    with client.stream("POST", PATH, json=endless) as response:
        # Dropping this iterator would close the stream.
        lines = response.iter_lines()
        assert next(lines).startswith("id:")
        refused = client.post(PATH, json=body("me too", conversation_id))
        assert (refused.status_code, refused.json()["error"]["code"]) == (409, "conversation_busy")
        assert next(line for line in lines if line).startswith("data:")


def test_scaling_out_moves_nothing_and_scaling_in_loses_nothing(
    toy_service: RayService, client: httpx.Client, undisturbed: list[str]
) -> None:
    owners: list[str] = []
    before = set(toy_service.replicas())

    def note_owner(conversation_id: str) -> None:
        owners.append(record(toy_service, conversation_id).owner)

    def scale(count: int) -> Callable[[str], None]:
        def rescale(conversation_id: str) -> None:
            toy_service.deploy(count)
            note_owner(conversation_id)

        return rescale

    talk = converse(client, QUESTIONS[:3], {1: scale(3), 2: note_owner})
    note_owner(talk[0])
    assert len(set(owners)) == 1
    assert talk[2] == ["none"] * 3
    after = set(toy_service.replicas())
    assert before < after
    # New conversations go to the new, empty replica.
    newcomers = [record(toy_service, id_of(ask(client, f"{n}"))).owner for n in range(3)]
    assert after - before <= set(newcomers)

    moved = [ask(client, QUESTIONS[0]) for _ in range(6)]
    toy_service.deploy()
    for first in moved:
        assert text_of(ask(client, QUESTIONS[1], id_of(first))) == undisturbed[1]


def test_tunables_change_without_a_restart(toy_service: RayService, client: httpx.Client) -> None:
    before = set(toy_service.replicas())
    toy_service.deploy(limits={"max_output_tokens": 30, "default_max_tokens": 24})
    try:
        toy_service.wait(
            lambda: client.post(PATH, json=body("x", max_tokens=31)).status_code == 400
        )
        assert ask(client, "x")["usage"]["completion_tokens"] <= 30
        assert set(toy_service.replicas()) == before
    finally:
        toy_service.deploy()


def test_a_killed_replicas_conversations_go_on_elsewhere(
    toy_service: RayService, client: httpx.Client, undisturbed: list[str]
) -> None:
    killed: list[str] = []

    def kill_owner(conversation_id: str) -> None:
        killed.append(record(toy_service, conversation_id).owner)
        toy_service.kill(killed[-1])

    conversation_id, replies, recoveries = converse(client, QUESTIONS, {2: kill_owner})
    assert replies == undisturbed
    assert recoveries == ["none", "none", "exact", "none", "none", "none"]
    assert record(toy_service, conversation_id).owner not in killed
    toy_service.wait(lambda: len(toy_service.replicas()) == 2)


def test_a_restarted_application_finds_its_conversations(
    toy_service: RayService, client: httpx.Client, undisturbed: list[str]
) -> None:
    def restart(_: str) -> None:
        toy_service.stop()
        toy_service.deploy()

    _, replies, recoveries = converse(client, QUESTIONS, {4: restart})
    assert replies == undisturbed
    assert recoveries == ["none"] * 4 + ["replay", "none"]
