"""Plans that TensorRT-RTX really builds, without a GPU; what it says where it cannot."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from engine.tensorrt_engine import RuntimeOptions, TensorRtEngine
from engine_build import plan
from engine_build.build import BuildOptions, build_engine
from engine_build.engine_names import GRAPH_FILE, WEIGHTS_FILE
from engine_build.graph import export_graph, graph_of_inputs
from engine_build.hf_config import shape_from_config
from engine_build.manifest import load_engine_spec, load_manifest
from engine_build.plan import PLAN_FILE, PlanOptions, build_plan, plan_file
from engine_build.plan_inputs import cache_row_bytes, num_places
from engine_build.plan_profiles import Size, decode_buckets, plan_profiles, profile_for
from engine_build.spec import (
    TARGET_FORMATS,
    EngineSpec,
    SpecError,
    Target,
    WeightFormat,
    kv_dtype_for,
)
from engine_build.tensors import expected_tensors
from engine_build.weights import read_weight_file
from tests.engine_fixtures import cached_tensors, tiny_shape
from tests.tiny_models import tiny_config, write_hf_folder


def spec_of(
    weight_format: WeightFormat = "bfloat16",
    target: Target = "tensorrt-rtx",
    family: str = "llama",
    max_chunk: int = 12,
) -> EngineSpec:
    """One layer of a tiny model: a plan takes time for each."""
    shape = dataclasses.replace(tiny_shape(family), num_layers=1)
    return EngineSpec(shape, 32, max_chunk, weight_format, kv_dtype_for(weight_format), target)


def exported(spec: EngineSpec, folder: Path, family: str = "llama") -> Path:
    export_graph(spec, cached_tensors(family), folder, lambda fraction: None)
    return folder / GRAPH_FILE


@pytest.fixture
def rtx() -> None:
    pytest.importorskip("tensorrt_rtx")


@pytest.mark.parametrize("weight_format", ["float32", "float16", "bfloat16", "int8", "float8"])
def test_the_graph_is_valid_onnx_and_small(weight_format: WeightFormat, tmp_path: Path) -> None:
    graph = exported(spec_of(weight_format), tmp_path)
    model = onnx.load(graph)
    onnx.checker.check_model(model, full_check=True)
    assert not model.graph.initializer
    weights = set(read_weight_file(tmp_path / WEIGHTS_FILE))
    assert weights < {value.name for value in model.graph.input}
    assert graph.stat().st_size < 40_000


def test_matrices_of_four_bits_are_in_the_graph(tmp_path: Path) -> None:
    """Their bytes stay in the weights file; the rest are inputs as ever."""
    graph = exported(spec_of("int4"), tmp_path)
    onnx.checker.check_model(graph, full_check=True)
    model = onnx.load(graph, load_external_data=False)
    held = {value.name for value in model.graph.initializer}
    stored = read_weight_file(tmp_path / WEIGHTS_FILE)
    inputs = {value.name for value in model.graph.input} & set(stored)
    assert held | inputs == set(stored)
    assert {name.split(".", 2)[2] for name in held} == {
        f"{matrix}.{part}"
        for matrix in ("qkv", "output", "gate_up", "down")
        for part in ("levels", "scales")
    }
    assert graph.stat().st_size < 40_000
    with pytest.raises(SpecError, match="holds the weights themselves"):
        graph_of_inputs(spec_of("int4"))


def test_tensorrt_has_larger_blocks_than_rtx(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=r"blocks of 64 or 128 inputs, and a matrix has 96"):
        exported(spec_of("int4", "tensorrt"), tmp_path)


@pytest.mark.usefixtures("rtx")
def test_four_bit_ranks_have_plans_of_their_own(tmp_path: Path) -> None:
    config = {**tiny_config("llama"), "intermediate_size": 128, "num_hidden_layers": 1}
    rng = np.random.default_rng(1)
    tensors = {
        name: rng.standard_normal(size).astype(np.float32)
        for name, size in expected_tensors(shape_from_config(config)).items()
    }
    model = write_hf_folder(tmp_path / "model", config=config, tensors=tensors)
    options = BuildOptions(32, 12, "int4", "tensorrt-rtx", 2)
    done: list[float] = []
    out = build_engine(
        model,
        tmp_path / "out",
        options,
        lambda step, fraction: done.append(fraction) if "plan" in step else None,
    )
    assert done == sorted(done)
    assert done[-1] == 1.0
    assert not (out / PLAN_FILE).exists()
    spec = load_engine_spec(out)
    plans = [plan_file(spec, out, rank) for rank in range(2)]
    assert [plan.parent.name for plan in plans] == ["rank0", "rank1"]
    assert plans[0].read_bytes() != plans[1].read_bytes()
    assert {f"rank{n}/{PLAN_FILE}" for n in range(2)} < set(load_manifest(out, "sha256").files)


def test_a_graph_for_tensorrt_is_that_for_rtx(tmp_path: Path) -> None:
    (tmp_path / "rtx").mkdir()
    plain = exported(spec_of(target="tensorrt"), tmp_path).read_bytes()
    assert exported(spec_of(), tmp_path / "rtx").read_bytes() == plain


def test_slots_are_aligned_and_have_a_place_that_nobody_sees() -> None:
    for family in ("llama", "qwen3", "llama-mha-tied"):
        for max_chunk in (1, 12, 64):
            spec = spec_of(family=family, max_chunk=max_chunk)
            assert num_places(spec) > spec.slot_tokens
            layers = 2 * spec.model.num_layers
            assert cache_row_bytes(spec) // layers % 256 == 0


def test_profiles_hold_every_pass_once() -> None:
    spec = spec_of()
    for batch in (1, 2, 16, 17, 200, 256):
        holding = [p for p in plan_profiles(spec) if p.least.batch <= batch <= p.most.batch]
        assert plan_profiles(spec)[profile_for(batch, 1)] in holding
    prefill = plan_profiles(spec)[profile_for(1, 7)]
    assert prefill.least == Size(1, 2, 1)
    assert prefill.usual == Size(1, 12, 1)
    assert prefill.most == Size(1, 12, 12)
    assert len(plan_profiles(spec_of(max_chunk=1))) == 3


@pytest.mark.parametrize(
    ("rows", "buckets"),
    [(1, (1,)), (2, (1, 2)), (5, (1, 2, 4, 5)), (16, (1, 2, 4, 8, 16)), (900, (256,))],
)
def test_buckets_are_powers_of_two_up_to_all(rows: int, buckets: tuple[int, ...]) -> None:
    assert decode_buckets(rows)[-len(buckets) :] == buckets
    assert sorted(decode_buckets(rows)) == list(decode_buckets(rows))


@pytest.mark.usefixtures("rtx")
@pytest.mark.parametrize("weight_format", TARGET_FORMATS["tensorrt-rtx"])
def test_every_format_of_the_target_becomes_a_plan(
    weight_format: WeightFormat, tmp_path: Path
) -> None:
    spec = spec_of(weight_format)
    seen: list[float] = []
    build_plan(spec, exported(spec, tmp_path), tmp_path / PLAN_FILE, seen.append)
    assert (tmp_path / PLAN_FILE).stat().st_size > 100_000
    assert seen == sorted(seen)
    assert seen[0] == 0.0
    assert seen[-1] == 1.0
    assert len(set(seen)) > 10


@pytest.mark.usefixtures("rtx")
def test_a_plan_may_be_for_gpus_that_are_not_here(tmp_path: Path) -> None:
    spec = spec_of()
    options = PlanOptions(compute_capabilities=("8.0", "8.9", "12.0"))
    graph = exported(spec, tmp_path)
    build_plan(spec, graph, tmp_path / PLAN_FILE, lambda fraction: None, options)
    assert (tmp_path / PLAN_FILE).is_file()


@pytest.mark.usefixtures("rtx")
def test_hopper_is_refused_by_name(tmp_path: Path) -> None:
    """TensorRT-RTX 1.7.1 has no name for 9.0; asked for it by number, it answers in its own words."""
    spec = spec_of()
    options = PlanOptions(compute_capabilities=("9.0",))
    with pytest.raises(SpecError, match=r"capability 9.0 \(.*not supported.*8.9, 12.0.*current"):
        build_plan(
            spec,
            exported(spec, tmp_path),
            tmp_path / PLAN_FILE,
            lambda fraction: None,
            options,
        )


@pytest.mark.usefixtures("rtx")
@pytest.mark.parametrize("capability", ["nine", "9", "9.x", ""])
def test_what_is_no_compute_capability_is_refused(capability: str, tmp_path: Path) -> None:
    spec = spec_of()
    options = PlanOptions(compute_capabilities=(capability,))
    graph = exported(spec, tmp_path)
    with pytest.raises(SpecError, match="does not build for compute capability"):
        build_plan(spec, graph, tmp_path / PLAN_FILE, lambda fraction: None, options)


class _Seen(Exception):
    pass


@pytest.mark.usefixtures("rtx")
@pytest.mark.parametrize("weight_format", ["float32", "bfloat16"])
def test_float32_is_not_rounded_to_tf32(
    weight_format: WeightFormat, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The library's default rounds factors of float32 products to 10 bits."""

    def look(trt: Any, target: Target, config: Any, wanted: Sequence[str]) -> None:
        raise _Seen(config.get_flag(trt.BuilderFlag.TF32))

    monkeypatch.setattr(plan, "choose_capabilities", look)
    spec = spec_of(weight_format)
    with pytest.raises(_Seen) as seen:
        build_plan(spec, exported(spec, tmp_path), tmp_path / PLAN_FILE, lambda fraction: None)
    assert seen.value.args[0] is (weight_format != "float32")


