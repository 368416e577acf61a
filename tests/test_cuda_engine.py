"""The CUDA engine, its kernels interpreted: against the oracle, and what is particular to it."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engine.float_reference import FloatDecoder, Passage
from engine.protocol import EngineDead, Row, SampleRequest, SlotCopy, StepPlan
from engine.sampling import SamplingParams
from engine.window import SinkWindow
from engine_build.graph import export_graph
from engine_build.spec import EngineSpec, SpecError, WeightFormat
from engine_build.stored_weights import stored_weights
from tests.cuda_fixtures import cuda_spec, make_cuda_engine, torch
from tests.engine_fixtures import (
    PARTIAL_ROTARY,
    cached_tensors,
    feed,
    random_tokens,
    row_for,
    tiny_shape,
    window_of,
)
from tests.reference import Floats, ReferenceDecoder, Rule

from engine.cuda_engine import CudaEngine  # isort: skip
from engine.cuda_kernels.attention import Tiling  # isort: skip
from engine.cuda_options import CudaOptions  # isort: skip
from engine.cuda_runtime import mixed_tiling  # isort: skip

GREEDY = SampleRequest(SamplingParams(temperature=0.0), 0, 0, np.zeros(0, np.int32))
MAX_ERROR = 1e-4
LENGTH = 70
SIZES = (20, 1, 7)


def oracle(family: str = "llama", length: int = LENGTH, wrong: str = "") -> Floats:
    rule = Rule(4, 36, **({wrong: True} if wrong else {}))
    reference = ReferenceDecoder(tiny_shape(family), cached_tensors(family), rule)
    return reference.push_all(0, random_tokens(7, length))


def run(engine: CudaEngine, length: int = LENGTH) -> Floats:
    row = row_for(window_of(engine.spec, 4))
    return feed(engine, random_tokens(7, length), row, SIZES)


@pytest.mark.parametrize(
    "family", ["llama", "llama-bias", "llama-mha-tied", "qwen2", "qwen3", "mistral", PARTIAL_ROTARY]
)
def test_every_family_equals_the_oracle(family: str) -> None:
    assert np.abs(run(make_cuda_engine(family)) - oracle(family)).max() < MAX_ERROR


@pytest.mark.parametrize("wrong", ["no_sinks", "no_shift", "one_key_too_few"])
def test_wrong_rules_are_told_from_the_right_one(wrong: str) -> None:
    got = run(make_cuda_engine(), length=60)
    assert np.abs(got - oracle(length=60, wrong=wrong)).max() > 100 * MAX_ERROR


@pytest.mark.parametrize("offset", [4_000_037, 16_000_000])
def test_far_into_a_stream(offset: int) -> None:
    engine = make_cuda_engine()
    window = window_of(engine.spec, 4)
    first, rest = random_tokens(1, 4), random_tokens(2, 50)
    reference = ReferenceDecoder(engine.spec.model, cached_tensors("llama"), Rule(4, 36))
    feed(engine, random_tokens(9, 60), row_for(window, 1), [20])
    got = [feed(engine, first, row_for(window, 1, 0, offset), [3])]
    got.append(feed(engine, rest, row_for(window, 1, offset, offset), SIZES))
    wanted = [reference.push_all(0, first), reference.push_all(offset, rest)]
    assert np.abs(np.concatenate(got) - np.concatenate(wanted)).max() < MAX_ERROR


def test_a_conversation_comes_back_from_host_memory_into_another_slot() -> None:
    """Two were saved, and their kv_slots used by others; all of slot_copy_contract.py is a slow test."""
    slot_bytes = cuda_spec().slot_bytes
    engine = make_cuda_engine(options=CudaOptions(host_memory_bytes=2 * slot_bytes), slots=2)
    window, length = window_of(engine.spec, 4), 50
    tokens = [random_tokens(seed, length + 1) for seed in (1, 2)]
    for slot in range(2):
        feed(engine, tokens[slot][:length], row_for(window, slot), [20])
    strangers = tuple(Row(slot, 0, random_tokens(3 + slot, 20), window) for slot in range(2))
    saves = (SlotCopy("save", 0, 1), SlotCopy("save", 1, 0))
    engine.step(StepPlan(strangers, saves))
    restores = (SlotCopy("restore", 0, 0), SlotCopy("restore", 1, 1))
    rows = [Row(1 - n, length, tokens[n][length:], window, logits="last") for n in range(2)]
    for n, result in enumerate(engine.step(StepPlan(tuple(rows), restores)).rows):
        reference = ReferenceDecoder(engine.spec.model, cached_tensors("llama"), Rule(4, 36))
        assert result.logits is not None
        assert np.abs(result.logits[0] - reference.push_all(0, tokens[n])[-1]).max() < MAX_ERROR


def mix(engine: CudaEngine, pins: tuple[int, ...] = (0, 4, 20, 1)) -> float:
    """The largest error of conversations with so many sinks, in steps that mix chunks and single tokens."""
    rng = np.random.default_rng(3)
    tokens = [random_tokens(20 + n, 60 - 9 * n) for n in range(len(pins))]
    got: list[list[Floats]] = [[] for _ in pins]
    length = [0] * len(pins)
    while any(length[n] < len(tokens[n]) for n in range(len(pins))):
        rows, who = [], []
        for n in rng.permutation(len(pins)):
            part = tokens[n][length[n] : length[n] + int(rng.choice([0, 1, 5, 20]))]
            if len(part):
                window = window_of(engine.spec, pins[n])
                sample = GREEDY if rng.random() < 0.5 else None
                row = Row(int(n), length[n], part, window, sample=sample, logits="all")
                rows.append(row)
                who.append(n)
        for n, row, result in zip(who, rows, engine.step(StepPlan(tuple(rows))).rows, strict=True):
            assert result.logits is not None
            drawn = int(result.logits[-1].argmax()) if row.sample else None
            assert result.token_id == drawn
            got[n].append(result.logits)
            length[n] += len(row.tokens)
    errors = []
    for n, sinks in enumerate(pins):
        rule = Rule(sinks, engine.spec.capacity - sinks)
        wanted = ReferenceDecoder(engine.spec.model, cached_tensors("llama"), rule)
        error = np.abs(np.concatenate(got[n]) - wanted.push_all(0, tokens[n])).max()
        errors.append(float(error))
    return max(errors)


def test_conversations_of_different_lengths_share_steps() -> None:
    """Rows of one plan, more than a part of a step holds, in an order of their own."""
    assert mix(make_cuda_engine(options=CudaOptions(max_running=3, max_step_tokens=24))) < MAX_ERROR


@pytest.mark.parametrize(("processors", "splits"), [(1000, 8), (1, 1)])
def test_mixed_steps_in_the_tiles_of_a_gpu(
    monkeypatch: pytest.MonkeyPatch, processors: int, splits: int
) -> None:
    """Both ways to cut chunks and single tokens, with S per row, as a GPU of so many processors would."""
    monkeypatch.setattr("engine.cuda_runtime.interpreted", lambda device: False)
    engine = make_cuda_engine(options=CudaOptions(max_running=3))
    runtime: Any = engine._runtime
    runtime._processors = processors
    tilings = []

    def chosen(counts: list[int]) -> Tiling:
        tilings.append(mixed_tiling(counts, runtime._spec.model, runtime._processors))
        return tilings[-1]

    monkeypatch.setattr(runtime, "_mixed_tiling", chosen)
    assert mix(engine, (0, 20, 1)) < MAX_ERROR
    assert {tiling.splits for tiling in tilings} == {splits}


def test_few_long_rows_are_split_and_many_are_not() -> None:
    model = dataclasses.replace(tiny_shape("llama"), num_heads=32, num_kv_heads=8, head_dim=128)
    # 16 tokens fill a tile of 64 queries; 132 processors are half idle up to 8 tiles of 8 heads.
    assert mixed_tiling([16] * 8, model, 132).splits == 8
    assert mixed_tiling([16] * 8 + [1], model, 132).splits == 1
    assert mixed_tiling([128], model, 132).splits == 8
    assert mixed_tiling([129], model, 132).splits == 1
    many = dataclasses.replace(model, num_kv_heads=32)
    assert mixed_tiling([128], many, 132).splits == 8
    assert mixed_tiling([129], many, 132).splits == 1


@pytest.mark.parametrize(
    ("weight_format", "tolerance"), [("bfloat16", 0.6), ("float16", 0.08), ("float8", 2.0)]
)
def test_narrow_formats_are_near_the_oracle(weight_format: WeightFormat, tolerance: float) -> None:
    engine = make_cuda_engine("qwen2", weight_format=weight_format)
    wanted = oracle("qwen2", length=50)
    error: Floats = np.abs(run(engine, length=50) - wanted)
    assert 1e-4 < error.mean() < tolerance / 4
    assert error.max() < tolerance * 2


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_four_bits_compute_with_what_is_stored(family: str, tmp_path: Path) -> None:
    """Rounding these weights changes a tiny model; the engine is near a reference on the rounded ones."""
    spec = cuda_spec(family, weight_format="int4")
    export_graph(spec, cached_tensors(family), tmp_path, lambda fraction: None)
    decoder = FloatDecoder(spec.model, stored_weights(tmp_path, spec))
    passage = Passage(random_tokens(7, 50), np.arange(50), 4, 36)
    wanted = decoder.head()(decoder.hidden(passage))
    error: Floats = np.abs(run(make_cuda_engine(family, weight_format="int4"), length=50) - wanted)
    assert 1e-4 < error.mean() < 0.15
    assert np.abs(oracle(family, length=50) - wanted).mean() > 3 * error.mean()


def test_rows_that_only_some_sample() -> None:
    engine = make_cuda_engine()
    window = window_of(engine.spec, 4)
    rows = [
        Row(slot, 0, random_tokens(slot, 1), window, sample=GREEDY if slot != 1 else None)
        for slot in range(3)
    ]
    alone = [engine.step(StepPlan((dataclasses.replace(row, logits="last"),))) for row in rows]
    results = engine.step(StepPlan(tuple(rows))).rows
    for n, result in enumerate(results):
        logits = alone[n].rows[0].logits
        assert logits is not None
        assert result.token_id == (None if n == 1 else int(logits.argmax()))


def test_tensors_of_a_reference_make_the_same_engine() -> None:
    for family in ("qwen2", "qwen3"):
        tensors = {name: torch.from_numpy(one) for name, one in cached_tensors(family).items()}
        spec = cuda_spec(family)
        engine = CudaEngine.from_tensors(
            spec, tensors, memory_budget_bytes=spec.slot_bytes, device="cpu"
        )
        assert (run(engine, length=21) == run(make_cuda_engine(family), length=21)).all()


@pytest.mark.parametrize("weight_format", ["float8", "int4"])
def test_random_weights_run(weight_format: WeightFormat) -> None:
    spec = cuda_spec("qwen3", weight_format=weight_format)
    engine = CudaEngine.with_random_weights(
        spec, memory_budget_bytes=2 * spec.slot_bytes, device="cpu"
    )
    assert engine.max_resident == 2
    assert np.isfinite(run(engine, length=21)).all()


def test_a_slot_is_one_run_of_memory_of_the_size_promised() -> None:
    engine = make_cuda_engine("mistral")
    assert engine.slots[1].is_contiguous()
    assert engine.slots[1].nbytes == engine.spec.slot_bytes


def test_a_chunk_that_would_overwrite_what_it_sees_is_refused() -> None:
    engine = make_cuda_engine()
    row = Row(0, 50, random_tokens(1, 5), SinkWindow(4, 36, 39))
    with pytest.raises(ValueError, match=r"rows\[0\].window.ring_tokens: 39 < 40"):
        engine.step(StepPlan((row,)))


def test_what_cannot_start_says_what_to_do(tmp_path: Path) -> None:
    spec = cuda_spec()
    (tmp_path / "spec.json").write_text(spec.to_json())
    export_graph(spec, cached_tensors("llama"), tmp_path, lambda fraction: None)
    for device, field in (("cuda", "TRITON_INTERPRET"), ("cpu", "memory_budget_bytes")):
        with pytest.raises(SpecError, match=field):
            CudaEngine(tmp_path, device=device)
    with pytest.raises(SpecError, match="do not hold one kv_slot"):
        CudaEngine(tmp_path, device="cpu", memory_budget_bytes=spec.slot_bytes - 1)
    (tmp_path / "spec.json").write_text(EngineSpec(spec.model, 32, 8).to_json())
    with pytest.raises(SpecError, match="target"):
        CudaEngine(tmp_path, device="cpu", memory_budget_bytes=spec.slot_bytes)
    for changes in ({"max_running": 0}, {"max_step_tokens": 0}, {"choices": {"x": "fast"}}):
        with pytest.raises(SpecError, match=next(iter(changes))):
            make_cuda_engine(options=CudaOptions(**changes))


def test_a_failing_launch_kills_the_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = make_cuda_engine()

    def fail(*_: object) -> None:
        raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.setattr("engine.cuda_decoder.CudaDecoder.run", fail)
    with pytest.raises(EngineDead, match="illegal memory access"):
        run(engine)


def test_buckets_are_powers_of_two_up_to_the_largest() -> None:
    assert CudaOptions(max_running=1).buckets() == [1]
    assert CudaOptions(max_running=8).buckets() == [1, 2, 4, 8]
    assert CudaOptions(max_running=48).buckets() == [1, 2, 4, 8, 16, 32, 48]
