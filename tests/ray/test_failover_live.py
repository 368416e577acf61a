"""kill -9 in the middle of a reply, on a real Ray cluster: the client logs every byte."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from openai import OpenAI

from tests.ray_fixture import RayService

pytestmark = [pytest.mark.ray, pytest.mark.xdist_group("ray")]

PATH = "/v1/chat/completions"
MAX_TOKENS = 2500


def body(text: str, **more: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": text}]
    return {"model": "toy", "messages": messages, "seed": 3, **more}


def long_reply(**more: Any) -> dict[str, Any]:
    return body("count", max_tokens=MAX_TOKENS, ignore_eos=True, **more)


@pytest.fixture(scope="module")
def client(toy_service: RayService) -> Iterator[httpx.Client]:
    with toy_service.client() as client:
        yield client


@pytest.fixture(scope="module")
def due(client: httpx.Client) -> dict[str, Any]:
    """The second reply of a conversation when nothing happens."""
    reply: dict[str, Any] = client.post(PATH, json=long_reply(conversation=opened(client))).json()
    assert reply["usage"]["completion_tokens"] == MAX_TOKENS
    return reply


def opened(client: httpx.Client) -> str:
    """A conversation after its first turn."""
    identifier: str = client.post(PATH, json=body("hello")).json()["conversation"]["id"]
    return identifier


def owner(service: RayService) -> str:
    """The replica that runs the one turn."""
    running: list[str] = []

    def found() -> bool:
        running[:] = [name for name, one in service.replicas().items() if one["running_turns"]]
        return len(running) == 1

    service.wait(found)
    return running[0]


def whole_again(service: RayService) -> None:
    service.wait(lambda: len(service.replicas()) == 2)


def text_of(chunks: list[dict[str, Any]]) -> str:
    choices = [chunk["choices"][0] for chunk in chunks if chunk["choices"]]
    return "".join(choice["delta"].get("content", "") for choice in choices)


@pytest.mark.parametrize("seen_events", [1, 200])
def test_a_stream_outlives_its_replica(
    toy_service: RayService, client: httpx.Client, due: dict[str, Any], seen_events: int
) -> None:
    conversation = opened(client)
    request = long_reply(
        conversation=conversation, stream=True, stream_options={"include_usage": True}
    )
    log = b""
    killed = ""
    with client.stream("POST", PATH, json=request) as response:
        for part in response.iter_raw():
            log += part
            if not killed and log.count(b"\n\n") >= seen_events:
                killed = owner(toy_service)
                toy_service.kill(killed)
    *events, done, rest = log.decode().split("\n\n")
    assert (done, rest) == ("data: [DONE]", "")
    chunks, chars = [], 0
    for event in events:
        event_id, data = event.split("\n")
        chunks.append(json.loads(data.removeprefix("data: ")))
        chars += len(text_of(chunks[-1:]))
        assert event_id == f"id: 2.{chars}"
    assert text_of(chunks) == due["choices"][0]["message"]["content"]
    assert chunks[-1]["conversation"]["etag"] == due["conversation"]["etag"]
    assert chunks[-1]["usage"]["sinkserve"]["recovery"] != "none"
    assert len({chunk["id"] for chunk in chunks}) == 1
    following = client.post(PATH, json=body("and?", conversation=conversation)).json()
    assert following["conversation"]["turn"] == 3
    whole_again(toy_service)
    assert killed not in toy_service.replicas()


def test_a_whole_reply_outlives_its_replica_and_its_client(
    toy_service: RayService, client: httpx.Client, due: dict[str, Any]
) -> None:
    """The client gives up in between, and gets the bytes of its first request from its second one."""
    request = long_reply(conversation=opened(client), idempotency_key="whole-1")
    with pytest.raises(httpx.ReadTimeout):
        client.post(PATH, json=request, timeout=0.3)
    toy_service.kill(owner(toy_service))
    first, second = (client.post(PATH, json=request) for _ in range(2))
    assert first.content == second.content
    assert first.json()["choices"] == due["choices"]
    assert first.json()["conversation"]["etag"] == due["conversation"]["etag"]
    whole_again(toy_service)


def test_a_stream_through_a_handle_outlives_its_replica(
    toy_service: RayService, client: httpx.Client, due: dict[str, Any]
) -> None:
    request = long_reply(conversation=opened(client))
    chunks = []
    for chunk in toy_service.handle().options(stream=True).chat_stream.remote(request):
        chunks.append(chunk)
        if len(chunks) == 50:
            toy_service.kill(owner(toy_service))
    assert text_of(chunks) == due["choices"][0]["message"]["content"]
    assert chunks[-1]["event_id"] == f"2.{len(text_of(chunks))}"
    whole_again(toy_service)


def test_the_official_client_asks_again_and_reads_the_same(
    toy_service: RayService, client: httpx.Client
) -> None:
    options: Any = {"base_url": f"{toy_service.url}/v1", "api_key": "any", "max_retries": 0}
    with OpenAI(**options) as official:
        create = official.chat.completions.with_raw_response.create
        asked: Any = {
            "model": "toy",
            "messages": [{"role": "user", "content": "Hi"}],
            "extra_headers": {"Idempotency-Key": "official-1"},
        }
        first, second = create(**asked), create(**asked)
        assert first.text == second.text
        chunks = list(official.chat.completions.create(**asked, stream=True))
        text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
        assert text == first.parse().choices[0].message.content
        assert {chunk.id for chunk in chunks} == {first.parse().id}
