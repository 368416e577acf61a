"""The sections of the GPU benchmark, with the CPU engine standing in for the CUDA engine.

What is tested is the benchmark: that its checks pass a right engine and catch a wrong one, and that what it
writes can be judged and printed. The CUDA engine itself goes through the same in test_gpu_run.py.
"""

from __future__ import annotations

import dataclasses
import json
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from engine.cuda_options import CudaOptions
from engine.onnx_engine import OnnxEngine
from engine.protocol import Engine, Row, StepPlan, StepResult
from engine.window import SinkWindow
from engine_build.graph import export_graph
from engine_build.spec import EngineSpec

torch = pytest.importorskip("torch")

from benchmarks.gpu.age import measure_age  # noqa: E402
from benchmarks.gpu.bars import evaluate  # noqa: E402
from benchmarks.gpu.correctness import Checks, relative_error  # noqa: E402
from benchmarks.gpu.decode import measure_decode  # noqa: E402
from benchmarks.gpu.gpu_tables import gpu_part  # noqa: E402
from benchmarks.gpu.limits import measure_limits  # noqa: E402
from benchmarks.gpu.overheads import measure_overheads  # noqa: E402
from benchmarks.gpu.prefill import measure_prefill  # noqa: E402
from benchmarks.gpu.random_weights import random_tensors  # noqa: E402
from benchmarks.gpu.reference import FloatReference  # noqa: E402
from benchmarks.gpu.restore import measure_restore  # noqa: E402
from benchmarks.gpu.roofline import WORKSPACE_BYTES, Limits  # noqa: E402
from benchmarks.gpu.shapes import TINY, TINY_GRID, Point  # noqa: E402
from benchmarks.gpu.subject import Subject  # noqa: E402
from tests.gpu_sample import sample_document  # noqa: E402

POINT = Point("tiny", 16, 8, "float32")
EFFORT = TINY_GRID.effort
LIMITS = Limits(bandwidth=1e10, matmul=1e10, l2_bytes=1 << 20)


def stand_in(spec: EngineSpec, slots: int, tensors: Mapping[str, Any]) -> OnnxEngine:
    """The CPU engine with a kv_slot of the same size."""
    cpu = EngineSpec(
        spec.model,
        spec.capacity,
        spec.max_chunk,
        "float32",
        "float32",
        rewind_tokens=spec.slot_tokens - spec.capacity,
    )
    values = {name: tensor.numpy() for name, tensor in tensors.items()}
    with tempfile.TemporaryDirectory() as folder:
        export_graph(cpu, values, Path(folder), lambda fraction: None)
        (Path(folder) / "spec.json").write_text(cpu.to_json())
        return OnnxEngine(Path(folder), memory_budget_bytes=slots * cpu.slot_bytes)


class Altered:
    """An engine that changes each row before it runs it."""

    def __init__(self, engine: OnnxEngine, change: Callable[[Row], Row]) -> None:
        self._engine, self._change = engine, change
        self.spec, self.max_resident = engine.spec, engine.max_resident

    def step(self, plan: StepPlan) -> StepResult:
        return self._engine.step(StepPlan(tuple(self._change(row) for row in plan.rows)))

    def close(self) -> None:
        self._engine.close()


def one_key_too_few(row: Row) -> Row:
    window = row.window
    shorter = SinkWindow(window.sink_tokens, window.window_tokens - 1, window.ring_tokens)
    return dataclasses.replace(row, window=shorter)


def forgets_the_replay(row: Row) -> Row:
    """Sees what another conversation left in the slot."""
    return dataclasses.replace(row, window_start=0)


def errors(engine: Engine) -> dict[str, bool]:
    """Which checks passed."""
    reference = FloatReference(TINY, random_tensors(TINY, "cpu", torch.float32))
    found = Checks(engine, reference, "cpu").run(12)
    return {
        check["name"]: (check["error"] >= check["bar"])
        if check.get("at_least")
        else (check["error"] <= check["bar"])
        for check in found
    }


@pytest.fixture(scope="module")
def engine() -> OnnxEngine:
    tensors = random_tensors(TINY, "cpu", torch.float32)
    return stand_in(POINT.spec, 4, tensors)


def test_a_right_engine_passes_every_check(engine: OnnxEngine) -> None:
    passed = errors(engine)
    assert len(passed) == 12
    assert all(passed.values()), passed


def test_a_window_too_short_fails(engine: OnnxEngine) -> None:
    passed = errors(Altered(engine, one_key_too_few))
    assert not passed["mixed chunks, ring wraps"]
    assert not passed["one token at a time, ring wraps"]
    assert not passed["at token 16,000,000"]
    assert not passed["wrong rule further away, times: one key too few"]


def test_a_replay_that_sees_old_keys_fails(engine: OnnxEngine) -> None:
    passed = errors(Altered(engine, forgets_the_replay))
    assert not passed["bounded replay into a used slot"]
    assert passed["mixed chunks, ring wraps"]


def test_what_is_not_finite_is_an_infinite_error() -> None:
    import numpy as np

    wanted = np.ones((2, 3), np.float32)
    assert relative_error(wanted * np.nan, wanted) == float("inf")
    assert relative_error(wanted, wanted) == 0.0


@pytest.fixture(scope="module")
def measured() -> dict[str, Any]:
    """Every section of one tiny point, as a run would save it."""
    subject = Subject("cpu", 8 << 30, construct=stand_in_subject)
    batches = (1, 2)
    sections = {
        "limits/all": measure_limits("cpu", {"tiny": TINY}, tiny=True),
        "decode/tiny": measure_decode(subject, POINT, batches, LIMITS, EFFORT),
        "prefill/tiny": measure_prefill(subject, POINT, LIMITS, EFFORT),
        "age/tiny": measure_age(subject, POINT, (3, 40, 4_000_000), EFFORT),
        "restore/tiny": measure_restore(subject, POINT, (1, 2), EFFORT),
        "overheads/tiny": measure_overheads(subject, POINT, batches, EFFORT),
    }
    subject.close()
    return sections


def stand_in_subject(
    spec: EngineSpec, slots: int, device: str, options: CudaOptions, tensors: Any
) -> OnnxEngine:
    return stand_in(spec, slots, tensors or random_tensors(spec.model, device, torch.float32))


def test_sections_can_be_saved_judged_and_printed(measured: dict[str, Any]) -> None:
    sections = json.loads(json.dumps(measured))
    document = {**sample_document(), "sections": sections}
    assert len(evaluate(sections)) == 4
    text = gpu_part(document)
    assert text.count("| tiny") >= 2 + 1 + 2 + 2 + 2 * 6


def test_ages_below_a_full_cache_are_left_out(measured: dict[str, Any]) -> None:
    assert [row["age"] for row in measured["age/tiny"]["ages"]] == [40, 4_000_000]


def test_points_that_do_not_fit_are_skipped_and_say_so() -> None:
    spec = POINT.spec
    memory = WORKSPACE_BYTES + (1 << 20) + 2 * spec.slot_bytes
    subject = Subject("cpu", memory, construct=stand_in_subject)
    found = measure_decode(subject, POINT, (1, 1_000_000), LIMITS, EFFORT)
    subject.close()
    assert [row["batch"] for row in found["points"]] == [1]
    assert "1000000 kv_slots" in found["skipped"][0]["reason"]
