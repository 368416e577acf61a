"""engine/tensorrt_runtime.py itself, with a plan whose contexts run the graph in ONNX Runtime.

Memory is real and taken by address: where weights, cache rows, inputs and logits lie, which shapes a
context is told, what is captured and replayed. Of CUDA itself nothing is here: streams do nothing, and a
captured graph is the list of contexts that were enqueued.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnxruntime
import pytest

os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported: the sampler's kernels
torch = pytest.importorskip("torch")

from engine import tensorrt_runtime  # noqa: E402
from engine.protocol import EngineDead, Row, SampleRequest, StepPlan  # noqa: E402
from engine.sampling import SamplingParams  # noqa: E402
from engine.tensorrt_engine import RuntimeOptions, TensorRtEngine, _least  # noqa: E402
from engine.tensorrt_memory import reserve_bytes  # noqa: E402
from engine_build.engine_names import GRAPH_FILE, LOGITS  # noqa: E402
from engine_build.graph import export_graph  # noqa: E402
from engine_build.plan import PLAN_FILE  # noqa: E402
from engine_build.plan_inputs import PRESENT, cache_names, cache_row_bytes  # noqa: E402
from engine_build.plan_profiles import input_shapes, plan_profiles  # noqa: E402
from engine_build.spec import EngineSpec, SpecError, Target  # noqa: E402
from tests.engine_fixtures import (  # noqa: E402
    cached_tensors,
    feed,
    random_tokens,
    row_for,
    tiny_shape,
    window_of,
)
from tests.reference import ReferenceDecoder, Rule  # noqa: E402

CAPACITY, MAX_CHUNK, SLOTS = 32, 12, 6
SHOWN: tuple[Literal["none", "last", "all"], ...] = ("none", "last", "all")
GREEDY = SampleRequest(SamplingParams(temperature=0.0), 0, 0, np.zeros(0, np.int32))


class FakeContext:
    """What TensorRT's context does with shapes and addresses, checked against the plan's profiles."""

    def __init__(self, plan: FakePlan, profile: int) -> None:
        self.plan = plan
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}
        bounds = plan_profiles(plan.spec)[profile]
        self._least = input_shapes(plan.spec, bounds.least)
        self._most = input_shapes(plan.spec, bounds.most)

    def set_device_memory(self, address: int, size: int) -> None:
        assert address
        assert size >= self.plan.engine.device_memory_size_v2

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        if name not in self._least:
            return False
        assert len(shape) == len(self._least[name])
        for low, size, high in zip(self._least[name], shape, self._most[name], strict=True):
            assert low <= size <= high, (name, shape)
        self.shapes[name] = tuple(shape)
        return True

    def set_tensor_address(self, name: str, address: int) -> bool:
        assert address % 4 == 0
        self.addresses[name] = address
        return name in self.plan.dtypes

    def execute_async_v3(self, stream: int) -> bool:
        session, binding = self.plan.session, self.plan.session.io_binding()
        for value in session.get_inputs():
            shape = self.shapes.get(value.name, value.shape)
            where = self.addresses[value.name]
            binding.bind_input(value.name, "cpu", 0, self.plan.dtypes[value.name], shape, where)
        for value in session.get_outputs():
            where = self.addresses[value.name]
            if value.name == LOGITS:
                shape = (self.shapes["logit_rows"][0], self.plan.spec.model.vocab_size)
            else:
                shape = self.shapes[value.name.removesuffix(PRESENT)]
                assert where == self.addresses[value.name.removesuffix(PRESENT)]
            binding.bind_output(value.name, "cpu", 0, np.float32, shape, where)
        session.run_with_iobinding(binding)
        if self.plan.recording is not None:
            self.plan.recording.append(self)
        self.plan.num_enqueued += 1
        return True


class FakePlan:
    """Stands in for `OpenPlan`."""

    def __init__(self, target: Target, plan: bytes, kernel_cache: Path) -> None:
        folder = Path(plan.decode())
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        self.session = onnxruntime.InferenceSession(
            str(folder / GRAPH_FILE), options, providers=["CPUExecutionProvider"]
        )
        self.spec = EngineSpec.from_json((folder / "spec.json").read_text())
        kinds = {"tensor(float)": np.float32, "tensor(int32)": np.int32, "tensor(int64)": np.int64}
        values = [*self.session.get_inputs(), *self.session.get_outputs()]
        self.dtypes = {value.name: kinds[value.type] for value in values}
        self.engine = self
        self.device_memory_size_v2 = 1000
        self.captures = target == "tensorrt-rtx"
        self.recording: list[FakeContext] | None = None
        self.num_enqueued = 0
        self.contexts: list[FakeContext] = []
        PLANS.append(self)

    def context(self, profile: int, stream: int) -> FakeContext:
        self.contexts.append(FakeContext(self, profile))
        return self.contexts[-1]

    def said(self) -> str:
        return "its own words"

    def close(self) -> None:
        self.contexts = []


PLANS: list[FakePlan] = []


class FakeStream:
    cuda_stream = 7

    def __init__(self, device: Any) -> None:
        pass

    def synchronize(self) -> None:
        pass


class FakeGraph:
    def __init__(self) -> None:
        self.contexts: list[FakeContext] = []

    def replay(self) -> None:
        for context in self.contexts:
            context.execute_async_v3(0)


@contextlib.contextmanager
def recorded(graph: FakeGraph, **options: Any) -> Iterator[None]:
    assert options["capture_error_mode"] == "thread_local"  # other threads use CUDA too
    PLANS[-1].recording = graph.contexts
    yield
    PLANS[-1].recording = None


@pytest.fixture(params=["tensorrt", "tensorrt-rtx"])
def engine(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[TensorRtEngine]:
    spec = EngineSpec(tiny_shape("llama"), CAPACITY, MAX_CHUNK, "float32", "float32", request.param)
    export_graph(spec, cached_tensors("llama"), tmp_path, lambda fraction: None)
    (tmp_path / "spec.json").write_text(spec.to_json())
    (tmp_path / PLAN_FILE).write_bytes(str(tmp_path).encode())
    monkeypatch.setattr(tensorrt_runtime, "OpenPlan", FakePlan)
    monkeypatch.setattr(tensorrt_runtime, "_own_gpu", lambda spec, options: torch.device("cpu"))
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor)
    monkeypatch.setattr(torch.cuda, "Stream", FakeStream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "CUDAGraph", FakeGraph)
    monkeypatch.setattr(torch.cuda, "graph", recorded)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    budget = SLOTS * cache_row_bytes(spec) + 5
    made = TensorRtEngine(tmp_path, RuntimeOptions(memory_budget_bytes=budget, max_running=4))
    assert made.max_resident == SLOTS
    yield made
    made.close()


def oracle(sinks: int, tokens: Any) -> Any:
    decoder = ReferenceDecoder(
        tiny_shape("llama"), cached_tensors("llama"), Rule(sinks, CAPACITY - sinks)
    )
    return decoder.push_all(0, tokens)


@pytest.mark.parametrize("sizes", [(1,), (MAX_CHUNK,), (1, 5, 12, 1, 1)])
def test_chunks_through_ring_wraps_equal_the_oracle(
    engine: TensorRtEngine, sizes: tuple[int, ...]
) -> None:
    tokens = random_tokens(7, 130)
    got = feed(engine, tokens, row_for(window_of(engine.spec, 4), 3), sizes)
    assert np.abs(got - oracle(4, tokens)).max() < 1e-4


def test_rows_share_steps_draw_and_move(engine: TensorRtEngine) -> None:
    window, slots, length = window_of(engine.spec, 4), (5, 1, 4, 0, 3), 60
    tokens = [random_tokens(20 + slot, length) for slot in slots]
    wanted = [oracle(4, row) for row in tokens]
    rng, done = np.random.default_rng(1), [0] * len(slots)
    while min(done) < length:
        rows, who = [], []
        for n, slot in enumerate(slots):
            part = tokens[n][done[n] : done[n] + int(rng.choice([0, 1, 1, 1, 7, MAX_CHUNK]))]
            if len(part):
                row = Row(
                    slot, done[n], part, window, sample=GREEDY, logits=SHOWN[int(rng.integers(3))]
                )
                rows.append(row)
                who.append(n)
        for n, row, result in zip(who, rows, engine.step(StepPlan(tuple(rows))).rows, strict=True):
            done[n] += len(row.tokens)
            right = wanted[n][done[n] - len(row.tokens) : done[n]]
            assert result.token_id == int(right[-1].argmax())
            if result.logits is not None:
                assert np.abs(result.logits - right[-len(result.logits) :]).max() < 1e-4


def test_more_decode_rows_than_a_pass_holds_keep_their_logits(engine: TensorRtEngine) -> None:
    window, slots = window_of(engine.spec, 4), range(SLOTS)
    firsts = [random_tokens(slot, 1) for slot in slots]
    rows = [Row(slot, 0, firsts[slot], window, sample=GREEDY) for slot in slots]
    drawn = [result.token_id for result in engine.step(StepPlan(tuple(rows))).rows]
    assert drawn == [int(oracle(4, first)[0].argmax()) for first in firsts]
    assert len(set(drawn)) > 1


def test_every_bucket_is_captured_at_start_and_replayed(engine: TensorRtEngine) -> None:
    """No context is made and nothing recorded once turns are served; each replay runs once."""
    window, plan = window_of(engine.spec, 4), PLANS[-1]
    tokens = random_tokens(7, 40)
    runtime: Any = engine._runtime
    made, captures = list(plan.contexts), engine.spec.target == "tensorrt"
    graphs = {key[1:]: one._graph is not None for key, one in runtime._passes.items()}
    decode = {(1, True): captures, (2, True): captures, (4, True): captures}
    assert graphs == {**decode, (1, False): False}
    enqueued = plan.num_enqueued
    for at in range(10):
        rows = [Row(slot, at, tokens[at : at + 1], window, sample=GREEDY) for slot in range(3)]
        engine.step(StepPlan(tuple(rows)))
    assert plan.num_enqueued == enqueued + 10
    feed(engine, tokens, row_for(window, 5), [MAX_CHUNK, 1, 3])
    assert plan.contexts == made


def test_a_cache_that_does_not_fit_names_the_budget(
    engine: TensorRtEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    zeros = torch.zeros

    def full(shape: Any, **options: Any) -> Any:
        if np.size(shape) == 5:  # the cache
            raise torch.OutOfMemoryError("no room")
        return zeros(shape, **options)

    monkeypatch.setattr(torch, "zeros", full)
    with pytest.raises(SpecError, match=r"memory_budget_bytes: .*does not hold \d+ kv_slots"):
        tensorrt_runtime.TensorRtRuntime(
            tmp_path, engine.spec, RuntimeOptions(memory_budget_bytes=10**8)
        )


def test_a_largest_step_that_does_not_run_is_an_error_at_start(
    engine: TensorRtEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FakeContext, "execute_async_v3", lambda context, stream: False)
    with pytest.raises(SpecError, match=r"memory_budget_bytes: .*enqueued \(its own words\)"):
        TensorRtEngine(tmp_path, RuntimeOptions(memory_budget_bytes=10**8, max_running=4))


def test_what_fails_in_a_step_is_told_in_the_librarys_words(
    engine: TensorRtEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FakeContext, "execute_async_v3", lambda context, stream: False)
    row = Row(0, 0, random_tokens(7, 5), window_of(engine.spec, 4))
    with pytest.raises(EngineDead, match="could not be enqueued \\(its own words\\)"):
        engine.step(StepPlan((row,)))


def test_a_budget_below_one_slot_is_refused(engine: TensorRtEngine, tmp_path: Path) -> None:
    row_bytes = cache_row_bytes(engine.spec)
    with pytest.raises(SpecError, match=r"memory_budget_bytes: .* do not hold one kv_slot"):
        TensorRtEngine(tmp_path, RuntimeOptions(memory_budget_bytes=row_bytes - 1))


def test_free_memory_decides_without_a_budget(
    engine: TensorRtEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    max_held = engine._runtime.max_held if engine._runtime else 0
    row_bytes = cache_row_bytes(engine.spec)
    free = reserve_bytes(engine.spec, max_held) + 3 * row_bytes + row_bytes // 2
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 2 * free))
    options = RuntimeOptions(max_running=4)
    assert TensorRtEngine(tmp_path, options).max_resident == 3
    free = reserve_bytes(engine.spec, max_held) + row_bytes - 1
    with pytest.raises(SpecError, match=r"memory_budget_bytes: .* MiB are free, steps need"):
        TensorRtEngine(tmp_path, options)


def test_all_ranks_have_the_rows_of_the_one_with_the_least_memory() -> None:
    """Else their passes would be of different sizes, and their sums would not meet."""

    class Group:
        rank, size = 0, 3

        def all_reduce(self, values: Any) -> None:
            values *= 1

        def gather(self, values: Any) -> Any:
            return np.stack([values, values - 2, values + 1])

        def broadcast(self, data: bytes) -> bytes:
            return data

    assert _least(7, Group()) == 5
    assert _least(7, None) == 7


def test_ranks_that_do_not_fit_the_engine_are_refused(
    engine: TensorRtEngine, tmp_path: Path
) -> None:
    spec = dataclasses.replace(engine.spec, tp_size=2)
    (tmp_path / "spec.json").write_text(spec.to_json())
    with pytest.raises(SpecError, match="tp_size: the engine was built for 2 ranks, 1 run"):
        TensorRtEngine(tmp_path, RuntimeOptions())


def test_weights_and_caches_are_bound_by_every_context(engine: TensorRtEngine) -> None:
    feed(engine, random_tokens(7, 20), row_for(window_of(engine.spec, 4)), [1, MAX_CHUNK])
    names = {name for layer in range(3) for name in cache_names(layer)}
    for context in PLANS[-1].contexts:
        assert set(context.addresses) == set(PLANS[-1].dtypes)
        assert names < set(context.shapes)
