"""The configuration: defaults that work, errors that name the field and the fix."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from deployments.app import replica_options
from deployments.config import (
    Autoscaling,
    ConfigError,
    Limits,
    SamplingDefaults,
    ServiceConfig,
    Tunables,
    load_config,
)
from engine_build.spec import TARGET_FORMATS, EngineSpec, Target
from tests.engine_fixtures import tiny_shape

REFUSED: list[tuple[dict[str, Any], str, str]] = [
    ({"replica": 2}, "replica", "Did you mean 'replicas'"),
    ({"zzz": 2}, "zzz", "Remove it"),
    ({"limits": {"max_input_token": 5}}, "limits.max_input_token", "'max_input_tokens'"),
    ({"capacity": 4}, "capacity", "greater than or equal to 8"),
    ({"capacity": "wide"}, "capacity", "'wide'"),
    ({"port": 70_000}, "port", "65535"),
    ({"weight_format": "int3"}, "weight_format", "'int8' or 'float32'"),
    ({"limits": {"turn_timeout_s": float("nan")}}, "limits.turn_timeout_s", "nan"),
    ({"default_sampling": {"temperature": 9}}, "default_sampling.temperature", "9"),
    (
        {"limits": {"default_max_tokens": 50, "max_output_tokens": 40}},
        "limits.default_max_tokens",
        "Lower it",
    ),
    ({"prefill_tokens": 2}, "prefill_tokens", "0 for one chunk"),
    ({"replicas": 2, "autoscaling": {}}, "replicas", "Remove one of the two"),
    ({"autoscaling": {"min_replicas": 3, "max_replicas": 2}}, "autoscaling", "Raise max_replicas"),
    ({"autoscaling": {"upscale_delay_s": -1}}, "autoscaling.upscale_delay_s", "equal to 0"),
    ({"redis_url": "localhost:6379"}, "redis_url", "redis://host:6379/0"),
    ({"model": "engines/x", "max_chunk": 512}, "max_chunk", "sinkserve build"),
    ({"api_keys_file": "no/such/file"}, "api_keys_file", "Create it"),
]


@pytest.mark.parametrize(("fields", "field", "fix"), REFUSED)
def test_refused_by_field_and_with_a_fix(fields: dict[str, Any], field: str, fix: str) -> None:
    with pytest.raises(ConfigError) as refusal:
        load_config(fields)
    (problem,) = refusal.value.problems
    assert problem.startswith(f"{field}: ")
    assert fix in problem


def test_every_problem_is_reported_at_once() -> None:
    with pytest.raises(ConfigError) as refusal:
        load_config({"capacity": 1, "port": -1, "nonsense": True})
    assert len(refusal.value.problems) == 3


def test_defaults_are_valid_and_survive_json() -> None:
    config = load_config({})
    again = load_config(json.loads(config.model_dump_json(exclude_unset=True)))
    assert again == config
    assert config.model_name == "smollm2-135m-instruct"
    assert config.threads_of(1) >= config.threads_of(2) >= config.threads_of(10_000) == 1


def test_the_demo_model_has_its_own_sampling_and_others_keep_the_apis() -> None:
    assert load_config({}).sampling.temperature == 0.6
    assert load_config({"model": "toy"}).sampling == SamplingDefaults()
    mine = load_config({"default_sampling": {"top_p": 0.5}})
    assert (mine.sampling.top_p, mine.sampling.params().top_p) == (0.5, 0.5)


def test_engine_directory_names_the_model(tmp_path: Path) -> None:
    config = load_config({"model": str(tmp_path / "llama-8b")})
    assert config.model_name == "llama-8b"
    assert load_config({"model": "x", "served_model_name": "y"}).model_name == "y"


def test_an_engine_directory_keeps_its_capacity_unless_overruled() -> None:
    assert load_config({"model": "engines/x"}).capacity_override is None
    assert load_config({"model": "engines/x", "capacity": 256}).capacity_override == 256
    assert load_config({}).capacity_override == 512


def test_threads_can_be_fixed() -> None:
    assert load_config({"threads_per_replica": 3}).threads_of(10_000) == 3


def test_tunables_travel_as_user_config() -> None:
    config = load_config({"model": "toy", "limits": {"max_output_tokens": 600}})
    user_config = json.loads(json.dumps(config.user_config()))
    assert set(user_config) == set(Tunables.model_fields)
    assert config.tuned(user_config).limits.max_output_tokens == 600
    user_config["limits"]["max_output_tokens"] = 700
    tuned = config.tuned(user_config)
    assert tuned.limits.max_output_tokens == 700
    assert tuned.model == "toy"
    with pytest.raises(ConfigError, match="replicas: not a tunable"):
        config.tuned({"replicas": 3})


@pytest.mark.parametrize("model", [ServiceConfig, Limits, Autoscaling, SamplingDefaults])
def test_every_field_has_bounds_or_a_description(model: type[ServiceConfig]) -> None:
    for name, field in model.model_fields.items():
        nested = name in ("limits", "autoscaling")
        assert field.description or field.metadata or nested, name


def spec_of(target: Target, tp_size: int = 1) -> EngineSpec:
    weights = TARGET_FORMATS[target][0]
    return EngineSpec(tiny_shape("llama"), 64, 16, weights, "float16", target, tp_size)


@pytest.mark.parametrize(
    ("target", "tp_size", "fields", "gpus"),
    [
        ("cpu", 1, {}, 0),
        ("cpu", 2, {"gpus_per_replica": 0}, 0),
        ("cuda", 1, {}, 1),
        ("cuda", 1, {"gpus_per_replica": 1}, 1),
        ("tensorrt", 8, {}, 8),
        ("cuda", 1, {"gpus_per_replica": 0.5, "memory_budget_bytes": 1 << 30}, 0.5),
    ],
)
def test_a_replica_gets_the_gpus_that_its_engine_was_built_for(
    target: Target, tp_size: int, fields: dict[str, Any], gpus: float
) -> None:
    config = load_config({"model": "engines/x", **fields})
    assert config.gpus_for(spec_of(target, tp_size)) == gpus


@pytest.mark.parametrize(
    ("target", "tp_size", "fields", "fix"),
    [
        ("cpu", 1, {"gpus_per_replica": 1}, "runs on CPUs. Remove it"),
        ("cuda", 4, {"gpus_per_replica": 1}, "built for 4 ranks, one GPU each. Remove it"),
        ("cuda", 1, {"gpus_per_replica": 2}, "runs on one GPU. Remove it, or build with --tp"),
        ("tensorrt", 1, {"gpus_per_replica": 0}, "runs on one GPU"),
        ("cuda", 1, {"gpus_per_replica": 0.5}, "Set memory_budget_bytes"),
    ],
)
def test_other_gpus_are_refused_with_a_fix(
    target: Target, tp_size: int, fields: dict[str, Any], fix: str
) -> None:
    config = load_config({"model": "engines/x", **fields})
    with pytest.raises(ConfigError, match=f"gpus_per_replica: .*{re.escape(fix)}"):
        config.gpus_for(spec_of(target, tp_size))


@pytest.mark.parametrize("tp_size", [1, 2, 4, 8])
def test_a_group_is_one_actor_with_all_its_gpus(
    tp_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray places an actor on one node, so that its ranks share one."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    options = replica_options(load_config({"model": "engines/x"}), spec_of("cuda", tp_size))
    assert options["ray_actor_options"]["num_gpus"] == tp_size
    assert "placement_group_bundles" not in options


def test_autoscaling_reaches_serve_with_its_delays() -> None:
    fields = {"min_replicas": 2, "max_replicas": 5, "downscale_delay_s": 7.0}
    config = load_config({"model": "toy", "autoscaling": fields})
    options = replica_options(config, spec_of("cpu"))
    assert "num_replicas" not in options
    asked = options["autoscaling_config"]
    assert (asked.min_replicas, asked.max_replicas, asked.target_ongoing_requests) == (2, 5, 8)
    assert (asked.upscale_delay_s, asked.downscale_delay_s) == (30, 7)


def test_an_engine_on_cpus_without_a_budget_gets_a_gibibyte() -> None:
    assert load_config({}).memory_budget_bytes is None
    assert load_config({}).cpu_budget_bytes == 1 << 30
    assert load_config({"memory_budget_bytes": 5000}).cpu_budget_bytes == 5000
