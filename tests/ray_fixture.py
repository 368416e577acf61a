"""A local Ray cluster with the toy service on it: one per test process, with ports and files of its own."""

from __future__ import annotations

import logging
import os
import shutil
import signal
import socket
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.valkey_fixture import start_valkey

APPLICATION = "sinkserve"
TOY = {
    "model": "toy",
    "capacity": 64,
    "max_chunk": 16,
    "cpus_per_replica": 0.1,
    "max_running": 8,
    "max_waiting": 40,
    "memory_budget_bytes": 16 * (64 + 16) * 24,
    "owner_wait_s": 20.0,
    "drain_s": 5.0,
    "lease_s": 3.0,
    "limits": {"default_max_tokens": 24},
}
READY_WITHIN_S = 120.0


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[int]:
    """Ray with Serve, for this process alone. The value is Serve's HTTP port."""
    import ray
    from ray import serve

    directory = Path(tempfile.mkdtemp(prefix="ss-ray-", dir="/tmp"))
    settings = {
        "RAY_AUTH_MODE": "disabled",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        "RAY_SERVE_LOG_TO_STDERR": "0",
    }
    before = {name: os.environ.get(name) for name in (*settings, "RAY_ADDRESS")}
    os.environ.update(settings)
    os.environ.pop("RAY_ADDRESS", None)
    port = free_port()
    try:
        ray.init(
            address="local",
            num_cpus=8,
            include_dashboard=False,
            object_store_memory=100 << 20,
            log_to_driver=False,
            logging_level=logging.ERROR,
            _temp_dir=str(directory),
        )
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        yield port
    finally:
        serve.shutdown()  # type: ignore[no-untyped-call]
        ray.shutdown()
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
        shutil.rmtree(directory, ignore_errors=True)


@dataclass
class RayService:
    """The application as tests see it. `env_vars` are those of its processes, which start `within_s`."""

    port: int
    fields: dict[str, Any]
    env_vars: dict[str, str] = field(default_factory=dict)
    within_s: float = READY_WITHIN_S

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def client(self) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=60.0)

    def deploy(self, num_replicas: int = 2, **user_config: Any) -> None:
        """What `serve deploy` does; returns when the application is as wanted."""
        from ray import serve
        from ray.serve.context import _get_global_client
        from ray.serve.schema import ServeDeploySchema

        overrides = {"user_config": user_config} if user_config else {}
        application = {
            "name": APPLICATION,
            "route_prefix": "/",
            "import_path": "deployments.app:build",
            "args": self.fields,
            "runtime_env": {"env_vars": self.env_vars} if self.env_vars else {},
            "deployments": [
                {"name": "SinkReplica", "num_replicas": num_replicas, **overrides},
                {"name": "Ingress", **overrides},
            ],
        }
        schema = ServeDeploySchema.model_validate({"applications": [application]})
        serve_client: Any = _get_global_client()
        serve_client.deploy_apps(schema)

        def is_running() -> bool:
            app = serve.status().applications[APPLICATION]
            assert app.status.value != "DEPLOY_FAILED", app
            return app.status.value == "RUNNING"

        self.wait(is_running, self.within_s)
        self.wait(lambda: len(self.replicas()) == num_replicas, self.within_s)

    def stop(self) -> None:
        from ray import serve

        serve.delete(APPLICATION)

    def handle(self) -> Any:
        from ray import serve

        return serve.get_app_handle(APPLICATION)

    def replicas(self) -> dict[str, dict[str, float]]:
        """The figures of the replicas that answer, by name."""
        health: dict[str, Any] = httpx.get(f"{self.url}/healthz", timeout=30.0).json()
        found = health.get("replicas") or health.get("error", {}).get("replicas") or []
        return {one["replica"]: one for one in found}

    def wait(self, check: Callable[[], bool], within_s: float = READY_WITHIN_S) -> None:
        """Poll until `check` holds; an unreachable service counts as not yet."""
        deadline_s = time.monotonic() + within_s
        while True:
            try:
                if check():
                    return
            except httpx.HTTPError:
                pass
            if time.monotonic() > deadline_s:
                raise AssertionError(f"not so after {within_s} s: {check}")
            time.sleep(0.1)

    def kill(self, replica: str) -> None:
        """SIGKILL: no chance to say goodbye."""
        os.kill(self.pid(replica), signal.SIGKILL)

    def pid(self, replica: str) -> int:
        """The process of a replica."""
        from ray._private import state

        for actor in state.actors().values():
            name = actor["Name"].split("#")
            if name[0] == "SERVE_REPLICA::" + APPLICATION and name[-1] == replica:
                pid: int = actor["Pid"]
                return pid
        raise AssertionError(f"no replica {replica}")


@contextmanager
def run_service(port: int, fields: Mapping[str, Any]) -> Iterator[RayService]:
    """The toy application on its own Valkey server."""
    directory = Path(tempfile.mkdtemp(prefix="ss-kv-", dir="/tmp"))
    server = start_valkey(directory)
    service = RayService(port, {**TOY, "redis_url": server.url, **fields})
    try:
        service.deploy()
        yield service
    finally:
        service.stop()
        server.process.kill()
        server.process.wait()
        shutil.rmtree(directory, ignore_errors=True)


@pytest.fixture(scope="session")
def toy_service(ray_cluster: int) -> Iterator[RayService]:
    """Two toy replicas and the ingress. A test that changes their number must restore it."""
    with run_service(ray_cluster, {}) as service:
        yield service
