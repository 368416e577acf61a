"""The service as the chaos run deploys it: a slower toy that poison kills, on chosen nodes.

For control runs a safeguard can be switched off; that is done in the actors' own processes, so the
service knows nothing of it.
"""

from __future__ import annotations

import os
import signal
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Literal

from ray import serve
from ray.serve import Application
from ray.serve.handle import DeploymentResponseGenerator

from cluster.conversation import Checkpoint, Snapshot
from cluster.redis_store import RedisStore
from cluster.store import Fenced, NotFound, StoreError, StoreLimits
from deployments import failover
from deployments import replica as replica_module
from deployments.app import ingress_options, replica_options
from deployments.config import TOY_MODEL, ServiceConfig, load_config
from deployments.engine_files import EngineFiles, locate_engine
from deployments.replica import SinkReplica
from deployments.serve_ingress import Ingress
from deployments.turn_call import ReplicaStats
from engine.protocol import Engine, StepPlan, StepResult
from engine.toy_engine import ToyEngine, ToyModel, ToyText

REFUSED = "refused_checkpoints_of_a_claim"
"""A figure of `ChaosReplica`."""

POISON = 0x07
"""A byte (BEL): the engine that reads it dies."""

STEP_S = 0.02
TEXT = ToyText(stop_period=300)
ENGINE_NODE, FRONT_NODE = "chaos_engine", "chaos_front"
"""Ray resources that tie the deployments to nodes, so that a node can be killed with what is on it."""


class PoisonedToy(ToyEngine):
    """Ends its process when a step prefills POISON, as a kernel that crashes would."""

    def step(self, plan: StepPlan) -> StepResult:
        if any((row.tokens == POISON).any() for row in plan.rows):
            os.kill(os.getpid(), signal.SIGKILL)
        return super().step(plan)


def toy_model(vocab_size: int) -> ToyModel:
    """What the deployed engine says, for the oracle."""
    return ToyModel(vocab_size, TEXT)


def start_toy(config: ServiceConfig, files: EngineFiles, threads: int) -> Engine:
    """In place of `deployments.engine_files.start_engine`."""
    slots = config.cpu_budget_bytes // files.spec.slot_bytes
    return PoisonedToy(files.spec, max_resident=slots, text=TEXT, step_delay_s=STEP_S)


Switch = Literal["failover", "fence", "repair", "quarantine", "drain"]
"""Safeguards: the ingress calls a broken turn again; a replaced owner stops; owners bring back what a
store has lost; a turn that kills its owners is given up; a stopping replica lets its turns end."""


class ChaosReplica(SinkReplica):
    """The real one on another toy."""

    async def __init__(  # type: ignore[misc]
        self, config: dict[str, Any], switched_off: Sequence[Switch]
    ) -> None:
        # The seams are where the replica's modules look their parts up.
        if load_config(config).model == TOY_MODEL:
            _swap(replica_module, "start_engine", start_toy)
        self._refused = RefusedCheckpoints(RedisStore.checkpoint, "fence" not in switched_off)
        _swap(RedisStore, "checkpoint", self._refused.as_method())
        if "repair" in switched_off:
            _swap(RedisStore, "repair", _repair_nothing)
        if "quarantine" in switched_off:
            _swap(replica_module, "store_limits", _without_quarantine(replica_module.store_limits))
        await super().__init__(config)

    async def stats(self) -> ReplicaStats:
        """The replica's own, and the most checkpoints refused to one claim that was lost."""
        stats = await super().stats()
        most = float(max(self._refused.counts.values(), default=0))
        return ReplicaStats(stats.replica, {**stats.values, REFUSED: most})


class ChaosIngress(Ingress):
    """The real one."""

    async def __init__(  # type: ignore[misc]
        self, config: dict[str, Any], replicas: Any, switched_off: Sequence[Switch]
    ) -> None:
        if "failover" in switched_off:
            once = partial(failover.FailoverPolicy, first_tries=1, max_tries=1)
            _swap(failover, "FailoverPolicy", once)
        if "fence" in switched_off:
            # Nor is the old owner told by the ingress that nobody reads it any more.
            _swap(DeploymentResponseGenerator, "cancel", lambda response: None)
        await super().__init__(config, replicas)


def _swap(owner: Any, name: str, value: Any) -> None:
    """In this actor's own process."""
    setattr(owner, name, value)


class RefusedCheckpoints:
    """Counts by claim how often tokens were refused with Fenced. Not `tells`: the owner never learns."""

    def __init__(self, checkpoint: Any, tells: bool) -> None:
        self._checkpoint = checkpoint
        self._tells = tells
        self.counts: Counter[str] = Counter()

    def as_method(self) -> Any:
        """In place of `RedisStore.checkpoint`."""

        async def checkpoint(
            store: RedisStore, batch: Sequence[Checkpoint]
        ) -> list[StoreError | None]:
            answers: list[StoreError | None] = list(await self._checkpoint(store, batch))
            for number, (asked, answer) in enumerate(zip(batch, answers, strict=True)):
                if isinstance(answer, Fenced):
                    # Without tokens it is a lease renewed.
                    self.counts[asked.fence.nonce] += len(asked.token_ids) > 0
                    answers[number] = answer if self._tells else None
            return answers

        return checkpoint


async def _repair_nothing(store: RedisStore, snapshot: Snapshot) -> None:
    """In place of `RedisStore.repair`, as if the owner were gone."""
    raise NotFound(snapshot.conversation.conversation_id)


def _without_quarantine(store_limits: Any) -> Any:
    def limits(config: ServiceConfig) -> StoreLimits:
        changed: StoreLimits = replace(store_limits(config), max_attempts=1000)
        return changed

    return limits


def build(args: Mapping[str, Any]) -> Application:
    """See `deployments.app.build`; `switched_off` names safeguards."""
    switched_off = list(args.get("switched_off", ()))
    config = load_config({name: value for name, value in args.items() if name != "switched_off"})
    spec = locate_engine(config).spec
    fields = config.model_dump(mode="json", include=config.model_fields_set)
    replicas, front = replica_options(config, spec), ingress_options(config)
    if "drain" in switched_off:
        replicas["graceful_shutdown_timeout_s"] = 0.1
    replicas["ray_actor_options"] |= {"resources": {ENGINE_NODE: 1}}
    front["ray_actor_options"] |= {"resources": {FRONT_NODE: 1}}
    # Ray types what `serve.deployment` returns as a decorator.
    engine: Any = serve.deployment(ChaosReplica)
    ingress: Any = serve.deployment(serve.ingress()(ChaosIngress))
    application: Application = ingress.options(**front).bind(
        fields, engine.options(**replicas).bind(fields, switched_off), switched_off
    )
    return application
