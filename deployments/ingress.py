"""HTTP over `ChatService`: a plain Starlette app, with nothing of Ray in it.

In Ray Serve the ingress deployment builds it late, when its service exists:

    @serve.deployment
    @serve.ingress()
    class Ingress:
        def __serve_build_asgi_app__(self):
            return create_app(self.service, self.keys)

A turn lives as long as its connection. The disconnect message is awaited beside the turn, and servers
that cancel the request instead (Ray Serve's proxies) reach the same place: the turn's generator is
closed, which cancels it on its replica.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import math
import secrets
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from typing import Any, TypeVar

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from deployments.auth import ApiKeys
from deployments.chat_service import ChatService
from deployments.errors import ErrorInfo, ServiceError
from deployments.metrics import CONTENT_TYPE
from deployments.open_turn import OpenTurn
from deployments.openai_reply import StreamUsage
from deployments.openai_schema import apply_headers
from deployments.strict_json import decode_json, refuse, shown

log = logging.getLogger(__name__)

T = TypeVar("T")
Handler = Callable[[Request, str], Awaitable[Response]]

CLIENT_GONE = 499
_DRAIN_FACTOR = 4
_MAX_PAGE = 100


class ClientGone(Exception):
    """Nobody is left to answer."""


def create_app(service: ChatService, keys: ApiKeys | None = None) -> Starlette:
    """The whole HTTP API. Without keys every request belongs to the tenant "default"."""
    api = _Api(service)
    endpoints: dict[str, dict[str, Handler]] = {
        "/v1/chat/completions": {"POST": api.chat},
        "/v1/conversations": {"POST": api.create_conversation, "GET": api.list_conversations},
        "/v1/conversations/{conversation_id}": {
            "GET": api.get_conversation,
            "DELETE": api.delete_conversation,
        },
        "/v1/conversations/{conversation_id}/transcript": {"GET": api.transcript},
        "/v1/models": {"GET": api.models},
        "/v1/models/{model:path}": {"GET": api.model},
        "/healthz": {"GET": api.health},
        "/metrics": {"GET": api.metrics},
    }
    keys = keys or ApiKeys()
    routes = [
        Route(path, _Endpoint(path, service, handlers, keys if path.startswith("/v1/") else None))
        for path, handlers in endpoints.items()
    ]
    app = Starlette(routes=routes, exception_handlers={HTTPException: _framework_error})
    app.router.redirect_slashes = False
    return app


class _Api:
    """One method per endpoint: reads the request, calls the service, shapes the answer."""

    def __init__(self, service: ChatService) -> None:
        self._service = service

    async def chat(self, request: Request, tenant: str) -> Response:
        service = self._service
        chat = apply_headers(
            service.parse(await self._body(request)),
            request.headers.get("x-conversation-id"),
            request.headers.get("if-match"),
        )
        gone = asyncio.create_task(_disconnected(request.receive))
        opened: list[OpenTurn] = []

        async def open_turn() -> OpenTurn:
            opened.append(await service.open_turn(chat, tenant))
            return opened[0]

        try:
            turn = await while_connected(gone, open_turn())
            headers = {"X-Conversation-Id": turn.head.conversation_id}
            if chat.stream:
                return EventStream(turn, chat.usage, gone, service.config.stall_timeout_s, headers)
            reply = await while_connected(gone, turn.completion())
            gone.cancel()
            return json_response(reply, headers=headers | _etag(reply["conversation"]["etag"]))
        except BaseException:
            # A turn that was opened as the client went is nobody else's to close.
            gone.cancel()
            for turn in opened:
                await turn.close()
            raise

    async def create_conversation(self, request: Request, tenant: str) -> Response:
        shown = await self._service.create_conversation(await self._body(request), tenant)
        location = {"Location": f"/v1/conversations/{shown['id']}"}
        return json_response(shown, headers=location | _etag(shown["etag"]))

    async def list_conversations(self, request: Request, tenant: str) -> Response:
        query = _query(request, "limit", "after")
        limit = _count(query, "limit", 20, 1, _MAX_PAGE)
        page = await self._service.list_conversations(tenant, limit, query.get("after", ""))
        return json_response(page)

    async def get_conversation(self, request: Request, tenant: str) -> Response:
        conversation_id = request.path_params["conversation_id"]
        shown = await self._service.get_conversation(conversation_id, tenant)
        return json_response(shown, headers=_etag(shown["etag"]))

    async def transcript(self, request: Request, tenant: str) -> Response:
        query = _query(request, "limit", "before")
        limit = _count(query, "limit", _MAX_PAGE, 1, _MAX_PAGE)
        before = _count(query, "before", -1, 0, 2**53)
        page = await self._service.transcript(
            request.path_params["conversation_id"], tenant, limit, None if before < 0 else before
        )
        return json_response(page)

    async def delete_conversation(self, request: Request, tenant: str) -> Response:
        conversation_id = request.path_params["conversation_id"]
        return json_response(await self._service.delete_conversation(conversation_id, tenant))

    async def models(self, request: Request, tenant: str) -> Response:
        return json_response(self._service.models())

    async def model(self, request: Request, tenant: str) -> Response:
        return json_response(self._service.model(request.path_params["model"]))

    async def health(self, request: Request, tenant: str) -> Response:
        ready, detail = await self._service.health()
        return json_response(detail, status=200 if ready else 503)

    async def metrics(self, request: Request, tenant: str) -> Response:
        return Response(await self._service.metrics_text(), media_type=CONTENT_TYPE)

    async def _body(self, request: Request) -> object:
        _check_content_type(request)
        limit = self._service.config.max_body_bytes
        return decode_json(await _read(request, limit), limit)


class _Endpoint:
    """An ASGI app for one path: method, key, handler; every failure in OpenAI's shape."""

    def __init__(
        self, path: str, service: ChatService, handlers: dict[str, Handler], keys: ApiKeys | None
    ) -> None:
        self._path = path
        self._service = service
        self._handlers = handlers
        self._keys = keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request_id = f"req_{secrets.token_hex(12)}"
        status = CLIENT_GONE
        try:
            response = await self._respond(Request(scope, receive), request_id)
            response.headers["X-Request-Id"] = request_id
            status = response.status_code
            await response(scope, receive, send)
        except (ClientGone, ClientDisconnect):
            status = CLIENT_GONE
        finally:
            self._service.metrics.http_request(self._path, status)

    async def _respond(self, request: Request, request_id: str) -> Response:
        try:
            handler = self._handlers.get("GET" if request.method == "HEAD" else request.method)
            if handler is None:
                raise ServiceError(_method_info(request.method))
            tenant = ""
            if self._keys is not None:
                tenant = self._keys.tenant(request.headers.get("authorization"))
            return await handler(request, tenant)
        except ServiceError as error:
            self._service.metrics.failed(error.info.code)
            response = error_response(error.info)
            if error.info.code == "method_not_allowed":
                response.headers["Allow"] = ", ".join(self._handlers)
            return response
        except (ClientGone, ClientDisconnect):
            raise
        except Exception:
            log.exception("request %s failed", request_id)
            self._service.metrics.failed("internal_error")
            return error_response(_internal_info(request_id))