@pytest.mark.usefixtures("rtx")
def test_what_a_gpu_lacks_is_said_in_the_librarys_words(tmp_path: Path) -> None:
    spec = spec_of("float8")
    options = PlanOptions(compute_capabilities=("8.6",))
    with pytest.raises(SpecError, match=r"built no plan.*fp8"):
        build_plan(
            spec, exported(spec, tmp_path), tmp_path / PLAN_FILE, lambda fraction: None, options
        )


@pytest.mark.usefixtures("rtx")
def test_a_build_puts_the_plan_into_the_manifest(tmp_path: Path) -> None:
    model = write_hf_folder(tmp_path / "model", "llama")
    options = BuildOptions(capacity=32, max_chunk=16, target="tensorrt-rtx")
    steps: dict[str, list[float]] = {}
    out = build_engine(
        model, tmp_path / "out", options, lambda step, done: steps.setdefault(step, []).append(done)
    )
    assert {GRAPH_FILE, WEIGHTS_FILE, PLAN_FILE} < set(load_manifest(out, "sha256").files)
    assert load_engine_spec(out).weight_format == "bfloat16"
    assert steps["build the plan"][-1] == 1.0
    plan = (out / PLAN_FILE).stat()
    build_engine(model, out, options)
    assert (out / PLAN_FILE).stat() == plan
    # Its cache has a fixed number of places: another capacity is another plan.
    build_engine(model, out, BuildOptions(capacity=64, max_chunk=16, target="tensorrt-rtx"))
    assert (out / PLAN_FILE).stat().st_mtime_ns != plan.st_mtime_ns
    assert load_engine_spec(out).capacity == 64


