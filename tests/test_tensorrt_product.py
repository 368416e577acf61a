"""From a checkpoint to answers, `--target tensorrt-rtx`: a real plan, its graph run by ONNX Runtime."""

from __future__ import annotations

import asyncio
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from deployments.config import ConfigError
from engine_build.plan import PLAN_FILE
from engine_build.spec import EngineSpec, WeightFormat
from tests.product import build_calm, doctored
from tests.product_service import QUESTIONS, Service, start, verify
from tests.tensorrt_on_onnx import OnnxPlanRuntime

pytest.importorskip("tensorrt_rtx")

SLOTS = 4


def on_onnx(engine_dir: Path, spec: EngineSpec, options: object) -> OnnxPlanRuntime:
    return OnnxPlanRuntime(engine_dir, spec, SLOTS)


@pytest.fixture(autouse=True)
def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """For the one file that needs a GPU."""
    runtime = SimpleNamespace(TensorRtRuntime=on_onnx)
    monkeypatch.setitem(sys.modules, "engine.tensorrt_runtime", runtime)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("product")


@pytest.fixture(scope="module")
def built(folder: Path) -> Path:
    return build_calm(folder, "tensorrt-rtx")


def test_it_serves_what_was_verified_as_the_cpu_engine_does(built: Path, folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"no verify.json.*Run: sinkserve verify"):
        start(built)
    done = verify(built)
    assert done.exit_code == 0, done.output
    on_cpu, here = Service(build_calm(folder, "cpu")), Service(built)
    asyncio.run(on_cpu.converse(QUESTIONS))
    asyncio.run(here.converse(QUESTIONS, dies_before=2))
    assert here.replies == on_cpu.replies
    assert here.recoveries == ["none", "none", "exact"]
    for changes, problem in (
        ({"libraries": {"tensorrt_rtx": "1.0"}}, "tensorrt_rtx 1.0, this machine has"),
        ({"manifest_sha256": "0"}, "another build"),
    ):
        report = (built / "verify.json").read_bytes()
        doctored(built, **changes)
        with pytest.raises(ConfigError, match=problem):
            start(built)
        (built / "verify.json").write_bytes(report)


def test_a_plan_has_one_capacity(built: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(built, tmp_path / "copy")
    (copy / "verify.json").unlink(missing_ok=True)
    done = verify(copy, "--capacity", "24")
    assert done.exit_code == 1
    assert "the plan was built for 32 tokens, not 24" in done.output
    assert not (copy / "verify.json").exists()


def test_a_plan_that_was_exchanged_is_not_verified(built: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(built, tmp_path / "copy")
    plan = copy / PLAN_FILE
    plan.write_bytes(plan.read_bytes()[::-1])
    done = verify(copy)
    assert done.exit_code == 1
    assert PLAN_FILE in done.output


@pytest.mark.parametrize("weight_format", ["float16", "int8"])
def test_verify_passes_what_onnx_runtime_runs(folder: Path, weight_format: WeightFormat) -> None:
    done = verify(build_calm(folder, "tensorrt-rtx", weight_format))
    assert done.exit_code == 0, done.output
