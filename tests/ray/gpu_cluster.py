"""A process of its own with a Ray cluster whose GPUs exist in Ray's books alone: what a replica asks for,
where Ray puts it, what it says when it cannot.

    python -m tests.ray.gpu_cluster ENGINE_OF_ONE ENGINE_OF_FOUR OUT

Writes what it saw to OUT, JSON. The engines are those of the GPU examples, tiny.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ |= {
    "RAY_AUTH_MODE": "disabled",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_SERVE_LOG_TO_STDERR": "0",
    "RAY_SERVE_SLOW_STARTUP_WARNING_S": "2",
    "RAY_SERVE_SLOW_STARTUP_WARNING_PERIOD_S": "1",
}

import ray
import yaml
from ray import serve
from ray.cluster_utils import Cluster
from ray.serve.schema import ServeDeploySchema

from deployments.app import replica_options
from deployments.config import load_config
from deployments.engine_files import locate_engine
from tests.ray_fixture import free_port

ROOT = Path(__file__).parents[2]
WITHIN_S = 120.0


class Probe:
    """Stands for a replica: notes down where it is and which GPUs it sees."""

    def __init__(self, folder: str) -> None:
        context = ray.get_runtime_context()
        seen = {
            "node": context.get_node_id(),
            "gpus": os.environ.get("CUDA_VISIBLE_DEVICES", ""),
            "assigned": context.get_accelerator_ids()["GPU"],
        }
        Path(folder, f"{os.getpid()}.json").write_text(json.dumps(seen))


def example(name: str, model: str, redis_url: str) -> dict[str, Any]:
    """A file of examples/ with the tiny engine in the place of its model, a Redis that is there, a port of
    our own."""
    deploy: dict[str, Any] = yaml.safe_load((ROOT / "examples" / name).read_text())
    deploy["http_options"] = {"host": "127.0.0.1", "port": 0}
    (app,) = deploy["applications"]
    app["args"] |= {"model": model, "redis_url": redis_url}
    return deploy


def requests_of(deploy: dict[str, Any]) -> dict[str, Any]:
    """What the service asks Ray for, for each of its replicas."""
    config = load_config(deploy["applications"][0]["args"])
    options = replica_options(config, locate_engine(config).spec)
    asked: dict[str, Any] = options["ray_actor_options"]
    return asked


def start(asked: dict[str, Any], num_replicas: int) -> Path:
    folder = tempfile.mkdtemp(prefix="ss-gpus-")
    deployment: Any = serve.deployment(Probe)
    probes = deployment.options(num_replicas=num_replicas, ray_actor_options=asked)
    serve.run_many(
        [serve.RunTarget(probes.bind(folder), name="probe", route_prefix=None)],
        wait_for_ingress_deployment_creation=False,
        wait_for_applications_running=False,
    )
    return Path(folder)


def status(name: str = "probe") -> tuple[str, str]:
    """State of an application, and all that is said about it."""
    app = serve.status().applications[name]
    return str(app.status.value), " ".join(
        [app.message, *(one.message for one in app.deployments.values())]
    )


def wait(check: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + WITHIN_S
    while not check():
        if time.monotonic() > deadline_s:
            raise TimeoutError(f"{check}: {status()}")
        time.sleep(0.2)


def seen_in(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(path.read_text()) for path in sorted(folder.iterdir())]


def groups(cluster: Any, asked: dict[str, Any]) -> dict[str, Any]:
    """Replicas of four GPUs where every node has two; then one with five comes."""
    two = [cluster.add_node(num_cpus=16, num_gpus=2).node_id for _ in range(2)]
    folder = start(asked, 1)
    wait(lambda: "scheduled" in status()[1])
    pending = status()
    assert not seen_in(folder)
    five = cluster.add_node(num_cpus=16, num_gpus=5).node_id
    wait(lambda: status()[0] == "RUNNING")
    placed = seen_in(folder)
    serve.delete("probe")
    return {"pending": pending, "placed": placed, "five": five, "two": two}


def singles(asked: dict[str, Any]) -> list[dict[str, Any]]:
    """A replica on each of nine GPUs of three nodes."""
    folder = start(asked, 9)
    wait(lambda: status()[0] == "RUNNING")
    seen = seen_in(folder)
    serve.delete("probe")
    return seen


def deployed(deploy: dict[str, Any]) -> tuple[str, str]:
    """What becomes of an example as `serve deploy` takes it, where there is no GPU to compute on."""
    from ray.serve.context import _get_global_client

    (app,) = deploy["applications"]
    for one in app["deployments"]:
        one |= {"num_replicas": 1}
    client: Any = _get_global_client()
    client.deploy_apps(ServeDeploySchema.model_validate(deploy))
    wait(lambda: status(app["name"])[0] in ("DEPLOY_FAILED", "UNHEALTHY"))
    said = status(app["name"])
    serve.delete(app["name"])
    return said


def main(one: str, four: str, redis_url: str, out: str) -> None:
    head: dict[str, Any] = {
        "num_cpus": 4,
        "num_gpus": 0,
        "include_dashboard": False,
        "object_store_memory": 100 << 20,
        "temp_dir": tempfile.mkdtemp(prefix="ss-ray-", dir="/tmp"),
    }
    cluster: Any = Cluster(initialize_head=True, head_node_args=head)
    ray.init(address=cluster.address, log_to_driver=False)
    serve.start(http_options={"host": "127.0.0.1", "port": free_port()})
    single = example("serve_gpu.yaml", one, redis_url)
    group, wrong = (example("serve_gpu_tp.yaml", four, redis_url) for _ in range(2))
    wrong["applications"][0]["args"]["gpus_per_replica"] = 2
    found: dict[str, Any] = {"asked": {"one": requests_of(single), "four": requests_of(group)}}
    found["groups"] = groups(cluster, found["asked"]["four"])
    found["singles"] = singles(found["asked"]["one"])
    found["deployed"] = {
        "one": deployed(single),
        "four": deployed(group),
        "wrong": deployed(wrong),
    }
    Path(out).write_text(json.dumps(found))
    serve.shutdown()  # type: ignore[no-untyped-call]
    ray.shutdown()
    cluster.shutdown()
    shutil.rmtree(head["temp_dir"], ignore_errors=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