@pytest.mark.usefixtures("rtx")
def test_without_a_gpu_the_engine_says_what_is_missing(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    spec = spec_of()
    exported(spec, tmp_path)
    (tmp_path / "spec.json").write_text(spec.to_json())
    with pytest.raises(SpecError, match="target: tensorrt-rtx needs a GPU"):
        TensorRtEngine(tmp_path, RuntimeOptions())


@pytest.mark.usefixtures("rtx")
def test_a_plan_does_not_open_without_a_driver_and_says_why(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    from engine_build.tensorrt_library import OpenPlan

    spec = spec_of()
    build_plan(spec, exported(spec, tmp_path), tmp_path / PLAN_FILE, lambda fraction: None)
    plan = (tmp_path / PLAN_FILE).read_bytes()
    with pytest.raises(SpecError, match=r"cannot run this plan here .*CUDA driver"):
        OpenPlan("tensorrt-rtx", plan, tmp_path / "kernels")


def test_a_missing_library_names_itself_and_its_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "tensorrt", None)
    model = write_hf_folder(tmp_path / "model", "llama")
    with pytest.raises(SpecError, match=r"target: tensorrt .*pip install tensorrt") as caught:
        build_engine(model, tmp_path / "out", BuildOptions(capacity=32, target="tensorrt"))
    assert caught.value.field == "target"
    assert not (tmp_path / "out").exists()


def test_another_capacity_than_the_plans_is_refused(tmp_path: Path) -> None:
    (tmp_path / "spec.json").write_text(spec_of().to_json())
    with pytest.raises(SpecError, match=r"capacity: the plan was built for 32 tokens, not 64"):
        TensorRtEngine(tmp_path, RuntimeOptions(), capacity=64)
