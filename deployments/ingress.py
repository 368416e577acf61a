"""HTTP over `ChatService`: a plain Starlette app, with nothing of Ray in it.

In Ray Serve the ingress deployment builds it late, when its service exists:

    @serve.deployment
    @serve.ingress()
    class Ingress:
        def __serve_build_asgi_app__(self):
            return create_app(self.service, self.keys)

The disconnect message is awaited beside the turn, and servers that cancel the request instead (Ray
Serve's proxies) reach the same place: the turn's generator is closed, and its replica cancels the turn or
lets it finish, as the request says.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Awaitable, Callable

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from deployments.auth import ApiKeys
from deployments.chat_service import ChatService
from deployments.errors import ErrorInfo, ServiceError
from deployments.event_stream import ClientGone, EventStream, disconnected, while_connected
from deployments.http_io import (
    count_of,
    error_response,
    internal_error_info,
    json_body,
    json_response,
    query_of,
)
from deployments.metrics import CONTENT_TYPE
from deployments.open_turn import OpenTurn
from deployments.openai_schema import TurnHeaders
from deployments.rejoin import FollowedReply
from deployments.strict_json import shown
from deployments.turn_identity import check_event_id

log = logging.getLogger(__name__)

Handler = Callable[[Request, str], Awaitable[Response]]

CLIENT_GONE = 499
_MAX_PAGE = 100


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
        "/v1/conversations/{conversation_id}/stream": {"GET": api.rejoin},
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
        headers = request.headers
        chat = service.parse(
            await self._body(request),
            TurnHeaders(
                conversation=headers.get("x-conversation-id"),
                if_match=headers.get("if-match"),
                idempotency_key=headers.get("idempotency-key"),
                last_event_id=headers.get("last-event-id"),
            ),
        )
        gone = asyncio.create_task(disconnected(request.receive))
        opened: list[OpenTurn] = []

        async def open_turn() -> OpenTurn:
            opened.append(await service.open_turn(chat, tenant))
            return opened[0]

        try:
            turn = await while_connected(gone, open_turn())
            named = {"X-Conversation-Id": turn.head.conversation_id}
            if chat.stream:
                return EventStream(turn, chat.usage, gone, service.config.stall_timeout_s, named)
            reply = await while_connected(gone, turn.completion())
            gone.cancel()
            return json_response(reply, headers=named | _etag(reply["conversation"]["etag"]))
        except BaseException:
            # A turn that was opened as the client went is nobody else's to leave.
            gone.cancel()
            for turn in opened:
                await turn.close()
            raise

    async def rejoin(self, request: Request, tenant: str) -> Response:
        service = self._service
        after = query_of(request, "after").get("after")
        # A browser that reconnects sends both; the header is the newer one.
        seen = request.headers.get("last-event-id")
        event = None
        if seen is not None:
            event = check_event_id(seen, "Last-Event-ID")
        elif after is not None:
            event = check_event_id(after, "after")
        gone = asyncio.create_task(disconnected(request.receive))
        opened: list[FollowedReply] = []

        async def rejoin() -> FollowedReply:
            conversation_id = request.path_params["conversation_id"]
            opened.append(await service.rejoin(conversation_id, tenant, event))
            return opened[0]

        try:
            turn = await while_connected(gone, rejoin())
        except BaseException:
            gone.cancel()
            for turn in opened:
                await turn.close()
            raise
        named = {"X-Conversation-Id": turn.head.conversation_id}
        return EventStream(turn, "none", gone, service.config.stall_timeout_s, named)

    async def create_conversation(self, request: Request, tenant: str) -> Response:
        shown = await self._service.create_conversation(await self._body(request), tenant)
        location = {"Location": f"/v1/conversations/{shown['id']}"}
        return json_response(shown, headers=location | _etag(shown["etag"]))

    async def list_conversations(self, request: Request, tenant: str) -> Response:
        query = query_of(request, "limit", "after")
        limit = count_of(query, "limit", 20, 1, _MAX_PAGE)
        page = await self._service.list_conversations(tenant, limit, query.get("after", ""))
        return json_response(page)

    async def get_conversation(self, request: Request, tenant: str) -> Response:
        conversation_id = request.path_params["conversation_id"]
        shown = await self._service.get_conversation(conversation_id, tenant)
        return json_response(shown, headers=_etag(shown["etag"]))

    async def transcript(self, request: Request, tenant: str) -> Response:
        query = query_of(request, "limit", "before")
        limit = count_of(query, "limit", _MAX_PAGE, 1, _MAX_PAGE)
        before = count_of(query, "before", -1, 0, 2**53)
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
        return await json_body(request, self._service.config.max_body_bytes)


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
            return error_response(internal_error_info(request_id))


def _etag(head: str) -> dict[str, str]:
    return {"ETag": f'"{head}"'}


def _method_info(method: str) -> ErrorInfo:
    return ErrorInfo("method_not_allowed", f"{shown(method)} is not allowed here; see Allow.")


async def _framework_error(request: Request, error: Exception) -> Response:
    """What Starlette itself refuses, which is only an unknown path."""
    log.debug("%s %s: %s", request.method, request.url.path, error)
    return error_response(ErrorInfo("not_found", f"There is no {shown(request.url.path)}."))
