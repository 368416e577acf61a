"""A Ray cluster of several nodes on this machine, its two stores and the service: all of it killable.

    head     GCS (kept in a Valkey of its own), Serve's controller and HTTP proxy
    front    the ingress
    engine   one node per replica and a spare place on each, so that a lost node's replica finds room

Everything lives in one temporary folder, on ports of its own; `close` leaves no process behind.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import httpx
import psutil
import ray
from ray import serve
from ray.cluster_utils import Cluster

from benchmarks.chaos.app import ENGINE_NODE, FRONT_NODE
from benchmarks.chaos.store_server import StoreServer, free_port
from deployments.config import load_config

APPLICATION = "sinkserve"
REPO = Path(__file__).resolve().parent.parent.parent
READY_S = 120.0
CAPACITY = 64
FIELDS: Mapping[str, Any] = {
    "model": "toy",
    "capacity": CAPACITY,
    "max_chunk": 16,
    "cpus_per_replica": 0.1,
    "max_running": 8,
    "max_waiting": 40,
    "memory_budget_bytes": 16 * (CAPACITY + 16) * 24,
    "owner_wait_s": 20.0,
    "drain_s": 5.0,
    "lease_s": 5.0,
}
DEMO_FIELDS: Mapping[str, Any] = {
    "cpus_per_replica": 0.1,
    "threads_per_replica": 1,
    "memory_budget_bytes": 256 << 20,
    "lease_s": 5.0,
    "drain_s": 10.0,
}
_SETTINGS = {
    "RAY_AUTH_MODE": "disabled",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_SERVE_LOG_TO_STDERR": "0",
    # A dead proxy is noticed at Serve's next look at it; by default that is 10 s away.
    "RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S": "1",
}


class NotHappened(Exception):
    """A fault did not do what it should have done, so nothing it shows counts."""


@dataclass(frozen=True, slots=True)
class Actor:
    """A living actor of the application: `name` is Serve's id of a replica."""

    name: str
    pid: int
    node_id: str


