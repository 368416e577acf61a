"""A reply as server-sent events, and what happens when its reader goes away."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator, Coroutine, Mapping
from typing import Any, TypeVar

from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from deployments.errors import ServiceError
from deployments.http_io import dump_json, internal_error_info
from deployments.openai_reply import StreamUsage
from deployments.rejoin import ReplyStream

log = logging.getLogger(__name__)

T = TypeVar("T")

OPENING_WAIT_S = 0.25


class ClientGone(Exception):
    """Nobody is left to answer."""


class EventStream(Response):
    """A reply as server-sent events.

    Each has an id: after a break of the connection, whoever sends it back as `Last-Event-ID` gets what
    follows. A turn that fails midway ends with `data: {"error": ...}` and without `[DONE]`: the official
    clients raise on it, and no client can take it for a whole reply.
    """

    def __init__(
        self,
        turn: ReplyStream,
        usage: StreamUsage,
        gone: asyncio.Task[None],
        stall_timeout_s: float,
        headers: Mapping[str, str],
    ) -> None:
        super().__init__(headers=headers, media_type="text/event-stream")
        del self.headers["content-length"]
        self.headers["Cache-Control"] = "no-cache"
        self.headers["X-Accel-Buffering"] = "no"
        self._turn = turn
        self._usage = usage
        self._gone = gone
        self._stall_timeout_s = stall_timeout_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await while_connected(self._gone, self._send_all(send))
        finally:
            self._gone.cancel()
            await self._turn.close()

    async def _send_all(self, send: Send) -> None:
        """Headers and the opening go out together with the first text, if that comes soon: on the way to
        the client one message then takes the place of two."""
        messages = self._messages()
        coming: asyncio.Task[Message] | None = None
        try:
            async with contextlib.aclosing(messages):
                opening = [await anext(messages), await anext(messages)]
                coming = asyncio.ensure_future(anext(messages))
                await asyncio.wait({coming}, timeout=OPENING_WAIT_S)
                for message in opening:
                    await self._send(send, message)
                await self._send(send, await coming)
                async for message in messages:
                    await self._send(send, message)
        except OSError:
            raise ClientGone from None
        finally:
            if coming is not None and not coming.done():
                coming.cancel()
                await asyncio.wait({coming})

    async def _messages(self) -> AsyncGenerator[Message, None]:
        """The whole response: its start, at least one event, its end."""
        yield {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
        chunks = self._turn.chunks(self._usage)
        try:
            async with contextlib.aclosing(chunks):
                async for chunk in chunks:
                    yield _event(chunk)
            yield _body(b"data: [DONE]\n\n")
        except ServiceError as error:
            self._turn.metrics.failed(error.info.code)
            yield _event(error.info.body())
        except Exception:
            log.exception("a stream failed")
            self._turn.metrics.failed("internal_error")
            info = internal_error_info(self._turn.head.completion_id)
            yield _event(info.body())
        yield _body(b"", more=False)

    async def _send(self, send: Send, message: Message) -> None:
        """A client that stops reading is given up after a while."""
        try:
            async with asyncio.timeout(self._stall_timeout_s):
                await send(message)
        except TimeoutError:
            raise ClientGone from None


async def while_connected(gone: asyncio.Task[None], work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`; when `gone` ends first, or this task is cancelled, `work` is cancelled
    and has ended before this returns. Raises ClientGone."""
    task = asyncio.ensure_future(work)
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ClientGone
    finally:
        if not task.done():
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)


async def disconnected(receive: Receive) -> None:
    """Returns once the client is gone."""
    while (await receive())["type"] != "http.disconnect":
        pass


def _event(value: Mapping[str, Any]) -> Message:
    """The chunk's `event_id`, where it has one, goes into the event's own."""
    fields = dict(value)
    event_id = fields.pop("event_id", None)
    head = b"" if event_id is None else b"id: " + str(event_id).encode() + b"\n"
    return _body(head + b"data: " + dump_json(fields) + b"\n\n")


def _body(data: bytes, more: bool = True) -> Message:
    return {"type": "http.response.body", "body": data, "more_body": more}
