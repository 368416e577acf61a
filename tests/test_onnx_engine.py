"""What is particular to the CPU engine: its memory, its files, its rows, its 8-bit weights."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from safetensors import safe_open

from engine.onnx_engine import OnnxEngine
from engine.protocol import EngineDead, Row, StepPlan
from engine.rotary import Rotary
from engine_build.engine_names import GRAPH_FILE, LEVELS, SCALES, WEIGHTS_FILE
from engine_build.graph import export_graph
from engine_build.quantize import BLOCK, dequantise, quantise, stored_shapes
from engine_build.spec import EngineSpec, RopeSpec, SpecError, WeightFormat, kv_dtype_for
from engine_build.weights import merged_weights
from tests.engine_fixtures import (
    cached_tensors,
    feed,
    make_engine,
    random_tokens,
    row_for,
    tiny_shape,
    window_of,
)


def export(folder: Path, family: str = "llama", weight_format: WeightFormat = "int8") -> EngineSpec:
    spec = EngineSpec(tiny_shape(family), 32, 12, weight_format, kv_dtype_for(weight_format))
    export_graph(spec, cached_tensors(family), folder, lambda fraction: None)
    (folder / "spec.json").write_text(spec.to_json())
    return spec


def test_as_many_slots_as_fit_the_budget(tmp_path: Path) -> None:
    spec = export(tmp_path)
    for slots, spare in [(1, 0), (3, spec.slot_bytes - 1), (7, 1)]:
        budget = slots * spec.slot_bytes + spare
        assert OnnxEngine(tmp_path, memory_budget_bytes=budget).max_resident == slots


def test_a_budget_below_one_slot_is_refused(tmp_path: Path) -> None:
    spec = export(tmp_path)
    with pytest.raises(SpecError, match=r"memory_budget_bytes: .* do not hold one kv_slot"):
        OnnxEngine(tmp_path, memory_budget_bytes=spec.slot_bytes - 1)
    with pytest.raises(SpecError, match="threads"):
        OnnxEngine(tmp_path, memory_budget_bytes=spec.slot_bytes, threads=0)


def test_another_capacity_needs_no_other_files(tmp_path: Path) -> None:
    spec = export(tmp_path, weight_format="float32")
    wide = OnnxEngine(tmp_path, memory_budget_bytes=8 * spec.slot_bytes, capacity=96)
    assert wide.spec.capacity == 96
    tokens = random_tokens(1, 90)
    got = feed(wide, tokens, row_for(window_of(wide.spec, 4)), [12])
    native = make_engine(capacity=96, max_chunk=12)
    assert np.allclose(got, feed(native, tokens, row_for(window_of(native.spec, 4)), [12]))


@pytest.mark.parametrize("weight_format", ["int8", "float32"])
@pytest.mark.parametrize("family", ["llama", "llama-mha-tied", "mistral"])
def test_weights_are_stored_once(tmp_path: Path, family: str, weight_format: WeightFormat) -> None:
    """The graph holds structure only; the file is a valid safetensors file with each weight once."""
    export(tmp_path, family, weight_format)
    graph = onnx.load(tmp_path / GRAPH_FILE, load_external_data=False).graph
    inside = [t for t in graph.initializer if t.data_location != onnx.TensorProto.EXTERNAL]
    assert sum(np.prod(t.dims) for t in inside) < 100
    with safe_open(tmp_path / WEIGHTS_FILE, "np") as file:
        stored = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    for weight in merged_weights(tiny_shape(family)):
        wanted = weight.load(cached_tensors(family))
        if weight.name in stored:
            assert (stored[weight.name] == wanted).all()
        else:
            levels, scales = stored[weight.name + LEVELS], stored[weight.name + SCALES]
            got = dequantise(levels, scales, *wanted.shape)
            assert np.abs(got - wanted).max() <= scales.max() * 0.51
    assert (tmp_path / WEIGHTS_FILE).stat().st_size < 8192 + sum(a.nbytes for a in stored.values())


def test_progress_only_grows_and_reaches_one(tmp_path: Path) -> None:
    seen: list[float] = []
    spec = EngineSpec(tiny_shape("llama"), 32, 12)
    export_graph(spec, cached_tensors("llama"), tmp_path, seen.append)
    assert seen == sorted(seen)
    assert seen[0] == 0.0
    assert seen[-1] == 1.0


@pytest.mark.parametrize(("rows", "columns"), [(32, 64), (7, 50), (33, 256)])
def test_quantised_weights_are_within_half_a_step(rows: int, columns: int) -> None:
    weights = np.random.default_rng(0).standard_normal((rows, columns)).astype(np.float32)
    weights[2] = 0
    levels, scales = quantise(weights)
    assert (levels.shape, scales.shape) == stored_shapes(rows, columns)
    error = np.abs(dequantise(levels, scales, rows, columns) - weights)
    assert (error <= 0.51 * np.abs(weights).max(axis=1, keepdims=True) / 127).all()
    assert error[2].max() == 0


def test_weights_that_were_q8_0_stay_what_they_were() -> None:
    rng = np.random.default_rng(0)
    levels = rng.integers(-127, 128, (5, 4, BLOCK))
    levels[..., 0] = 127
    scales = (rng.random((5, 4, 1)) + 0.01).astype(np.float16).astype(np.float32)
    weights = (levels * scales).astype(np.float32).reshape(5, -1)
    assert (dequantise(*quantise(weights), *weights.shape) == weights).all()


def test_angles_far_out_are_those_of_exact_arithmetic() -> None:
    """Against integers: with theta = 1 and a linear factor the angle is index / factor exactly."""
    rope = RopeSpec(theta=1.0, rotary_dim=2, scaling="linear", factor=8.0)
    cos, sin = Rotary(rope).cos_sin(np.array([[16_000_000 + 3]]))
    angle = (16_000_000 + 3) / 8
    assert cos.shape == sin.shape == (1, 1, 1)
    assert abs(cos[0, 0, 0] - np.cos(angle)) < 1e-7
    assert abs(sin[0, 0, 0] - np.sin(angle)) < 1e-7


def test_an_empty_plan_is_no_work() -> None:
    assert make_engine().step(StepPlan(())).rows == ()


def test_a_failing_run_kills_the_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = make_engine()
    row = Row(0, 0, random_tokens(1, 3), window_of(engine.spec, 4))

    def fail(run: object, inputs: object) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr("engine.graph_run.GraphRun.execute", fail)
    with pytest.raises(EngineDead, match="out of memory"):
        engine.step(StepPlan((row,)))


def test_time_is_counted_by_phase() -> None:
    engine = make_engine()
    window = window_of(engine.spec, 4)
    feed(engine, random_tokens(1, 41), row_for(window), [20, 20, 1])
    times = engine.times
    assert (times.num_steps, times.num_prefill_tokens, times.num_decode_tokens) == (3, 40, 1)
    assert min(times.prepare_s, times.run_s, times.sample_s) > 0
