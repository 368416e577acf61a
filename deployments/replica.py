"""The engine deployment: one Ray actor, one engine. What it does is in `deployments.turn_runner`."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator
from typing import Any

from ray import serve

from cluster.redis_store import RedisStore
from cluster.store import StoreLimits
from deployments.config import ServiceConfig, load_config
from deployments.engine_files import locate_engine, start_engine, warm_up
from deployments.turn_call import FollowCall, ReplicaStats, TurnCall, TurnItem
from deployments.turn_runner import ReplicaParts, TurnRunner
from engine.loop import EngineLoop
from engine.loop_types import LoopConfig

log = logging.getLogger(__name__)

_WATCH_PERIOD_S = 0.5


def store_limits(config: ServiceConfig) -> StoreLimits:
    """The bounds of a record that follow from the configuration."""
    return StoreLimits(
        ttl_s=config.conversation_ttl_s,
        input_tokens=config.limits.max_input_tokens,
        output_tokens=config.limits.max_output_tokens,
    )


def _replicas_here(config: ServiceConfig) -> int:
    """How many replicas may come to share a machine; not a field, lest a change restarts them all."""
    if config.autoscaling is not None:
        return config.autoscaling.max_replicas
    return serve.get_replica_context().world_size


class SinkReplica:
    """`config` is a ServiceConfig as JSON. The replica's name is Serve's id of this actor: the router
    knows it by the same name, and the store keeps it as the owner."""

    # Serve awaits it.
    async def __init__(self, config: dict[str, Any]) -> None:  # type: ignore[misc]
        self._config = load_config(config)
        files = await asyncio.to_thread(locate_engine, self._config)
        threads = self._config.threads_of(_replicas_here(self._config))
        engine = await asyncio.to_thread(start_engine, self._config, files, threads)
        await asyncio.to_thread(warm_up, engine)
        store = await RedisStore.connect(self._config.redis_url, store_limits(self._config))
        replica = serve.get_replica_context().replica_id.unique_id
        loop = EngineLoop(
            engine,
            LoopConfig(
                max_running=self._config.max_running,
                prefill_tokens=self._config.prefill_tokens,
                max_waiting=self._config.max_waiting,
            ),
        )
        parts = ReplicaParts(replica, files.spec, files.fingerprint, loop, store, files.codec)
        self._store = store
        self._runner = TurnRunner(parts, self._config)
        self._asked_s = time.monotonic()
        self._drain = asyncio.create_task(self._hand_over_when_drained())
        log.info("replica %s: %d kv_slots", replica, engine.max_resident)

    def reconfigure(self, user_config: dict[str, Any]) -> None:
        """New tunables, with no restart. Raises ConfigError."""
        self._runner.tunables = self._config.tuned(user_config)

    async def turn(self, call: TurnCall) -> AsyncGenerator[TurnItem, None]:
        """See `TurnRunner.turn`."""
        items = self._runner.turn(call)
        try:
            async for item in items:
                yield item
        finally:
            # Also when Ray cancels this request: the turn is over before the request is.
            await items.aclose()

    async def follow(self, call: FollowCall) -> AsyncGenerator[TurnItem, None]:
        """See `TurnRunner.follow`."""
        items = self._runner.follow(call)
        try:
            async for item in items:
                yield item
        finally:
            await items.aclose()

    async def stats(self) -> ReplicaStats:
        """Figures for health and metrics."""
        return self._runner.stats()

    def record_routing_stats(self) -> dict[str, int | bool]:
        """Ray hands these to every router, `stats_period_s` old at most."""
        self._asked_s = time.monotonic()
        return self._runner.routing_stats()

    def check_health(self) -> None:
        """Raises RuntimeError, and Serve replaces this replica, when no step can work any more."""
        self._runner.check_health(self._config.step_timeout_s)

    async def _hand_over_when_drained(self) -> None:
        """Serve tells nobody that it drains a replica, and kills turns that outlast its patience. But it
        asks a replica for statistics for as long as it may get new turns: once they were not asked for
        for `drain_s`, running turns go on elsewhere. (Should the controller be away that long, they come
        back here: their owner lives.)"""
        while True:
            await asyncio.sleep(_WATCH_PERIOD_S)
            if (
                time.monotonic() - self._asked_s
                > self._config.drain_s + self._config.stats_period_s
            ):
                self._runner.hand_over()
                self._asked_s = time.monotonic()

    async def __del__(self) -> None:
        """Serve calls and awaits this once running requests have ended or their time is over."""
        self._drain.cancel()
        await self._runner.close(drain_s=0.0)
        await self._store.close()
