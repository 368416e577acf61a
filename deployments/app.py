"""The Ray Serve application: `serve deploy` imports `deployments.app:build`.

    HTTP -> Ingress -> ConversationRouter -> SinkReplica

Serve restarts every actor when the application's args change. What may change while they run goes into
the `deployments` section of the deployed file: `num_replicas` and `user_config` (the tunables).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import ray
from ray import serve
from ray.serve import Application
from ray.serve.config import AutoscalingConfig, RequestRouterConfig

from cluster.embedded import ensure_running
from deployments.config import EMBEDDED, ConfigError, ServiceConfig, load_config
from deployments.conversation_router import ConversationRouter
from deployments.engine_files import gpus_of_replica, locate_engine
from deployments.replica import SinkReplica
from deployments.serve_ingress import Ingress
from engine_build.files import sinkserve_home
from engine_build.spec import EngineSpec

INGRESS_CPUS = 0.1
MAX_OPEN_REQUESTS = 1000
STATS_LAG_PERIODS = 4
HEALTH_CHECK_PERIOD_S = 2.0
"""Serve notices a dead actor when it next looks at it."""


def build(args: Mapping[str, Any]) -> Application:
    """The application for a configuration (see `deployments.config.ServiceConfig`).

    Builds the demo engine and starts the embedded Redis on this machine if they are asked for and not
    there yet. Raises ConfigError, EmbeddedError.
    """
    config = load_config(args)
    spec = locate_engine(config).spec
    if config.redis_url == EMBEDDED:
        _refuse_other_machines(_machines())
        url = ensure_running(config.data_dir or sinkserve_home() / "data")
        config = config.model_copy(update={"redis_url": url})
    fields = config.model_dump(mode="json", include=config.model_fields_set)
    # Ray types what `serve.deployment` returns as a decorator.
    engine: Any = serve.deployment(SinkReplica)
    front: Any = serve.deployment(serve.ingress()(Ingress))
    replicas = engine.options(**replica_options(config, spec)).bind(fields)
    application: Application = front.options(**ingress_options(config)).bind(fields, replicas)
    return application


def _machines() -> set[str]:
    """Addresses of the machines of this process's cluster; none before it has joined one."""
    if not ray.is_initialized():
        return set()
    nodes = ray.nodes()  # type: ignore[no-untyped-call]
    return {node["NodeManagerAddress"] for node in nodes if node["Alive"]}


def _refuse_other_machines(machines: set[str]) -> None:
    """The embedded Redis is a socket of one machine: replicas elsewhere would wait for it in vain."""
    if len(machines) > 1:
        problem = (
            f"redis_url: {EMBEDDED!r} serves one machine, and this cluster has {len(machines)}"
        )
        raise ConfigError([f"{problem}. Name a Redis that all of them reach: redis://host:6379/0"])


def replica_options(config: ServiceConfig, spec: EngineSpec) -> dict[str, Any]:
    """Of the engine deployment. Raises ConfigError for GPUs that the engine was not built for."""
    router: dict[str, Any] = {
        "request_router_class": f"{ConversationRouter.__module__}.{ConversationRouter.__name__}",
        "request_router_kwargs": {
            "max_wait_s": config.owner_wait_s,
            "stats_lag_s": STATS_LAG_PERIODS * config.stats_period_s,
        },
        "request_routing_stats_period_s": config.stats_period_s,
        "request_routing_stats_timeout_s": 10 * config.stats_period_s,
    }
    scaling: dict[str, Any] = {"num_replicas": config.replicas}
    if config.autoscaling is not None:
        scaling = {"autoscaling_config": AutoscalingConfig(**config.autoscaling.model_dump())}
    return {
        **scaling,
        "name": SinkReplica.__name__,
        "max_ongoing_requests": config.max_ongoing_turns,
        "request_router_config": RequestRouterConfig(**router),
        "user_config": config.user_config(),
        "graceful_shutdown_timeout_s": config.drain_s + 10.0,
        "graceful_shutdown_wait_loop_s": 0.5,
        "health_check_period_s": HEALTH_CHECK_PERIOD_S,
        "health_check_timeout_s": 30.0,
        "ray_actor_options": {
            "num_cpus": config.cpus_per_replica,
            "num_gpus": gpus_of_replica(config, spec),
        },
    }


def ingress_options(config: ServiceConfig) -> dict[str, Any]:
    """Of the ingress deployment."""
    return {
        "name": Ingress.__name__,
        "num_replicas": config.ingress_replicas,
        "max_ongoing_requests": MAX_OPEN_REQUESTS,
        "user_config": config.user_config(),
        "graceful_shutdown_timeout_s": config.drain_s + 10.0,
        "health_check_period_s": HEALTH_CHECK_PERIOD_S,
        "ray_actor_options": {"num_cpus": INGRESS_CPUS},
    }
