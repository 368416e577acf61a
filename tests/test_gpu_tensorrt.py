"""The TensorRT engine as a subject of the GPU benchmark, over the stand-in for its runtime: every section's
code has run, and what it writes is judged, before it meets a card."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

torch = pytest.importorskip("torch")

from benchmarks.gpu.bars import evaluate  # noqa: E402
from benchmarks.gpu.gpu_tables import gpu_part  # noqa: E402
from benchmarks.gpu.shapes import TINY_GRID  # noqa: E402
from benchmarks.gpu.subject_process import SubjectProcess  # noqa: E402
from benchmarks.gpu.tensorrt_subject import TensorRtSubjects, plan_weights  # noqa: E402
from engine.cuda_weights import Source, Stored  # noqa: E402
from engine.tensorrt_engine import RuntimeOptions  # noqa: E402
from engine_build.engine_names import GRAPH_FILE  # noqa: E402
from engine_build.graph import graph_of_inputs  # noqa: E402
from engine_build.plan_inputs import cache_row_bytes  # noqa: E402
from engine_build.spec import EngineSpec  # noqa: E402
from engine_build.weights import MergedWeight  # noqa: E402
from tests.gpu_sample import sample_document  # noqa: E402
from tests.tensorrt_on_onnx import OnnxPlanRuntime  # noqa: E402

LIMITS = {"bandwidth": 1e10, "matmul": 1e10, "l2_bytes": 1 << 20}
GIVEN = {"capabilities": ["current"], "limits": LIMITS}
POINT = {"capacity": TINY_GRID.capacities[0], "format": "float32"}


class StandIn(OnnxPlanRuntime):
    """A cache begins with keys of some kind, as on a card: old conversations are set, not streamed."""

    def __init__(
        self, engine_dir: Path, spec: EngineSpec, options: RuntimeOptions, weights: Source
    ) -> None:
        budget = options.memory_budget_bytes
        assert budget is not None
        assert budget % cache_row_bytes(spec) == 0
        values = {name: tensor.numpy() for name, tensor in plan_weights(spec, weights).items()}
        super().__init__(engine_dir, spec, budget // cache_row_bytes(spec), values)
        for cache in self.caches.values():
            cache[:] = np.random.default_rng(0).standard_normal(cache.shape)


class Plans:
    """Writes the graph where a plan would be built; counts."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, ...]] = []

    def __call__(
        self, spec: EngineSpec, folder: Path, capabilities: Sequence[str]
    ) -> dict[str, Any]:
        self.asked.append(tuple(capabilities))
        onnx.save_model(graph_of_inputs(spec), folder / GRAPH_FILE)
        return {"plan_bytes": (folder / GRAPH_FILE).stat().st_size}


def process_over(plans: Plans, folder: Path, open_runtime: Any = StandIn) -> SubjectProcess:
    subjects = TensorRtSubjects(open_runtime, plans, folder / "plans")
    return SubjectProcess("cpu", "tiny", folder, subjects)


def unscaled(
    engine_dir: Path, spec: EngineSpec, options: RuntimeOptions, weights: Source
) -> StandIn:
    """Forgets the scale of attention that is folded into q."""

    def load(weight: MergedWeight) -> Stored:
        values = weights(weight).values.clone()
        if weight.name.endswith("qkv"):
            rows = spec.model.num_heads * spec.model.head_dim
            values[:rows] *= spec.model.head_dim**0.5
        return Stored(values)

    return StandIn(engine_dir, spec, options, load)


def test_a_right_engine_passes_every_check_and_a_wrong_one_fails(tmp_path: Path) -> None:
    parameters = {**POINT, "chunk": 8}
    found = process_over(Plans(), tmp_path).measure("correctness", "tiny", parameters, GIVEN)
    assert found["target"] == "tensorrt-rtx"
    bars = evaluate({"correctness/tiny": found})
    assert len(bars) == 12
    assert all(bar.passed for bar in bars), [str(bar) for bar in bars]
    assert all("on TensorRT-RTX" in bar.point for bar in bars)
    wrong = process_over(Plans(), tmp_path / "wrong", unscaled)
    (tmp_path / "wrong").mkdir()
    found = wrong.measure("correctness", "tiny", parameters, GIVEN)
    assert not any(b.passed for b in evaluate({"correctness/tiny": found}) if b.bar == 1e-3)


def test_sections_are_measured_judged_and_printed_and_share_a_plan(tmp_path: Path) -> None:
    plans = Plans()
    process = process_over(plans, tmp_path)
    sections = {
        f"{section}/tiny/engine=tensorrt": process.measure(section, "tiny", POINT, GIVEN)
        for section in ("decode", "prefill", "age")
    }
    assert plans.asked == [("current",)]
    sections = json.loads(json.dumps(sections))
    assert [row["batch"] for row in sections["decode/tiny/engine=tensorrt"]["points"]] == [1, 2]
    for found in sections.values():
        assert found["plan"]["plan_for"] == "current"
        assert "overlap" not in found
    assert {bar.name for bar in evaluate(sections)} == {
        "decode, share of the roofline",
        "prefill, share of the matmul rate",
        "ms per token over age, largest gap",
    }
    text = gpu_part({**sample_document(), "sections": sections})
    assert text.count("tiny on TensorRT-RTX") >= 2 + 1 + 2 + 3
    assert "### TensorRT plans" in text


def test_a_plan_is_kept_for_the_next_process_but_not_for_another_way(tmp_path: Path) -> None:
    plans = Plans()
    process_over(plans, tmp_path).measure("age", "tiny", POINT, GIVEN)
    process_over(plans, tmp_path).measure("age", "tiny", POINT, GIVEN)
    assert len(plans.asked) == 1
    process_over(plans, tmp_path).measure("age", "tiny", POINT, {**GIVEN, "capabilities": []})
    assert plans.asked == [("current",), ()]


def test_weights_of_a_plan_are_its_inputs(tmp_path: Path) -> None:
    """Names, shapes and types of what is drawn are those that the graph declares."""
    from benchmarks.gpu.shapes import QWEN2_5_0_5B, TINY, spec_for
    from engine.cuda_weights import random_weights

    small = dataclasses.replace(
        QWEN2_5_0_5B, num_layers=1, hidden_size=64, intermediate_size=64, vocab_size=128
    )
    for shape, weight_format in ((TINY, "bfloat16"), (small, "float16"), (TINY, "float32")):
        spec = spec_for(shape, 32, 8, weight_format, "tensorrt-rtx")  # type: ignore[arg-type]
        drawn = plan_weights(spec, random_weights(spec, 0, torch.device("cpu")))
        declared = {
            value.name: tuple(d.dim_value for d in value.type.tensor_type.shape.dim)
            for value in graph_of_inputs(spec).graph.input
        }
        assert drawn.keys() < declared.keys()
        assert all(tuple(tensor.shape) == declared[name] for name, tensor in drawn.items())
        assert {str(tensor.dtype) for tensor in drawn.values()} == {f"torch.{weight_format}"}
