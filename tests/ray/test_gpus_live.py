"""The GPU examples on a Ray cluster whose GPUs are numbers in Ray's books: see gpu_cluster.py."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from engine.verify_figures import TOLERANCES, Verification
from engine.verify_report import REPORT, Verified, write_report
from engine_build.manifest import load_engine_spec
from tests.product import build_calm
from tests.valkey_fixture import ValkeyServer

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.xdist_group("ray")]


def verified_on_a_gpu(engine_dir: Path) -> Path:
    of = Verified.of(engine_dir, load_engine_spec(engine_dir), ("NVIDIA H100",))
    passed = Verification((), (), TOLERANCES["bfloat16"])
    write_report(engine_dir / REPORT, of, passed, {})
    return engine_dir


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory, valkey_server: ValkeyServer) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("gpus")
    engines = [
        verified_on_a_gpu(
            build_calm(folder, weight_format="bfloat16", family="llama-mha-tied", tp_size=size)
        )
        for size in (1, 4)
    ]
    environment = {
        k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "RAY_ADDRESS")
    }
    subprocess.run(
        [
            *(sys.executable, "-m", "tests.ray.gpu_cluster"),
            *(str(engine) for engine in engines),
            *(valkey_server.url, str(folder / "found.json")),
        ],
        env=environment | {"PYTHONPATH": str(Path(__file__).parents[2])},
        cwd=Path(__file__).parents[2],
        check=True,
        timeout=900,
    )
    result: dict[str, Any] = json.loads((folder / "found.json").read_text())
    return result


def test_a_replica_asks_for_the_gpus_of_its_engine(found: dict[str, Any]) -> None:
    """serve_gpu.yaml says nothing of GPUs; serve_gpu_tp.yaml names the same number as the engine."""
    assert found["asked"] == {
        "one": {"num_cpus": 2, "num_gpus": 1},
        "four": {"num_cpus": 5, "num_gpus": 4},
    }


def test_a_group_waits_for_a_node_that_has_all_its_gpus(found: dict[str, Any]) -> None:
    """Two nodes with two GPUs each are not one with four."""
    state, said = found["groups"]["pending"]
    assert state == "DEPLOYING"
    assert "to be scheduled" in said
    assert '"GPU": 4' in said.replace("'", '"')
    (placed,) = found["groups"]["placed"]
    assert placed["node"] == found["groups"]["five"]
    assert placed["node"] not in found["groups"]["two"]
    visible = placed["gpus"].split(",")
    assert len(set(visible)) == 4
    assert visible == placed["assigned"]


def test_replicas_of_one_gpu_see_one_each_and_never_the_same(found: dict[str, Any]) -> None:
    places = [(one["node"], one["gpus"]) for one in found["singles"]]
    assert len(set(places)) == len(places) == 9
    assert all(len(one["assigned"]) == 1 and one["gpus"] for one in found["singles"])


def test_a_deployment_says_why_it_does_not_start(found: dict[str, Any]) -> None:
    """Verified on a GPU that is not here; GPUs that the engine was not built for."""
    for which in ("one", "four"):
        state, said = found["deployed"][which]
        assert state == "DEPLOY_FAILED"
        assert "its verify.json is of NVIDIA H100, this machine has none" in said
        assert "Run: sinkserve verify" in said
    state, said = found["deployed"]["wrong"]
    assert state == "DEPLOY_FAILED"
    assert "gpus_per_replica: 2, but" in said
    assert "built for 4 ranks" in said
