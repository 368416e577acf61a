"""The two deployment files against the schemas that Ray ships, and against what those let through."""

from __future__ import annotations

import copy
import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import BaseModel
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.serve.schema import DeploymentSchema, ServeApplicationSchema, ServeDeploySchema

from deployments.config import ConfigError, Tunables, load_config
from engine_build.spec import EngineSpec
from tests.engine_fixtures import tiny_shape

ROOT = Path(__file__).parent.parent
DEPLOYMENTS = {"Ingress", "SinkReplica"}


def strict_problems(deploy: dict[str, Any]) -> list[str]:
    """What `ServeDeploySchema` accepts in silence: unknown keys, deployments and prefixes."""
    found = unknown_keys("", deploy, ServeDeploySchema)
    for app in deploy["applications"]:
        found += unknown_keys("applications.", app, ServeApplicationSchema)
        if not str(app.get("route_prefix", "/")).startswith("/"):
            found.append("applications.route_prefix")
        for deployment in app.get("deployments", []):
            found += unknown_keys("deployments.", deployment, DeploymentSchema)
            if deployment["name"] not in DEPLOYMENTS:
                found.append(f"deployments.name {deployment['name']}")
    return found


def unknown_keys(where: str, given: dict[str, Any], schema: type[BaseModel]) -> list[str]:
    return [where + key for key in given if key not in schema.model_fields]


SERVE_FILES = ("serve_config.yaml", "examples/serve_gpu.yaml", "examples/serve_gpu_tp.yaml")


def read(file: str) -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load((ROOT / file).read_text())
    return loaded


@pytest.fixture
def deploy(request: pytest.FixtureRequest) -> dict[str, Any]:
    return read(getattr(request, "param", SERVE_FILES[0]))


@pytest.mark.parametrize("deploy", SERVE_FILES, indirect=True)
def test_serve_config_fits_rays_schema_and_a_stricter_one(deploy: dict[str, Any]) -> None:
    ServeDeploySchema.model_validate(deploy)
    assert strict_problems(deploy) == []


@pytest.mark.parametrize("deploy", SERVE_FILES, indirect=True)
def test_serve_config_fits_ours(deploy: dict[str, Any]) -> None:
    (app,) = deploy["applications"]
    assert app["name"] == "sinkserve"
    assert app["import_path"] == "deployments.app:build"
    config = load_config(app["args"])
    assert {d["name"] for d in app["deployments"]} == DEPLOYMENTS
    for deployment in app["deployments"]:
        user_config = deployment["user_config"]
        assert set(user_config) <= set(Tunables.model_fields)
        limits = config.tuned(user_config).limits
        assert deploy["http_options"]["request_timeout_s"] > limits.turn_timeout_s


def test_the_gpu_variants_differ_in_their_engine_and_what_follows_from_it() -> None:
    one, group = (read(file)["applications"][0]["args"] for file in SERVE_FILES[1:])
    assert {key for key in {**one, **group} if one.get(key) != group.get(key)} == {
        "model",
        "served_model_name",
        "gpus_per_replica",
        "cpus_per_replica",
    }
    assert "memory_budget_bytes" not in one | group
    shape = dataclasses.replace(tiny_shape("llama"), num_heads=8, num_kv_heads=8)
    spec = EngineSpec(shape, 64, 16, "bfloat16", "bfloat16", "cuda", tp_size=4)
    assert load_config(group).gpus_for(spec) == 4
    with pytest.raises(ConfigError, match="built for 8 ranks"):
        load_config(group).gpus_for(dataclasses.replace(spec, tp_size=8))


@pytest.mark.parametrize(
    "path",
    [
        ("proxy_locations",),
        ("applications", 0, "arg"),
        ("applications", 0, "deployments", 0, "num_replica"),
    ],
)
def test_the_strict_check_sees_a_misspelt_key(
    deploy: dict[str, Any], path: tuple[str | int, ...]
) -> None:
    broken: Any = copy.deepcopy(deploy)
    node = broken
    for part in path[:-1]:
        node = node[part]
    node[path[-1]] = 1
    assert len(strict_problems(broken)) == 1


def test_the_strict_check_sees_an_unknown_deployment_and_a_bad_prefix(
    deploy: dict[str, Any],
) -> None:
    deploy["applications"][0]["deployments"][0]["name"] = "SinkReplicas"
    deploy["applications"][0]["route_prefix"] = "chat"
    assert len(strict_problems(deploy)) == 2


def cloud_example() -> str:
    text = (ROOT / "ray_cluster.yaml").read_text()
    _, marker, example = text.partition("# ---- Cloud example")
    assert marker
    return re.sub(r"^# ?", "", example.partition("\n")[2], flags=re.MULTILINE)


@pytest.mark.parametrize("which", ["local", "cloud", "gpu"])
def test_ray_cluster_is_valid(which: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    texts = {
        "local": (ROOT / "ray_cluster.yaml").read_text(),
        "cloud": cloud_example(),
        "gpu": (ROOT / "examples" / "ray_cluster_gpu.yaml").read_text(),
    }
    text = texts[which]
    config = yaml.safe_load(text)
    validate_config(prepare_config(config))
    starts = config["head_start_ray_commands"] + config["worker_start_ray_commands"]
    assert all("RAY_AUTH_MODE=" in c for c in starts if " start " in c)
    assert config["rsync_filter"] == [".gitignore"]
    if which != "local":
        assert any(t["resources"].get("GPU") for t in config["available_node_types"].values())


def test_the_gpu_cluster_has_a_node_for_a_replica_of_each_gpu_example() -> None:
    """A replica is one actor: one node must have all that it asks for, and all replicas must fit in."""
    cluster = read("examples/ray_cluster_gpu.yaml")
    nodes = [
        (t["resources"], t.get("max_workers", 0))
        for t in cluster["available_node_types"].values()
        if "GPU" in t["resources"]
    ]
    for file, gpus in (("examples/serve_gpu.yaml", 1), ("examples/serve_gpu_tp.yaml", 4)):
        (app,) = read(file)["applications"]
        cpus = load_config(app["args"]).cpus_per_replica
        replicas = app["deployments"][0]["num_replicas"]
        room = sum(count * min(has["GPU"] // gpus, int(has["CPU"] // cpus)) for has, count in nodes)
        assert room >= replicas, file


def test_validation_refuses_a_misspelt_cluster_key() -> None:
    config = yaml.safe_load((ROOT / "ray_cluster.yaml").read_text())
    config["max_worker"] = 2
    with pytest.raises(Exception, match="max_worker"):
        validate_config(prepare_config(config))
