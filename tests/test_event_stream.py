"""When the parts of a streamed response leave: what a client sees is in test_ingress_http.py."""

from __future__ import annotations

import asyncio

import pytest
from starlette.types import Message

from deployments import event_stream
from deployments.event_stream import ClientGone, EventStream
from tests.fake_turns import Script, make_front


class Sent:
    """A server that notes what it is to send."""

    def __init__(self) -> None:
        self.messages: list[Message] = []
        self.opened = asyncio.Event()

    async def __call__(self, message: Message) -> None:
        self.messages.append(message)
        if b'"role"' in message.get("body", b""):
            self.opened.set()

    @property
    def body(self) -> bytes:
        return b"".join(message.get("body", b"") for message in self.messages)


async def stream_of(script: Script) -> EventStream:
    front = make_front()
    front.engine.scripts.append(script)
    request = front.service.parse(
        {"model": "toy", "messages": [{"role": "user", "content": "a"}], "stream": True}
    )
    turn = await front.service.open_turn(request, "default")
    gone = asyncio.create_task(asyncio.sleep(3600))
    return EventStream(turn, "none", gone, 5.0, {})


async def receive() -> Message:
    raise AssertionError("nothing is received here")


async def test_the_opening_waits_for_the_first_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(event_stream, "OPENING_WAIT_S", 3600.0)
    script = Script(gate=asyncio.Event(), gate_at=0)
    sent = Sent()
    running = asyncio.create_task((await stream_of(script))({"type": "http"}, receive, sent))
    await script.at_gate.wait()
    await asyncio.sleep(0)
    assert sent.messages == []
    assert script.gate is not None
    script.gate.set()
    await running
    assert sent.messages[0]["type"] == "http.response.start"
    assert sent.body.index(b'"role"') < sent.body.index(b'"content":"G"')
    assert sent.body.endswith(b"data: [DONE]\n\n")


async def test_a_late_text_does_not_hold_up_the_opening(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(event_stream, "OPENING_WAIT_S", 0.0)
    script = Script(gate=asyncio.Event(), gate_at=0)
    sent = Sent()
    running = asyncio.create_task((await stream_of(script))({"type": "http"}, receive, sent))
    await sent.opened.wait()
    assert not running.done()
    assert script.gate is not None
    script.gate.set()
    await running
    assert sent.body.endswith(b"data: [DONE]\n\n")


async def test_a_client_that_leaves_before_the_first_text_ends_the_turn() -> None:
    script = Script(gate=asyncio.Event(), gate_at=0)
    stream = await stream_of(script)
    running = asyncio.create_task(stream({"type": "http"}, receive, Sent()))
    await asyncio.sleep(0.01)
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    assert stream._turn._closed  # type: ignore[attr-defined]


async def test_a_connection_that_breaks_while_sending_is_a_client_gone() -> None:
    async def broken(message: Message) -> None:
        raise OSError("broken pipe")

    with pytest.raises(ClientGone):
        await (await stream_of(Script()))({"type": "http"}, receive, broken)