class Rig:
    """Use it as a context manager; then `deploy`."""

    def __init__(
        self,
        num_replicas: int = 3,
        *,
        keeps_gcs: bool = True,
        fields: Mapping[str, Any] = FIELDS,
        logs: Path | None = None,
    ) -> None:
        self._logs = logs
        self._base = dict(fields)
        self.num_replicas = num_replicas
        self.keeps_gcs = keeps_gcs
        self.folder = Path(tempfile.mkdtemp(prefix="ssc-", dir="/tmp"))
        self.store = StoreServer(self.folder / "store")
        self.gcs_store = StoreServer(self.folder / "gcs", durable=False)
        self.http_port = free_port()
        self._gcs_port = free_port()
        self._before: dict[str, str | None] = {}
        self._fields: dict[str, Any] = {}
        self._scaling: dict[str, Any] | None = None
        self.cluster: Any = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.http_port}"

    def __enter__(self) -> Self:
        try:
            self._start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _start(self) -> None:
        settings = {
            **_SETTINGS,
            "RAY_TMPDIR": str(self.folder),
            "PYTHONPATH": os.pathsep.join([str(REPO), os.environ.get("PYTHONPATH", "")]),
        }
        self.store.start()
        self.gcs_store.start()
        if self.keeps_gcs:
            settings["RAY_REDIS_ADDRESS"] = f"127.0.0.1:{self.gcs_store.port}"
        names = (*settings, "RAY_ADDRESS", "RAY_REDIS_ADDRESS")
        self._before = {name: os.environ.get(name) for name in names}
        os.environ.pop("RAY_ADDRESS", None)
        os.environ.update(settings)
        self.cluster = Cluster(shutdown_at_exit=False)
        self.add_head()
        self.cluster.add_node(num_cpus=2, resources={FRONT_NODE: 4}, object_store_memory=80 << 20)
        for _ in range(self.num_replicas):
            self.add_engine_node()
        self.connect()
        # One proxy, so that its death is felt by all.
        serve.start(
            proxy_location="HeadOnly", http_options={"host": "127.0.0.1", "port": self.http_port}
        )

    def add_head(self) -> None:
        """The head, always at the same address: nodes that outlive one find the next."""
        self.cluster.add_node(
            num_cpus=1,
            include_dashboard=False,
            gcs_server_port=self._gcs_port,
            object_store_memory=100 << 20,
        )

    def replace_head(self) -> None:
        """SIGKILL all of the head, start another, be its driver. Disconnect first."""
        old = self.cluster.head_node
        pids = [info.process.pid for infos in old.all_processes.values() for info in infos]
        children = [
            child for pid in pids if is_alive(pid) for child in psutil.Process(pid).children(True)
        ]
        old.kill_all_processes(check_alive=False, allow_graceful=False, wait=True)
        for child in children:
            with contextlib.suppress(psutil.Error):
                child.kill()
        if any(is_alive(pid) for pid in pids):
            raise NotHappened("something of the head lives on")
        self.cluster.head_node = None
        self.add_head()
        self.connect()

    def add_engine_node(self) -> None:
        """Room for two replicas."""
        self.cluster.add_node(num_cpus=2, resources={ENGINE_NODE: 2}, object_store_memory=80 << 20)

    def connect(self) -> None:
        """Make this process a driver of the cluster."""
        ray.init(address=self.cluster.address, log_to_driver=False, logging_level=logging.ERROR)
        logging.getLogger("ray.serve").setLevel(logging.ERROR)

    def disconnect(self) -> None:
        """A driver dies with the head's node: it must be none while that is killed."""
        ray.shutdown()

    def deploy(
        self,
        fields: Mapping[str, Any] | None = None,
        scaling: Mapping[str, Any] | None = None,
        router: str = "",
    ) -> None:
        """What `serve deploy` does; returns when the application is as wanted.

        `fields` come on top of the rig's own, with `switched_off` for the safeguards of `app.build`.
        `scaling` is Serve's autoscaling_config, in place of a number of replicas; `router` another class
        of router. Both must be named again each time.
        """
        from ray.serve.context import _get_global_client
        from ray.serve.schema import ServeDeploySchema

        self._fields = dict(fields or {})
        self._scaling = None if scaling is None else dict(scaling)
        replicas: dict[str, Any] = {"name": "SinkReplica", "num_replicas": self.num_replicas}
        if self._scaling is not None:
            replicas = {"name": "SinkReplica", "autoscaling_config": self._scaling}
        if router:
            period_s = load_config(self._base).stats_period_s
            replicas["request_router_config"] = {
                "request_router_class": router,
                "request_routing_stats_period_s": period_s,
            }
        application = {
            "name": APPLICATION,
            "route_prefix": "/",
            "import_path": "benchmarks.chaos.app:build",
            "args": {**self._base, "redis_url": self.store.url, **self._fields},
            "deployments": [replicas, {"name": "Ingress"}],
        }
        client: Any = _get_global_client()
        schema = ServeDeploySchema.model_validate({"applications": [application]})
        client.deploy_apps(schema, _blocking=True)
        self.await_ready()

    def redeploy(self) -> None:
        """The same again in new actors: any argument that is no tunable replaces them all."""
        rounds = float(self._fields.get("step_timeout_s", 120.0)) + 1.0
        self.deploy({**self._fields, "step_timeout_s": rounds})

    def scale(self, num_replicas: int) -> None:
        """The same with another number of replicas; those that stay notice nothing."""
        self.num_replicas = num_replicas
        self.deploy(self._fields)

    def has_all(self, count: int) -> bool:
        """Whether so many replicas are as many as were wanted; with `scaling` any number is."""
        return count == self.num_replicas or (self._scaling is not None and count > 0)

    def await_ready(self, within_s: float = READY_S) -> float:
        """Wait until every replica answers; returns how long that took, seconds."""
        started_s = time.monotonic()
        self.wait(lambda: self.has_all(len(self.healthy())), within_s)
        return time.monotonic() - started_s

    def healthy(self) -> dict[str, dict[str, float]]:
        """The figures of the replicas that answer, by name."""
        response = httpx.get(f"{self.url}/healthz", timeout=10.0)
        health: dict[str, Any] = response.json()
        found = health.get("replicas") or health.get("error", {}).get("replicas") or []
        return {one["replica"]: one for one in found}

    def wait(self, check: Callable[[], bool], within_s: float = READY_S) -> None:
        """Poll until `check` holds; what cannot be reached or found counts as not yet.

        Raises NotHappened.
        """
        deadline_s = time.monotonic() + within_s
        while True:
            with contextlib.suppress(httpx.HTTPError, ValueError, NotHappened):
                if check():
                    return
            if time.monotonic() > deadline_s:
                raise NotHappened(f"not so after {within_s:.0f} s")
            time.sleep(0.1)

    # What runs where.

    def replicas(self) -> dict[str, Actor]:
        """The engine replicas that Ray believes to be alive, by name."""
        prefix = f"SERVE_REPLICA::{APPLICATION}#SinkReplica#"
        return {actor.name: actor for actor in self._actors(prefix)}

    def controller(self) -> Actor:
        """Raises NotHappened when there is none."""
        return self._one("SERVE_CONTROLLER_ACTOR")

    def proxy(self) -> Actor:
        """The HTTP proxy. Raises NotHappened when there is none."""
        return self._one("SERVE_PROXY_ACTOR")

    def ingress(self) -> Actor:
        """Raises NotHappened when there is none."""
        return self._one(f"SERVE_REPLICA::{APPLICATION}#Ingress#")

    def _one(self, prefix: str) -> Actor:
        found = list(self._actors(prefix))
        if not found:
            raise NotHappened(f"no living actor {prefix}")
        return found[0]

    def _actors(self, prefix: str) -> Iterator[Actor]:
        from ray._private import state

        for row in state.actors().values():
            if row["State"] == "ALIVE" and row["Name"].startswith(prefix):
                name = row["Name"].rsplit("#", 1)[-1]
                yield Actor(name, row["Pid"], row["Address"]["NodeID"])

    def alive_nodes(self) -> set[str]:
        """Ids of the nodes that the GCS believes to be alive."""
        nodes = ray.nodes()  # type: ignore[no-untyped-call]
        return {node["NodeID"] for node in nodes if node["Alive"]}

    def node(self, node_id: str) -> Any:
        """Ray's object for one of our nodes. Raises NotHappened."""
        for node in self.cluster.list_all_nodes():
            if node.node_id == node_id:
                return node
        raise NotHappened(f"no node {node_id}")

    def close(self) -> None:
        """Stop everything that was started here, whatever state it is in."""
        with contextlib.suppress(Exception):
            ray.shutdown()
        if self.cluster is not None:
            for node in self.cluster.list_all_nodes():
                with contextlib.suppress(Exception):
                    node.kill_all_processes(check_alive=False, allow_graceful=False)
        if self._logs is not None:
            for number, found in enumerate(self.folder.glob("ray/session_2*/logs/serve")):
                shutil.copytree(found, self._logs / f"{self.folder.name}-{number}")
        for server in (self.store, self.gcs_store):
            server.kill()
        left = self.stragglers()
        for process in left:
            with contextlib.suppress(psutil.Error):
                process.kill()
        psutil.wait_procs(left, timeout=5.0)
        for name, value in self._before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
        shutil.rmtree(self.folder, ignore_errors=True)

    def stragglers(self) -> list[psutil.Process]:
        """Processes of this rig, known by the folder in their environment; stopped ones too."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                is_ours = process.environ().get("RAY_TMPDIR") == str(self.folder)
                if is_ours and process.pid != os.getpid():
                    found.append(process)
        return found


def is_alive(pid: int) -> bool:
    """Whether a process runs (a zombie does not)."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def kill(pid: int) -> None:
    """SIGKILL, and wait until it is gone. Raises NotHappened."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
    deadline_s = time.monotonic() + 5.0
    while is_alive(pid):
        if time.monotonic() > deadline_s:
            raise NotHappened(f"process {pid} survives SIGKILL")
        time.sleep(0.001)
