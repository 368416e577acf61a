"""The ingress deployment: `deployments.ingress` and `ChatService` in a Ray Serve actor."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Callable
from pathlib import Path
from typing import Any

from ray import serve
from ray.exceptions import (
    ActorUnavailableError,
    NodeDiedError,
    ObjectLostError,
    RayActorError,
    RayError,
    TaskCancelledError,
    WorkerCrashedError,
)
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle
from starlette.types import ASGIApp, Receive, Scope, Send

from cluster.redis_store import RedisStore
from deployments.auth import DEFAULT_TENANT, ApiKeys
from deployments.chat_service import ChatService
from deployments.config import ServiceConfig, load_config
from deployments.conversation_records import FrontConfig
from deployments.engine_files import EngineFiles, locate_engine
from deployments.errors import ErrorInfo, ServiceError
from deployments.failover import ReplicaUnreachable, replica_lost_info
from deployments.hung_replicas import WatchedReplicas
from deployments.ingress import create_app
from deployments.metrics import ServiceMetrics
from deployments.openai_sampling import RequestLimits
from deployments.replica import store_limits
from deployments.turn_call import (
    FollowCall,
    ReplicaStats,
    TurnCall,
    TurnDone,
    TurnItem,
    TurnRefused,
)

log = logging.getLogger(__name__)

Json = dict[str, Any]

STATS_TIMEOUT_S = 5.0


class RayReplicas:
    """The replicas behind a Serve handle, as `ChatService` wants them."""

    def __init__(self, handle: DeploymentHandle[Any]) -> None:
        self._handle = handle
        self._turns = handle.options(stream=True)

    def turn(self, call: TurnCall) -> AsyncGenerator[TurnItem, None]:
        """See `deployments.failover.EngineClient.turn`."""
        # Ray does not pass the session on by itself.
        turns = self._turns.options(session_id=call.conversation_id)
        return _items(lambda: turns.turn.remote(call))

    def follow(self, call: FollowCall) -> AsyncGenerator[TurnItem, None]:
        """See `deployments.failover.EngineClient.follow`."""
        turns = self._turns.options(session_id=call.conversation_id)
        return _items(lambda: turns.follow.remote(call))

    async def stats(self) -> tuple[ReplicaStats, ...]:
        """Of the replicas that answer in time. Raises ServiceError when none can be asked."""
        try:
            answers = await self._handle.broadcast("stats").results_async(
                timeout_s=STATS_TIMEOUT_S, return_exceptions=True
            )
        except (RayError, DeploymentUnavailableError, TimeoutError) as error:
            raise ServiceError(ErrorInfo("not_ready", f"No replica answers: {error}")) from error
        return tuple(answer for answer in answers if isinstance(answer, ReplicaStats))


async def _items(call: Callable[[], Any]) -> AsyncGenerator[TurnItem, None]:
    """The items of a streaming call. Raises ServiceError; leaving it early cancels the call."""
    items = call()
    ended = False
    try:
        async for item in items:
            # Whoever has read the last item closes this generator at once.
            ended = isinstance(item, (TurnDone, TurnRefused))
            yield item
        ended = True
    except (RayError, BackPressureError, DeploymentUnavailableError) as error:
        # Dead, or perhaps alive and still at work: then it is to go on, for whoever asks again.
        ended = isinstance(error, RayActorError)
        raise _service_error(error) from error
    finally:
        if not ended:
            # Dropping a response does not cancel it.
            items.cancel()


def _service_error(error: Exception) -> ServiceError:
    log.warning("turn lost: %s", error)
    match error:
        case BackPressureError():
            return ServiceError(
                ErrorInfo("overloaded", "Too many turns are waiting for a replica.")
            )
        case DeploymentUnavailableError():
            info = ErrorInfo("not_ready", "No replica is running; try again later.")
            return ServiceError(info)
        case ActorUnavailableError():
            return ReplicaUnreachable()
        case (
            RayActorError()
            | TaskCancelledError()
            | NodeDiedError()
            | ObjectLostError()
            | WorkerCrashedError()
        ):
            return ServiceError(replica_lost_info())
        case _:
            info = ErrorInfo("internal_error", "The replica failed; its log says why.")
            return ServiceError(info)


class Ingress:
    """`config` is a ServiceConfig as JSON. Its methods serve Ray handles; HTTP goes to the ASGI app."""

    # Serve awaits it.
    async def __init__(  # type: ignore[misc]
        self, config: Json, replicas: DeploymentHandle[Any]
    ) -> None:
        self._config = load_config(config)
        self._files = await asyncio.to_thread(locate_engine, self._config)
        self._store = await RedisStore.connect(self._config.redis_url, store_limits(self._config))
        self._replicas = WatchedReplicas(RayReplicas(replicas), self._store)
        keys_file = self._config.api_keys_file
        self._keys = ApiKeys.load(Path(keys_file)) if keys_file else ApiKeys()
        self._metrics = ServiceMetrics(serve.get_replica_context().replica_id.unique_id)
        self._serve(self._config)

    def _serve(self, config: ServiceConfig) -> None:
        self.service = ChatService(
            front_config(config, self._files),
            self._store,
            self._files.codec,
            self._replicas,
            self._metrics,
        )
        self._app = create_app(self.service, self._keys)

    def reconfigure(self, user_config: Json) -> None:
        """New tunables for requests to come. Raises ConfigError."""
        self._serve(self._config.tuned(user_config))

    def __serve_build_asgi_app__(self) -> ASGIApp:
        async def current_app(scope: Scope, receive: Receive, send: Send) -> None:
            await self._app(scope, receive, send)

        return current_app

    async def chat(self, body: Json, tenant: str = DEFAULT_TENANT) -> Json:
        """A `chat.completion`. Raises ServiceError, as all of these."""
        return await self.service.chat(body, tenant)

    async def chat_stream(
        self, body: Json, tenant: str = DEFAULT_TENANT
    ) -> AsyncGenerator[Json, None]:
        """`chat.completion.chunk` objects; call it with `handle.options(stream=True)`."""
        chunks = self.service.chat_stream(body, tenant)
        try:
            async for chunk in chunks:
                yield chunk
        finally:
            await chunks.aclose()

    async def rejoin_stream(
        self, conversation_id: str, tenant: str = DEFAULT_TENANT, after: str = ""
    ) -> AsyncGenerator[Json, None]:
        """The chunks of a conversation's latest reply that follow `event_id` `after`."""
        chunks = self.service.rejoin_stream(conversation_id, tenant, after)
        try:
            async for chunk in chunks:
                yield chunk
        finally:
            await chunks.aclose()

    async def create_conversation(self, body: Json, tenant: str = DEFAULT_TENANT) -> Json:
        """A `conversation`."""
        return await self.service.create_conversation(body, tenant)

    async def get_conversation(self, conversation_id: str, tenant: str = DEFAULT_TENANT) -> Json:
        """A `conversation`."""
        return await self.service.get_conversation(conversation_id, tenant)

    async def list_conversations(
        self, tenant: str = DEFAULT_TENANT, limit: int = 20, after: str = ""
    ) -> Json:
        """A page of conversations, newest first."""
        return await self.service.list_conversations(tenant, limit, after)

    async def transcript(
        self, conversation_id: str, tenant: str = DEFAULT_TENANT, limit: int = 100
    ) -> Json:
        """The last `limit` messages."""
        return await self.service.transcript(conversation_id, tenant, limit)

    async def delete_conversation(self, conversation_id: str, tenant: str = DEFAULT_TENANT) -> Json:
        """Forget a conversation."""
        return await self.service.delete_conversation(conversation_id, tenant)

    async def __del__(self) -> None:
        """Serve calls and awaits this before the actor ends."""
        await self.service.close()
        await self._store.close()


def front_config(config: ServiceConfig, files: EngineFiles) -> FrontConfig:
    """What the front needs of the configuration."""
    limits = config.limits
    return FrontConfig(
        models=(config.model_name,),
        fingerprint=files.fingerprint,
        capacity=files.spec.capacity,
        limits=RequestLimits(
            vocab_size=files.spec.model.vocab_size,
            default_max_tokens=limits.default_max_tokens,
            max_output_tokens=limits.max_output_tokens,
            sampling=config.sampling.params(),
        ),
        replay_windows=config.replay_windows,
        max_input_tokens=limits.max_input_tokens,
        max_body_bytes=limits.max_body_bytes,
        turn_timeout_s=limits.turn_timeout_s,
        on_model_change=config.on_model_change,
    )
