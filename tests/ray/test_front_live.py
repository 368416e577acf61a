"""The front as deployed: bad requests, the official client and vanishing clients, through Ray Serve."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import httpx
import openai
import pytest
from openai import AsyncOpenAI

from tests.bad_requests import CASES, CHAT, ODD_CASES, Case, Context, send_handle, send_http
from tests.ray_fixture import RayService

pytestmark = [pytest.mark.ray, pytest.mark.xdist_group("ray")]

HI: Any = [{"role": "user", "content": "Hi"}]


class ServeHandle:
    """The methods of a Serve handle, awaited."""

    def __init__(self, service: RayService) -> None:
        self._handle = service.handle()

    async def chat(self, body: Any) -> Any:
        return await self._handle.chat.remote(body)

    async def create_conversation(self, body: Any, *tenant: str) -> Any:
        return await self._handle.create_conversation.remote(body, *tenant)


@pytest.fixture
async def http(toy_service: RayService) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(base_url=toy_service.url, timeout=60.0) as client:
        yield client


async def make_context(service: RayService, http: httpx.AsyncClient) -> Context:
    reply = (await http.post(CHAT, json={"model": "toy", "messages": HI})).json()
    foreign = await ServeHandle(service).create_conversation({}, "someone-else")
    return Context(
        model="toy",
        conversation=reply["conversation"]["id"],
        foreign=foreign["id"],
        long_text="a " * 32_769,
        huge_text="x" * (4 << 20),
        long_system="a " * service.fields["capacity"],
    )


def figures(service: RayService, name: str) -> float:
    return sum(one[name] for one in service.replicas().values())


async def test_bad_requests_over_http_and_on_handles(
    toy_service: RayService, http: httpx.AsyncClient
) -> None:
    """Each gets its documented status, none reaches a replica, and all replicas live on."""
    context = await make_context(toy_service, http)
    replicas, committed = set(toy_service.replicas()), figures(toy_service, "committed_turns")
    handle, wrong = ServeHandle(toy_service), []
    for case in CASES:
        answers = [await send_http(http, case, context)]
        if case.on_handle:
            answers.append(await send_handle(handle, case, context))
        due = (case.status, case.code, case.param)
        given = [(answer.status, answer.code, answer.param) for answer in answers]
        wrong += [(case.name, one, due) for one in given if one != due]
    assert wrong == []
    assert set(toy_service.replicas()) == replicas
    assert figures(toy_service, "committed_turns") == committed
    assert (await http.post(CHAT, json={"model": "toy", "messages": HI})).status_code == 200


async def test_odd_requests_get_replies(toy_service: RayService, http: httpx.AsyncClient) -> None:
    context = await make_context(toy_service, http)
    for name, body in ODD_CASES.items():
        case = Case(name, "invalid_json", body)
        assert (await send_http(http, case, context)).status == 200, name
        assert (await send_handle(ServeHandle(toy_service), case, context)).status == 200, name


async def test_the_official_client(toy_service: RayService) -> None:
    options: Any = {"base_url": f"{toy_service.url}/v1", "api_key": "any", "max_retries": 0}
    async with AsyncOpenAI(**options) as client:
        history: list[Any] = list(HI)
        ask = client.chat.completions
        first = await ask.create(model="toy", messages=history, seed=1, logprobs=True)
        history += [first.choices[0].message, {"role": "user", "content": "Go on."}]
        stream = await ask.create(
            model="toy",
            messages=history,
            stream=True,
            stream_options={"include_usage": True},
        )
        chunks = [chunk async for chunk in stream]
        assert chunks[-1].usage is not None
        extra: Any = chunks[-1].model_extra
        assert first.model_extra is not None
        assert extra["conversation"]["id"] == first.model_extra["conversation"]["id"]
        assert extra["conversation"]["turn"] == 2
        # The second turn computed its own tokens alone.
        usage: Any = chunks[-1].usage
        assert usage.prompt_tokens_details.cached_tokens > 0
        assert usage.sinkserve["prefill_tokens"] < usage.prompt_tokens
        with pytest.raises(openai.NotFoundError):
            await ask.create(model="gpt-4o", messages=HI)
        with pytest.raises(openai.BadRequestError):
            await ask.create(model="toy", messages=HI, temperature=9)
        with pytest.raises(openai.APITimeoutError):
            await client.with_options(timeout=0.3).chat.completions.create(
                model="toy", messages=HI, max_tokens=4096, extra_body={"ignore_eos": True}
            )


@pytest.mark.parametrize("stream", [False, True])
async def test_a_client_that_leaves_is_noticed(
    toy_service: RayService, http: httpx.AsyncClient, stream: bool
) -> None:
    """Whether or not anything has been sent to it; its new conversation is forgotten."""
    body = {"model": "toy", "messages": HI, "max_tokens": 4096, "ignore_eos": True}
    payload = json.dumps({**body, "stream": stream}).encode()
    head = f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    for _ in range(5):
        before = figures(toy_service, "cancelled_turns")
        known = await conversations(http)
        _, writer = await asyncio.open_connection("127.0.0.1", toy_service.port)
        writer.write(f"{head}Content-Length: {len(payload)}\r\n\r\n".encode() + payload)
        await asyncio.to_thread(toy_service.wait, lambda: figures(toy_service, "running_turns") > 0)
        writer.close()
        await asyncio.to_thread(
            toy_service.wait, lambda: figures(toy_service, "running_turns") == 0
        )
        # On a machine that is busy enough the whole reply may have come first.
        if figures(toy_service, "cancelled_turns") > before:
            break
    assert figures(toy_service, "cancelled_turns") == before + 1
    async with asyncio.timeout(20):
        while await conversations(http) != known:  # noqa: ASYNC110 - seen over HTTP only
            await asyncio.sleep(0.05)


async def conversations(http: httpx.AsyncClient) -> list[str]:
    page = (await http.get("/v1/conversations?limit=100")).json()
    return [entry["id"] for entry in page["data"]]
