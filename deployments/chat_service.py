"""The front without a framework: a request in, OpenAI's objects out, the same on HTTP and on handles.

body -> strict_json -> openai_schema -> turn_opening -> a replica -> open_turn -> reply
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import AsyncGenerator
from typing import Any, Protocol

from cluster.store import ConversationStore, StoreError
from deployments import openai_reply as reply
from deployments.auth import DEFAULT_TENANT
from deployments.conversation_records import ChatCodec, FrontConfig
from deployments.errors import ErrorInfo, ServiceError
from deployments.failover import EngineClient, FailoverPolicy, FailoverTurns
from deployments.metrics import ServiceMetrics
from deployments.open_turn import OpenTurn
from deployments.openai_schema import (
    NO_HEADERS,
    ChatRequest,
    TurnHeaders,
    check_conversation_id,
    parse_chat,
    parse_create,
)
from deployments.patient_store import PatientStore
from deployments.rejoin import FollowedReply, Rejoiner
from deployments.store_errors import store_errors
from deployments.strict_json import check_object, refuse
from deployments.turn_call import ReplicaStats
from deployments.turn_identity import EventId, check_event_id
from deployments.turn_opening import TurnOpener

log = logging.getLogger(__name__)

Json = dict[str, Any]


class ReplicaClient(EngineClient, Protocol):
    """The engine client plus what health and metrics need."""

    async def stats(self) -> tuple[ReplicaStats, ...]:
        """One entry per replica that answers. Raises ServiceError when none can be asked."""
        ...


class ChatService:
    """All operations of the API for one tenant at a time. Every failure is a ServiceError.

    `chat`, `chat_stream` and `create_conversation` take bodies as Python values and check them like
    HTTP bodies: they are the methods of the Ray Serve handle.
    """

    def __init__(
        self,
        config: FrontConfig,
        store: ConversationStore,
        codec: ChatCodec,
        engine: ReplicaClient,
        metrics: ServiceMetrics | None = None,
        failover: FailoverPolicy | None = None,
    ) -> None:
        self.config = config
        self.metrics = metrics or ServiceMetrics()
        self._store = store
        self._engine = engine
        turns = FailoverTurns(engine, failover, self.metrics.turn_called_again)
        self._opener = TurnOpener(config, PatientStore(store), codec, turns, self.metrics)
        self._rejoiner = Rejoiner(config, store, codec, engine, self.metrics)

    def parse(self, body: object, headers: TurnHeaders = NO_HEADERS) -> ChatRequest:
        """A body as Python values -> a valid request for a model that is served here."""
        tree = check_object(body, self.config.max_body_bytes)
        request = parse_chat(tree, self.config.limits, headers)
        self._check_model(request.model)
        return request

    async def open_turn(self, request: ChatRequest, tenant: str) -> OpenTurn:
        """Returns once a replica has accepted the turn. The caller reads it or closes it."""
        return await self._opener.open(request, tenant)

    async def rejoin(
        self, conversation_id: str, tenant: str = DEFAULT_TENANT, after: EventId | None = None
    ) -> FollowedReply:
        """The reply that is being written, or else the last one; without what came up to `after`."""
        check_conversation_id(conversation_id, "conversation_id")
        return await self._rejoiner.open(tenant, conversation_id, after)

    async def rejoin_stream(
        self, conversation_id: str, tenant: str = DEFAULT_TENANT, after: str = ""
    ) -> AsyncGenerator[Json, None]:
        """The same as `chat.completion.chunk` objects; `after` is the `event_id` of the last one seen."""
        event = check_event_id(after, "after") if after else None
        turn = await self.rejoin(conversation_id, tenant, event)
        try:
            async with contextlib.aclosing(turn.chunks()) as chunks:
                async for chunk in chunks:
                    yield chunk
        finally:
            await turn.close()

    async def chat(self, body: object, tenant: str = DEFAULT_TENANT) -> Json:
        """A `chat.completion`."""
        request = self.parse(body)
        if request.stream:
            refuse("invalid_value", "Use chat_stream to stream.", "stream")
        turn = await self.open_turn(request, tenant)
        return await turn.completion()

    async def chat_stream(
        self, body: object, tenant: str = DEFAULT_TENANT
    ) -> AsyncGenerator[Json, None]:
        """`chat.completion.chunk` objects; `stream` is implied. Each has an `event_id`: with it as
        `last_event_id`, the same body and `idempotency_key` get what follows."""
        checked = check_object(body, self.config.max_body_bytes)
        request = self.parse({"stream": True, **checked})
        if not request.stream:
            refuse("invalid_value", "Use chat for a whole reply.", "stream")
        turn = await self.open_turn(request, tenant)
        async with contextlib.aclosing(turn.chunks(request.usage)) as chunks:
            async for chunk in chunks:
                yield chunk

    async def create_conversation(self, body: object, tenant: str = DEFAULT_TENANT) -> Json:
        """An empty conversation, with its system prompt pinned."""
        request = parse_create(check_object(body, self.config.max_body_bytes))
        record = await self._opener.create(request.messages, request.metadata, tenant)
        return reply.conversation_object(record, self.config.models[0])

    async def get_conversation(self, conversation_id: str, tenant: str = DEFAULT_TENANT) -> Json:
        """The conversation's counts and ETag."""
        check_conversation_id(conversation_id, "conversation_id")
        async with store_errors(conversation_id):
            record = await self._store.get(tenant, conversation_id)
        return reply.conversation_object(record, self.config.models[0])

    async def list_conversations(
        self, tenant: str = DEFAULT_TENANT, limit: int = 20, after: str = ""
    ) -> Json:
        """Newest first, continuing after the conversation named `after`."""
        if after:
            check_conversation_id(after, "after")
        async with store_errors(after):
            records = await self._store.list(tenant, limit, after)
        shown = [reply.conversation_object(record, self.config.models[0]) for record in records]
        return reply.page(shown, limit)

    async def transcript(
        self,
        conversation_id: str,
        tenant: str = DEFAULT_TENANT,
        limit: int = 100,
        before: int | None = None,
    ) -> Json:
        """The last `limit` messages before position `before`, oldest first."""
        check_conversation_id(conversation_id, "conversation_id")
        async with store_errors(conversation_id):
            first, messages = await self._store.transcript(tenant, conversation_id, limit, before)
        return reply.transcript_page(first, messages)

    async def delete_conversation(self, conversation_id: str, tenant: str = DEFAULT_TENANT) -> Json:
        """Forget the conversation, a running turn included."""
        check_conversation_id(conversation_id, "conversation_id")
        async with store_errors(conversation_id):
            await self._store.delete(tenant, conversation_id)
        return {"id": conversation_id, "object": "conversation.deleted", "deleted": True}

    def models(self) -> Json:
        """The names that requests may use."""
        return {"object": "list", "data": [self.model(name) for name in self.config.models]}

    def model(self, name: str) -> Json:
        """One of them."""
        self._check_model(name)
        created = self.config.created_s
        return {"id": name, "object": "model", "created": created, "owned_by": "sinkserve"}

    async def health(self) -> tuple[bool, Json]:
        """Whether a turn could be served now, and why not."""
        try:
            store: Json = {"ok": True, "ping_s": await self._store.ping()}
        except StoreError as error:
            store = {"ok": False, "problem": str(error)}
        replicas = [{"replica": one.replica, **one.values} for one in await self._replica_stats()]
        ready = bool(store["ok"] and replicas)
        detail: Json = {"status": "ok" if ready else "unavailable"}
        if not ready:
            missing = "no replica is ready" if store["ok"] else "the store does not answer"
            detail |= ErrorInfo("not_ready", f"The service cannot take turns: {missing}.").body()
        return ready, {**detail, "store": store, "replicas": replicas}

    async def metrics_text(self) -> bytes:
        """Prometheus exposition: this process and, as of now, every replica."""
        return self.metrics.render(await self._replica_stats())

    async def close(self) -> None:
        """Wait for the clean-up of abandoned turns."""
        await self._opener.close()

    async def _replica_stats(self) -> tuple[ReplicaStats, ...]:
        try:
            return await self._engine.stats()
        except ServiceError as error:
            log.warning("no replica answers: %s", error)
            return ()

    def _check_model(self, name: str) -> None:
        if name not in self.config.models:
            served = ", ".join(self.config.models)
            refuse("model_not_found", f"This service serves {served}.", "model")
