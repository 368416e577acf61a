"""The chaos client against a server that breaks: what it logs, and how it comes again."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from benchmarks.chaos.client import ChaosClient, ClientOptions, SseReader
from benchmarks.chaos.oracle import Asked

Request = tuple[dict[str, str], dict[str, object]]
TEXT = "abcdefghij"
ASKED = Asked("hello", 20, seed=1)


def event(chars: int, delta: str = "", finish: str | None = None) -> bytes:
    choice = {"index": 0, "delta": {"content": delta}, "finish_reason": finish}
    chunk = {"choices": [choice], "conversation": {"id": "conv", "turn": 1, "etag": "e"}}
    return f"id: 1.{chars}\ndata: {json.dumps(chunk)}\n\n".encode()


@asynccontextmanager
async def server(
    *answers: Callable[[Request], list[bytes]],
) -> AsyncIterator[tuple[str, list[Request]]]:
    """Its URL and what it was asked. Each request gets the next answer's bytes, then it hangs up."""
    requests: list[Request] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        lines = [line.split(": ", 1) for line in head.split("\r\n")[1:] if line]
        headers = {name.lower(): value for name, value in lines}
        body = json.loads(await reader.readexactly(int(headers["content-length"])))
        requests.append((headers, body))
        for data in answers[len(requests) - 1](requests[-1]):
            writer.write(data)
            await writer.drain()
        writer.close()

    running = await asyncio.start_server(serve, "127.0.0.1", 0)
    try:
        port = running.sockets[0].getsockname()[1]
        yield f"http://127.0.0.1:{port}", requests
    finally:
        running.close()


STREAM = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"


def chunked(*parts: bytes) -> list[bytes]:
    return [f"{len(part):x}\r\n".encode() + part + b"\r\n" for part in parts]


def refused(status: str, code: str) -> list[bytes]:
    body = json.dumps({"error": {"code": code, "message": "no"}}).encode()
    return [f"HTTP/1.1 {status}\r\ncontent-length: {len(body)}\r\n\r\n".encode() + body]


def from_where(request: Request) -> int:
    return int(request[0].get("last-event-id", "1.0").split(".")[1])


def until(end: int, cut: bool) -> Callable[[Request], list[bytes]]:
    def answer(request: Request) -> list[bytes]:
        start = from_where(request)
        events = [event(n + 1, TEXT[n]) for n in range(start, end)]
        if cut:
            return [STREAM, *chunked(*events)]
        ending = chunked(event(end, "", "stop"), b"data: [DONE]\n\n")
        return [STREAM, *chunked(*events), *ending, b"0\r\n\r\n"]

    return answer


async def test_a_cut_stream_goes_on_where_it_stopped() -> None:
    answers = [until(4, cut=True), lambda _: refused("503 Busy", "replica_lost"), until(10, False)]
    async with server(*answers) as (url, requests):
        client = ChaosClient(ClientOptions(url), lambda _: None)
        log = await client.say(ASKED)
    assert log.text == TEXT
    assert (log.is_done, log.finish_reason, log.turn, log.etag) == (True, "stop", 1, "e")
    assert [attempt.ending for attempt in log.attempts] == ["cut", "refused", "done"]
    assert [headers.get("last-event-id") for headers, _ in requests] == [None, "1.4", "1.4"]
    assert len({headers["idempotency-key"] for headers, _ in requests}) == 1
    assert all(body == requests[0][1] for _, body in requests)
    assert [n for _, n in log.event_ids] == [*range(1, 11), 10]


async def test_a_final_error_is_not_repeated() -> None:
    async with server(lambda _: refused("500 Dead", "turn_quarantined")) as (url, requests):
        client = ChaosClient(ClientOptions(url), lambda _: None)
        log = await client.say(ASKED)
    assert (log.is_done, log.error, len(requests)) == (False, "turn_quarantined", 1)


async def test_a_client_without_patience_sends_once() -> None:
    async with server(until(4, cut=True)) as (url, _):
        options = ClientOptions(url, resumes=False)
        log = await ChaosClient(options, lambda _: None).say(ASKED)
    assert (log.is_done, log.error, log.text) == (False, "cut", TEXT[:4])


async def test_every_byte_is_logged() -> None:
    async with server(until(10, False)) as (url, _):
        client = ChaosClient(ClientOptions(url), lambda _: None)
        log = await client.say(ASKED)
    (attempt,) = log.attempts
    logged = b"".join(data for _, data in attempt.pieces)
    sent = [*(event(n + 1, TEXT[n]) for n in range(10)), event(10, "", "stop"), b"data: [DONE]\n\n"]
    assert logged == b"".join(sent)


def test_events_are_whole_however_the_bytes_come() -> None:
    data = event(1, "a") + event(2, "b") + b": a comment\n\n" + b"data: [DONE]\n\n"
    for size in range(1, len(data)):
        reader = SseReader()
        events = [
            one
            for start in range(0, len(data), size)
            for one in reader.push(data[start : start + size])
        ]
        assert [event_id for event_id, _ in events] == ["1.1", "1.2", "1.2"]
        assert events[-1][1] == "[DONE]"