class EventStream(Response):
    """A reply as server-sent events.

    A turn that fails midway ends with `data: {"error": ...}` and without `[DONE]`: the official
    clients raise on it, and no client can take it for a whole reply.
    """

    def __init__(
        self,
        turn: OpenTurn,
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
        start = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
        await self._send(send, start)
        chunks = self._turn.chunks(self._usage)
        try:
            async with contextlib.aclosing(chunks):
                async for chunk in chunks:
                    await self._send(send, _event(chunk))
            await self._send(send, _body(b"data: [DONE]\n\n"))
        except ServiceError as error:
            self._turn.metrics.failed(error.info.code)
            await self._send(send, _event(error.info.body()))
        except (ClientGone, OSError):
            raise ClientGone from None
        except Exception:
            log.exception("a stream failed")
            self._turn.metrics.failed("internal_error")
            info = _internal_info(self._turn.head.completion_id)
            await self._send(send, _event(info.body()))
        await self._send(send, _body(b"", more=False))

    async def _send(self, send: Send, message: dict[str, Any]) -> None:
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


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _read(request: Request, limit: int) -> bytes:
    """The body. Some of a body that is too large is still read, or its sender sees no answer."""
    parts: list[bytes] = []
    size = 0
    async for part in request.stream():
        size += len(part)
        if size <= limit:
            parts.append(part)
        elif size > _DRAIN_FACTOR * limit:
            break
    if size > limit:
        refuse("request_too_large", f"The body has more than {limit} bytes.")
    return b"".join(parts)


def _check_content_type(request: Request) -> None:
    kind, *parameters = request.headers.get("content-type", "").lower().split(";")
    if kind.strip() != "application/json":
        message = "Send JSON with the header `Content-Type: application/json`."
        refuse("unsupported_media_type", message)
    for parameter in parameters:
        name, _, value = parameter.strip().partition("=")
        if name == "charset" and value.strip('"') not in ("utf-8", "utf8"):
            refuse("unsupported_media_type", "The charset must be utf-8.")
    if request.headers.get("content-encoding", "identity").lower() != "identity":
        refuse("unsupported_media_type", "Send the body without Content-Encoding.")


def _query(request: Request, *known: str) -> dict[str, str]:
    values: dict[str, str] = {}
    for name, value in request.query_params.multi_items():
        if name not in known:
            refuse("unknown_field", f"The parameter {shown(name)!r} is not known.", shown(name))
        if name in values:
            refuse("duplicate_key", "The parameter is given twice.", name)
        values[name] = value
    return values


def _count(query: Mapping[str, str], name: str, default: int, low: int, high: int) -> int:
    text = query.get(name)
    if text is None:
        return default
    if not (text.isascii() and text.isdigit() and len(text) <= 16):
        refuse("invalid_type", "Expected an integer.", name)
    if not low <= int(text) <= high:
        refuse("invalid_value", f"Must be from {low} to {high}.", name)
    return int(text)


def _etag(head: str) -> dict[str, str]:
    return {"ETag": f'"{head}"'}


def _dump(value: Mapping[str, Any]) -> bytes:
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text.encode()


def _event(value: Mapping[str, Any]) -> dict[str, Any]:
    return _body(b"data: " + _dump(value) + b"\n\n")


def _body(data: bytes, more: bool = True) -> dict[str, Any]:
    return {"type": "http.response.body", "body": data, "more_body": more}


def json_response(
    value: Mapping[str, Any], status: int = 200, headers: Mapping[str, str] | None = None
) -> Response:
    """A JSON body as UTF-8."""
    return Response(_dump(value), status, headers, media_type="application/json")


def error_response(info: ErrorInfo) -> Response:
    """An error of the table. Only errors with Retry-After are worth repeating, and say so to the
    official clients, which otherwise repeat every 409 and 5xx."""
    retry_after_s = info.retry_after_s or info.kind.retry_after_s
    headers = {"X-Should-Retry": "false" if retry_after_s is None else "true"}
    if retry_after_s is not None:
        headers["Retry-After"] = str(max(1, math.ceil(retry_after_s)))
    if info.kind.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return json_response(info.body(), info.kind.status, headers)


def _method_info(method: str) -> ErrorInfo:
    return ErrorInfo("method_not_allowed", f"{shown(method)} is not allowed here; see Allow.")


def _internal_info(reference: str) -> ErrorInfo:
    message = f"Something failed inside the service; its log has it under {reference}."
    return ErrorInfo("internal_error", message)


async def _framework_error(request: Request, error: Exception) -> Response:
    """What Starlette itself refuses, which is only an unknown path."""
    log.debug("%s %s: %s", request.method, request.url.path, error)
    return error_response(ErrorInfo("not_found", f"There is no {shown(request.url.path)}."))
