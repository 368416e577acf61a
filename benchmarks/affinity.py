"""Where do turns go when replicas come and go? Our router against Ray's consistent hashing and pow-2.

    python -m benchmarks.affinity                       60 conversations, about 5 minutes
    python -m benchmarks.affinity --conversations 20    quicker

Each router serves the same conversations on the same toy replicas (no weights; the store, the slots and
the replay are real) through: two replicas, scale-out to three, scale-in to two, SIGKILL of one. In each
phase every conversation has `--turns` turns, at most 16 at once. Counted per phase:

hit          the turn found its conversation in a kv_slot
moved        it ran on another replica although its last one was alive
orphaned     it ran on another replica because its last one was gone
recomputed   tokens that were prefilled again because the slot was elsewhere
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import logging
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import ray
from ray import serve
from ray.serve.context import _get_global_client
from ray.serve.schema import ServeDeploySchema

from benchmarks import report
from cluster import embedded
from cluster.conversation import GENESIS, Message, NewConversation, new_conversation_id
from cluster.redis_store import RedisStore
from deployments.config import load_config
from deployments.engine_files import EngineFiles, locate_engine
from deployments.turn_call import ReplicaStats, TurnAccepted, TurnCall, TurnDone, TurnRefused
from engine.sampling import SamplingParams

AT_ONCE = 16
SETTLE_S = 3.0
SINK_TOKENS = 4
ROUTERS = {
    "ConversationRouter (ours)": "deployments.conversation_router.ConversationRouter",
    "ConsistentHashRouter": "ray.serve.experimental.consistent_hash_router.ConsistentHashRouter",
    "PowerOfTwoChoices (default)": (
        "ray.serve._private.request_router.pow_2_router.PowerOfTwoChoicesRequestRouter"
    ),
}


@dataclass(slots=True)
class Counts:
    """Of one phase."""

    turns: int = 0
    hits: int = 0
    moved: int = 0
    orphaned: int = 0
    recomputed_tokens: int = 0
    refused: int = 0


@dataclass(slots=True)
class Talk:
    """One conversation: its id and the replica that ran its last turn."""

    conversation_id: str
    replica: str = ""


class Service:
    """The engine deployment under one router, on the cluster of this process."""

    def __init__(self, router: str, data_dir: Path) -> None:
        self._router = router
        # A process keeps the router of an application's name for good.
        self._name = f"affinity-{router.rsplit('.', 1)[-1]}"
        self._args = {
            "model": "toy",
            "capacity": 256,
            "max_chunk": 64,
            "cpus_per_replica": 0.1,
            "max_running": 16,
            "redis_url": embedded.ensure_running(data_dir),
        }
        self.config = load_config(self._args)

    def scale(self, num_replicas: int) -> None:
        """As `serve deploy` would; returns when so many replicas answer."""
        replicas: dict[str, Any] = {
            "name": "SinkReplica",
            "num_replicas": num_replicas,
            "request_router_config": {
                "request_router_class": self._router,
                "request_routing_stats_period_s": 0.5,
            },
        }
        application = {
            "name": self._name,
            "route_prefix": "/",
            "import_path": "deployments.app:build",
            "args": self._args,
            "deployments": [replicas],
        }
        schema = ServeDeploySchema.model_validate({"applications": [application]})
        client: Any = _get_global_client()
        client.deploy_apps(schema, _blocking=True)
        self.await_replicas(num_replicas)

    def handle(self) -> Any:
        return serve.get_deployment_handle("SinkReplica", self._name)

    def alive(self) -> set[str]:
        """Names of the replicas that answer."""
        answers = self.handle().broadcast("stats").results(timeout_s=10, return_exceptions=True)
        return {answer.replica for answer in answers if isinstance(answer, ReplicaStats)}

    def await_replicas(self, count: int) -> None:
        """Wait until `count` replicas answer, and for their first statistics to reach the router."""
        deadline_s = time.monotonic() + 120
        while len(self.alive()) != count:
            if time.monotonic() > deadline_s:
                raise RuntimeError(f"{count} replicas did not answer within 120 s")
            time.sleep(0.2)
        time.sleep(SETTLE_S)

    def stop(self) -> None:
        serve.delete(self._name)

    def kill(self, replica: str) -> None:
        name = f"SERVE_REPLICA::{self._name}#SinkReplica#{replica}"
        ray.kill(ray.get_actor(name, namespace="serve"), no_restart=False)


class Client:
    """Runs turns through a handle, as the ingress does, and counts what became of them."""

    def __init__(self, service: Service, files: EngineFiles, store: RedisStore) -> None:
        self._service = service
        self._files = files
        self._store = store

    async def create(self) -> Talk:
        new = NewConversation(
            conversation_id=new_conversation_id(),
            tenant="default",
            fingerprint=self._files.fingerprint,
            sink_tokens=SINK_TOKENS,
            window_tokens=self._files.spec.capacity - SINK_TOKENS,
            replay_windows=4,
        )
        await self._store.create(new)
        return Talk(new.conversation_id)

    async def phase(self, talks: Sequence[Talk], turns: int, alive: set[str]) -> Counts:
        """`turns` turns of every conversation; `alive` are the replicas before the first one."""
        counts = Counts()
        gate = asyncio.Semaphore(AT_ONCE)

        async def converse(talk: Talk) -> None:
            for _ in range(turns):
                async with gate:
                    await self._turn(talk, counts, alive)

        await asyncio.gather(*(converse(talk) for talk in talks))
        return counts

    async def _turn(self, talk: Talk, counts: Counts, alive: set[str]) -> None:
        record = await self._store.get("default", talk.conversation_id)
        message = Message(
            "user", "Tell me something that I have not heard from you before, please."
        )
        codec = self._files.codec
        encode = codec.encode_turn if record.turn else codec.encode_opening
        call = TurnCall(
            tenant="default",
            conversation_id=talk.conversation_id,
            input_ids=np.asarray(encode([message])),
            messages=(message,),
            history=GENESIS,
            sampling=SamplingParams(temperature=0),
            max_tokens=24,
            owner_hint=record.owner,
        )
        turns = self._service.handle().options(stream=True, session_id=talk.conversation_id)
        items = [item async for item in turns.turn.remote(call)]
        counts.turns += 1
        if isinstance(items[-1], TurnRefused):
            counts.refused += 1
            return
        accepted, done = items[0], items[-1]
        if not isinstance(accepted, TurnAccepted) or not isinstance(done, TurnDone):
            raise RuntimeError(f"unexpected items: {accepted}, {done}")
        usage = done.usage
        if usage.context_tokens and usage.recovery == "none":
            counts.hits += 1
        else:
            counts.recomputed_tokens += usage.prefill_tokens - usage.input_tokens
        if talk.replica not in ("", accepted.replica):
            counts.moved += talk.replica in alive
            counts.orphaned += talk.replica not in alive
        talk.replica = accepted.replica


async def run_phases(service: Service, conversations: int, turns: int) -> dict[str, Counts]:
    """All phases, in order, for one router."""
    files = locate_engine(service.config)
    store = await RedisStore.connect(service.config.redis_url)
    client = Client(service, files, store)
    talks = [await client.create() for _ in range(conversations)]

    async def change(what: Callable[[], None]) -> set[str]:
        await asyncio.to_thread(what)
        return await asyncio.to_thread(service.alive)

    alive = await change(lambda: service.scale(2))
    # The first turn of a conversation can hit nothing.
    await client.phase(talks, 1, alive)
    phases = {"two replicas": await client.phase(talks, turns, alive)}
    alive = await change(lambda: service.scale(3))
    phases["scale-out to 3"] = await client.phase(talks, turns, alive)
    alive = await change(lambda: service.scale(2))
    phases["scale-in to 2"] = await client.phase(talks, turns, alive)
    victim = sorted(alive)[0]
    await change(lambda: service.kill(victim))
    phases["one killed"] = await client.phase(talks, turns, alive - {victim})
    alive = await change(lambda: service.await_replicas(2))
    phases["replacement is up"] = await client.phase(talks, turns, alive)
    await store.close()
    return phases


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--conversations", type=int, default=60)
    parser.add_argument("--turns", type=int, default=3, help="of every conversation in each phase")
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="ss-aff-", dir="/tmp"))
    ray.init(
        address="local",
        num_cpus=8,
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.ERROR,
        object_store_memory=100 << 20,
        _temp_dir=str(folder / "ray"),
    )
    results: dict[str, dict[str, Counts]] = {}
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": 0, "location": "NoServer"})
        logging.getLogger("ray.serve").setLevel(logging.ERROR)
        for name, router in ROUTERS.items():
            print(f"{name} ...", flush=True)
            service = Service(router, folder / "data")
            results[name] = asyncio.run(run_phases(service, options.conversations, options.turns))
            service.stop()
    finally:
        serve.shutdown()  # type: ignore[no-untyped-call]
        ray.shutdown()
        embedded.stop(folder / "data")
        shutil.rmtree(folder, ignore_errors=True)
    print(report.table(_rows(results)))
    saved = {
        name: {phase: dataclasses.asdict(counts) for phase, counts in phases.items()}
        for name, phases in results.items()
    }
    settings = {"conversations": options.conversations, "turns": options.turns}
    print(report.save("affinity", {"ray": ray.__version__, **settings, "routers": saved}))


def _rows(results: dict[str, dict[str, Counts]]) -> list[list[str]]:
    rows = [["phase", "router", "turns", "hit", "moved", "orphaned", "recomputed", "refused"]]
    for phase in next(iter(results.values())):
        for router, phases in results.items():
            counts = phases[phase]
            share = f"{100 * counts.hits / max(1, counts.turns):.0f}%"
            numbers = [counts.moved, counts.orphaned, counts.recomputed_tokens, counts.refused]
            rows.append([phase, router, str(counts.turns), share, *map(str, numbers)])
    return rows


if __name__ == "__main__":
    main()
