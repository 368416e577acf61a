"""The HTTP front over a real socket: the official client, disconnects, keys, server-sent events."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import uvicorn
from openai import AsyncOpenAI

from deployments.auth import ApiKeys, KeyFileError
from deployments.errors import ErrorInfo, ServiceError
from tests.bad_requests import CHAT, CONVERSATIONS
from tests.fake_turns import MODEL, Front, Script, make_front

KEY, OTHER_KEY = "sk-alice", "sk-bob"
HI: Any = [{"role": "user", "content": "Hi"}]
PATIENCE_S = 20.0


@dataclass(slots=True)
class Server:
    front: Front
    url: str
    port: int

    def client(self, key: str = "any", **options: Any) -> AsyncOpenAI:
        return AsyncOpenAI(base_url=f"{self.url}/v1", api_key=key, **{"max_retries": 0, **options})

    def http(self) -> httpx.AsyncClient:
        return httpx.AsyncClient(base_url=self.url)


@contextlib.asynccontextmanager
async def serving(front: Front, keys: ApiKeys | None = None) -> AsyncIterator[Server]:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = listener.getsockname()[1]
        config = uvicorn.Config(front.app(keys), log_level="error", timeout_graceful_shutdown=1)
        server = uvicorn.Server(config)
        with contextlib.ExitStack() as stack:
            # Signals belong to pytest.
            stack.enter_context(pytest.MonkeyPatch.context()).setattr(
                server, "capture_signals", contextlib.nullcontext
            )
            task = asyncio.create_task(server.serve(sockets=[listener]))
            try:
                yield Server(front, f"http://127.0.0.1:{port}", port)
            finally:
                server.should_exit = True
                await task


@pytest.fixture
async def server() -> AsyncIterator[Server]:
    async with serving(make_front()) as running:
        yield running


async def eventually(condition: Callable[[], Awaitable[bool]]) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while not await condition():  # noqa: ASYNC110 - seen over HTTP, nothing to wait on
            await asyncio.sleep(0.005)


async def turn_aborted(front: Front) -> None:
    async def aborted() -> bool:
        return len(front.engine.aborted) == 1

    await eventually(aborted)


async def metrics_say(http: httpx.AsyncClient, line: str) -> None:
    async def found() -> bool:
        return line in (await http.get("/metrics")).text

    await eventually(found)


async def events_of(response: httpx.Response) -> list[str]:
    text = (await response.aread()).decode()
    assert text.endswith("\n\n")
    events = []
    for event in text.removesuffix("\n\n").split("\n\n"):
        *head, data = event.split("\n")
        assert data.startswith("data: ")
        assert all(line.startswith("id: ") for line in head)
        events.append(data.removeprefix("data: "))
    return events


# The official client.


async def test_chat(server: Server) -> None:
    async with server.client() as client:
        reply = await client.chat.completions.create(model=MODEL, messages=HI)
        assert reply.choices[0].message.content == "Good day."
        assert reply.choices[0].message.role == "assistant"
        assert reply.choices[0].finish_reason == "stop"
        assert reply.usage is not None
        assert reply.usage.total_tokens == reply.usage.prompt_tokens + 9
        assert reply.usage.prompt_tokens_details is not None
        assert reply.usage.prompt_tokens_details.cached_tokens == 0
        assert reply.model_extra is not None
        assert reply.model_extra["conversation"]["turn"] == 1
        assert reply._request_id is not None


async def test_a_client_that_keeps_its_own_history(server: Server) -> None:
    """Zero changes: the client appends the message object it got and sends everything again."""
    history: list[Any] = [{"role": "system", "content": "Be brief."}]
    async with server.client() as client:
        for turn in range(1, 4):
            history.append({"role": "user", "content": f"question {turn}"})
            reply = await client.chat.completions.create(model=MODEL, messages=history)
            history.append(reply.choices[0].message)
            assert reply.model_extra is not None
            assert reply.model_extra["conversation"]["turn"] == turn


async def test_raw_headers_and_naming_the_conversation(server: Server) -> None:
    async with server.client() as client:
        create = client.chat.completions.with_raw_response.create
        first = await create(model=MODEL, messages=HI)
        named = first.headers["x-conversation-id"]
        etag = first.headers["etag"]
        by_body = await create(model=MODEL, messages=HI, extra_body={"conversation": named})
        assert by_body.headers["x-conversation-id"] == named
        with pytest.raises(openai.ConflictError, match="turn 2"):
            await create(
                model=MODEL,
                messages=HI,
                extra_headers={"X-Conversation-Id": named, "If-Match": etag},
            )
        by_header = await create(
            model=MODEL,
            messages=HI,
            extra_headers={"X-Conversation-Id": named, "If-Match": by_body.headers["etag"]},
        )
        body = json.loads(by_header.text)
        assert body["conversation"]["turn"] == 3
        assert by_header.headers["etag"] == f'"{body["conversation"]["etag"]}"'


async def test_streaming(server: Server) -> None:
    server.front.engine.scripts.append(Script("h\u00e9llo \U0001f600"))
    async with server.client() as client:
        stream = await client.chat.completions.create(
            model=MODEL, messages=HI, stream=True, stream_options={"include_usage": True}
        )
        chunks = [chunk async for chunk in stream]
    deltas = [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices]
    assert "".join(deltas) == "h\u00e9llo \U0001f600"
    assert len([delta for delta in deltas if delta]) == 7
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 11
    assert chunks[-2].choices[0].finish_reason == "stop"


async def test_the_stream_helper_of_the_client(server: Server) -> None:
    async with (
        server.client() as client,
        client.chat.completions.stream(model=MODEL, messages=HI) as stream,
    ):
        final = await stream.get_final_completion()
    assert final.choices[0].message.content == "Good day."


async def test_logprobs(server: Server) -> None:
    async with server.client() as client:
        reply = await client.chat.completions.create(
            model=MODEL, messages=HI, logprobs=True, top_logprobs=3
        )
    block = reply.choices[0].logprobs
    assert block is not None
    assert block.content is not None
    assert "".join(entry.token for entry in block.content) == "Good day."
    assert [len(entry.top_logprobs) for entry in block.content] == [3] * 9


@pytest.mark.parametrize(
    ("info", "kind", "status"),
    [
        (ErrorInfo("overloaded", "full", retry_after_s=2.2), openai.RateLimitError, 429),
        (ErrorInfo("conversation_not_found", "gone"), openai.NotFoundError, 404),
        (ErrorInfo("timeout", "late"), openai.InternalServerError, 504),
        (ErrorInfo("replica_lost", "gone"), openai.InternalServerError, 503),
        (ErrorInfo("turn_failed", "NaN"), openai.InternalServerError, 500),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
async def test_refusals_have_their_status_even_for_streams(
    server: Server, info: ErrorInfo, kind: type[openai.APIStatusError], status: int, stream: bool
) -> None:
    # What may pass is tried again first.
    server.front.engine.scripts.extend(Script(refuse=info) for _ in range(9))
    async with server.client() as client:
        with pytest.raises(kind) as caught:
            await client.chat.completions.create(model=MODEL, messages=HI, stream=stream)
    error = caught.value
    assert (error.status_code, error.code, error.param) == (status, info.code, None)
    assert error.type == info.kind.type
    retry = error.response.headers.get("retry-after")
    assert retry == {"overloaded": "3", "replica_lost": "1"}.get(info.code)
    assert error.response.headers["x-should-retry"] == ("true" if retry else "false")


async def test_bad_requests_through_the_client(server: Server) -> None:
    async with server.client() as client:
        with pytest.raises(openai.NotFoundError) as missing:
            await client.chat.completions.create(model="gpt-4o", messages=HI)
        assert missing.value.code == "model_not_found"
        with pytest.raises(openai.BadRequestError) as bad:
            await client.chat.completions.create(model=MODEL, messages=HI, n=3)
        assert (bad.value.code, bad.value.param) == ("unsupported_value", "n")


async def test_the_client_repeats_what_is_worth_repeating(server: Server) -> None:
    server.front.engine.scripts.extend(
        [Script(refuse=ErrorInfo("overloaded", "full")), Script("second try")]
    )
    async with server.client(max_retries=1) as client:
        reply = await client.chat.completions.create(model=MODEL, messages=HI)
        assert reply.choices[0].message.content == "second try"
        server.front.engine.scripts.append(Script(refuse=ErrorInfo("turn_failed", "NaN")))
        with pytest.raises(openai.InternalServerError):
            await client.chat.completions.create(model=MODEL, messages=HI)
    assert len(server.front.engine.calls) == 3


async def test_a_stream_that_fails_midway_is_no_whole_reply(server: Server) -> None:
    fails = ErrorInfo("turn_failed", "The turn failed.")
    server.front.engine.scripts.extend([Script(fail=fails), Script(fail=RuntimeError("boom"))])
    async with server.client() as client:
        stream = await client.chat.completions.create(model=MODEL, messages=HI, stream=True)
        with pytest.raises(openai.APIError, match="The turn failed"):
            [chunk async for chunk in stream]
    async with server.http() as http:
        body = {"model": MODEL, "messages": HI, "stream": True}
        events = await events_of(await http.post(CHAT, json=body))
    assert json.loads(events[-1])["error"]["code"] == "internal_error"
    assert "boom" not in events[-1]
    assert "[DONE]" not in events


async def test_a_client_timeout_cancels_the_turn(server: Server) -> None:
    server.front.engine.scripts.append(Script(gate=asyncio.Event()))
    async with server.client(timeout=0.2) as client:
        with pytest.raises(openai.APITimeoutError):
            await client.chat.completions.create(model=MODEL, messages=HI)
    await turn_aborted(server.front)


async def test_models_and_conversations_through_the_client(server: Server) -> None:
    async with server.client() as client:
        assert [model.id async for model in client.models.list()] == [MODEL]
        assert (await client.models.retrieve(MODEL)).owned_by == "sinkserve"
        made = await client.conversations.create(metadata={"topic": "x"})
        assert made.metadata == {"topic": "x"}
        assert (await client.conversations.retrieve(made.id)).id == made.id
        assert (await client.conversations.delete(made.id)).deleted
        with pytest.raises(openai.NotFoundError):
            await client.conversations.retrieve(made.id)


async def test_many_streams_at_once(server: Server) -> None:
    server.front.engine.scripts.extend(Script(f"reply {i} \u20ac") for i in range(30))

    async def one(client: AsyncOpenAI) -> str:
        stream = await client.chat.completions.create(model=MODEL, messages=HI, stream=True)
        return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

    async with server.client() as client:
        texts = await asyncio.gather(*[one(client) for _ in range(30)])
    assert sorted(texts) == sorted(f"reply {i} \u20ac" for i in range(30))


# Clients that go away.


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("where", ["accept_gate", "gate"])
async def test_a_disconnect_cancels_the_turn(server: Server, stream: bool, where: str) -> None:
    """Before acceptance, in the middle, and whether or not anything is being sent."""
    script = Script()
    setattr(script, where, asyncio.Event())
    server.front.engine.scripts.append(script)
    body = json.dumps({"model": MODEL, "messages": HI, "stream": stream}).encode()
    _, writer = await asyncio.open_connection("127.0.0.1", server.port)
    head = f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    writer.write(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
    await script.at_gate.wait()
    writer.close()
    if where == "gate":
        await turn_aborted(server.front)
    async with server.http() as http:

        async def forgotten() -> bool:
            return not (await http.get(CONVERSATIONS)).json()["data"]

        await eventually(forgotten)
        await metrics_say(http, 'running_turns{ingress="0"} 0.0')


async def test_a_disconnect_in_the_middle_of_the_body(server: Server) -> None:
    _, writer = await asyncio.open_connection("127.0.0.1", server.port)
    writer.write(
        f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        "Content-Length: 1000\r\n\r\n{".encode()
    )
    await writer.drain()
    writer.close()
    async with server.http() as http:
        await metrics_say(http, 'status="499"')


async def test_a_client_that_stops_reading_is_given_up() -> None:
    front = make_front(stall_timeout_s=0.2)
    front.engine.durability = "turn"
    front.engine.scripts.append(Script("x" * 60_000, gate=asyncio.Event(), gate_at=59_000))
    body = json.dumps({"model": MODEL, "messages": HI, "stream": True}).encode()
    async with serving(front) as server:
        _, writer = await asyncio.open_connection("127.0.0.1", server.port, limit=1024)
        head = f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        writer.write(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        await turn_aborted(front)
        writer.close()


# Plain HTTP.


async def test_events_of_a_stream(server: Server) -> None:
    async with server.http() as http:
        response = await http.post(CHAT, json={"model": MODEL, "messages": HI, "stream": True})
        assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
        assert response.headers["x-conversation-id"].startswith("conv_")
        assert response.headers["x-request-id"].startswith("req_")
        events = await events_of(response)
    assert events[-1] == "[DONE]"
    chunks = [json.loads(event) for event in events[:-1]]
    assert chunks[0]["conversation"]["id"] == response.headers["x-conversation-id"]
    assert len(chunks[-1]["conversation"]["etag"]) == 64
    assert all("usage" not in chunk for chunk in chunks)


async def test_a_body_that_is_too_large_gets_its_answer(server: Server) -> None:
    limit = server.front.service.config.max_body_bytes
    async with server.http() as http:
        response = await http.post(
            CHAT, content=b" " * (limit + 1), headers={"Content-Type": "application/json"}
        )
        assert response.status_code == 413
        assert response.json()["error"]["code"] == "request_too_large"


async def test_methods_health_and_metrics(server: Server) -> None:
    async with server.http() as http:
        wrong = await http.delete(CONVERSATIONS)
        assert (wrong.status_code, wrong.headers["allow"]) == (405, "POST, GET")
        assert (await http.head("/healthz")).status_code == 200
        server.front.engine.up = False
        down = await http.get("/healthz")
        assert down.status_code == 503
        assert down.json()["error"]["code"] == "not_ready"
        server.front.engine.up = True
        await http.post(CHAT, json={"model": MODEL, "messages": HI})
        await http.post(CHAT, json={"model": MODEL, "messages": HI, "nn": 1})
        metrics = await http.get("/metrics")
    assert metrics.headers["content-type"].startswith("text/plain; version=0.0.4")
    for line in (
        f'sinkserve_http_requests_total{{ingress="0",route="{CHAT}",status="200"}} 1.0',
        f'sinkserve_http_requests_total{{ingress="0",route="{CHAT}",status="400"}} 1.0',
        'sinkserve_errors_total{code="unknown_field",ingress="0"} 1.0',
        'sinkserve_turns_total{finish_reason="stop",ingress="0",recovery="none"} 1.0',
        'sinkserve_tokens_total{ingress="0",kind="output"} 9.0',
        'sinkserve_first_token_seconds_count{ingress="0"} 1.0',
        'sinkserve_replica_free_slots{replica="replica-a"} 3.0',
    ):
        assert line in metrics.text.splitlines()


async def test_a_fault_of_ours_is_a_500_in_shape(server: Server) -> None:
    def broken(_: Any) -> Any:
        raise RuntimeError("secret detail")

    server.front.service.parse = broken  # type: ignore[assignment, method-assign]
    async with server.http() as http:
        response = await http.post(CHAT, json={"model": MODEL, "messages": HI})
    assert response.status_code == 500
    assert response.json()["error"]["code"] == "internal_error"
    assert "secret" not in response.text
    assert response.headers["x-request-id"] in response.json()["error"]["message"]


# Keys.


def key_file(folder: Path, *lines: str) -> Path:
    path = folder / "keys"
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def digest(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()


async def test_keys_separate_tenants(tmp_path: Path) -> None:
    path = key_file(
        tmp_path, "# two people", "", f"{digest(KEY)} alice", f"{digest(OTHER_KEY)} bob # old"
    )
    async with serving(make_front(), ApiKeys.load(path)) as server:
        async with server.client(KEY) as alice, server.client(OTHER_KEY) as bob:
            made = await alice.conversations.create()
            with pytest.raises(openai.NotFoundError):
                await bob.conversations.retrieve(made.id)
            assert (await alice.conversations.retrieve(made.id)).id == made.id
        for header in (None, "Bearer", "Bearer wrong", f"Basic {KEY}", f"Bearer {KEY}x", KEY):
            async with server.http() as http:
                headers = {} if header is None else {"Authorization": header}
                response = await http.get(CONVERSATIONS, headers=headers)
                assert response.status_code == 401, header
                assert response.json()["error"]["code"] == "invalid_api_key"
                assert response.headers["www-authenticate"] == "Bearer"
        async with server.http() as http:
            assert (await http.get("/healthz")).status_code == 200


@pytest.mark.parametrize(
    "lines",
    [
        [],
        ["# nothing"],
        ["secret alice"],
        [f"{'A' * 64} alice"],
        [f"{'a' * 64}"],
        [f"{'a' * 64} Alice!"],
        [f"{'a' * 64} alice bob"],
        [f"{'a' * 64} alice", f"{'a' * 64} bob"],
    ],
)
def test_key_files_that_are_none(tmp_path: Path, lines: list[str]) -> None:
    with pytest.raises(KeyFileError):
        ApiKeys.load(key_file(tmp_path, *lines))


def test_without_keys_everyone_is_the_default_tenant() -> None:
    assert {ApiKeys().tenant(header) for header in (None, "", "Bearer x", "nonsense")} == {
        "default"
    }


def test_errors_survive_pickling() -> None:
    """Ray pickles what a handle raises."""
    import pickle

    error = ServiceError(ErrorInfo("overloaded", "full", "x", 2.0))
    again = pickle.loads(pickle.dumps(error))  # noqa: S301 - our own bytes
    assert again.info == error.info
    assert str(again) == "overloaded (x): full"
