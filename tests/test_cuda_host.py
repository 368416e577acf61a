"""The CUDA engine's host side: what is packed, sent, captured and set aside. Of CUDA itself nothing is here:
events and streams are told what to say, and a captured graph is the list of our own calls inside it."""

from __future__ import annotations

import contextlib
import dataclasses
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from engine.cuda_memory import (
    LIBRARIES_BYTES,
    most_logits,
    reserve_bytes,
    slots_of_budget,
    slots_that_fit,
    token_bytes,
)
from engine.cuda_options import CudaOptions
from engine.cuda_step import Layout, most_words, num_logits, pack_decode, pack_mixed
from engine.protocol import EngineDead, Row, SampleRequest, StepPlan
from engine.sampling import SamplingParams
from engine.window import SinkWindow
from engine_build.spec import SpecError, WeightFormat
from tests.cuda_fixtures import cuda_spec, make_cuda_engine, torch
from tests.engine_fixtures import random_tokens, window_of

from torch.utils._python_dispatch import TorchDispatchMode  # isort: skip
from engine import cuda_engine  # isort: skip
from engine.cuda_decoder import CudaDecoder, DeviceStep  # isort: skip
from engine.cuda_engine import CudaEngine  # isort: skip
from engine.cuda_sampling import DeviceSampler  # isort: skip
from engine.cuda_upload import Upload  # isort: skip

GREEDY = SampleRequest(SamplingParams(temperature=0.0), 0, 0, np.zeros(0, np.int32))
SEEDED = SamplingParams(temperature=0.8, seed=5, repetition_penalty=1.3, logprobs=True)
WINDOW = SinkWindow(4, 36, 55)


def test_logits_to_draw_from_come_first() -> None:
    """Where the sampler reads them; a row that shows all of its logits has its last ones twice."""
    rows = [
        Row(0, 0, random_tokens(0, 3), WINDOW, logits="last"),
        Row(1, 0, random_tokens(1, 4), WINDOW, sample=GREEDY, logits="all"),
        Row(2, 0, random_tokens(2, 2), WINDOW),
        Row(3, 0, random_tokens(3, 2), WINDOW, sample=GREEDY, logits="last"),
    ]
    packed = pack_mixed(rows, queries=4)
    begin, end = packed.layout.spans[4]
    assert packed.words[begin:end].tolist() == [6, 10, 2, 3, 4, 5, 6]
    assert packed.draw_at == (0, 1)
    assert packed.logits_of == ((2, 3), (3, 7), (7, 7), (1, 2))
    assert len(packed.words) <= most_words(11, 4, 7)
    assert sum(map(num_logits, rows)) >= packed.layout.logits
    single = [dataclasses.replace(row, tokens=row.tokens[:1]) for row in rows]
    assert pack_decode(single, 4).draw_at == (1, 3)


# What is sent.


class Event:
    """Over when `done` says so."""

    def __init__(self, log: list[str] | None = None, name: str = "", done: bool = True) -> None:
        self._log, self._name, self._done = [] if log is None else log, name, done

    def record(self) -> None:
        self._log.append(f"record {self._name}")

    def synchronize(self) -> None:
        self._log.append(f"wait {self._name}")

    def query(self) -> bool:
        return self._done


def test_a_buffer_is_written_when_the_copy_before_the_last_was_made() -> None:
    upload, log = Upload(4, torch.device("cpu")), list[str]()
    upload._copied = [Event(log, "a"), Event(log, "b")]
    for value in range(3):
        room = upload.room()
        room[:3] = value
        upload.send(2)
        assert upload.device.tolist() == [value, value, 0, 0]
    assert log == ["wait a", "record a", "wait b", "record b", "wait a", "record a"]


def test_ranks_give_up_on_a_device_that_waits_for_a_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(np.arange(0.0, 100.0, 0.4).tolist())
    monkeypatch.setattr("engine.cuda_upload.time.monotonic", lambda: next(clock))
    naps = list[float]()
    monkeypatch.setattr("engine.cuda_upload.time.sleep", naps.append)
    with pytest.raises(EngineDead, match="not come to the end of a step for 2 s"):
        Upload(1, torch.device("cpu"), limit_s=2.0).wait(Event(done=False))
    assert len(naps) == 5
    Upload(1, torch.device("cpu"), limit_s=2.0).wait(Event(done=True))


# Devices and threads.


def test_a_device_without_a_number_gets_the_current_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """`torch.cuda.set_device` refuses a device without one."""
    monkeypatch.delenv("TRITON_INTERPRET")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert cuda_engine._device("cuda", cuda_spec()) == torch.device("cuda", 1)
    assert cuda_engine._device("cuda:0", cuda_spec()) == torch.device("cuda", 0)
    with pytest.raises(SpecError, match="there is no cuda:2: 2 GPUs are visible"):
        cuda_engine._device("cuda:2", cuda_spec())


def test_each_thread_that_steps_gets_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    runtime: Any = make_cuda_engine()._runtime
    chosen = list[Any]()
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    runtime._device = torch.device("cuda", 3)
    for _ in range(2):
        thread = threading.Thread(target=lambda: [runtime.enter_thread() for _ in range(2)])
        thread.start()
        thread.join()
        runtime.enter_thread()
    assert chosen == [torch.device("cuda", 3)] * 4


# Graphs.


class Graph:
    """Our own calls made while it was captured, made again by `replay`."""

    recording: list[Callable[[], None]] | None = None
    captures: list[dict[str, Any]]
    replays: list[int]

    def __init__(self) -> None:
        self.calls: list[Callable[[], None]] = []

    def replay(self) -> None:
        Graph.replays.append(len(self.calls))
        for call in self.calls:
            call()


class Stream:
    def __init__(self, *device: object) -> None:
        pass

    def wait_stream(self, other: object) -> None:
        pass


@contextlib.contextmanager
def captured(graph: Graph, **how: Any) -> Iterator[None]:
    Graph.captures.append(how)
    Graph.recording = graph.calls
    yield
    Graph.recording = None


def held_by_graphs(monkeypatch: pytest.MonkeyPatch, kind: type, name: str) -> list[Any]:
    """`kind.name` as a thing that is recorded in a capture and not run; the arguments of its calls."""
    plain, seen = getattr(kind, name), list[Any]()

    def call(self: Any, *arguments: Any) -> None:
        seen.append(arguments)
        if Graph.recording is None:
            plain(self, *arguments)
        else:
            Graph.recording.append(lambda: plain(self, *arguments))

    monkeypatch.setattr(kind, name, call)
    return seen


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    Graph.captures, Graph.replays = [], []
    for name, fake in {
        "CUDAGraph": Graph,
        "Stream": Stream,
        "current_stream": Stream,
        "stream": lambda stream: contextlib.nullcontext(),
        "graph": captured,
        "graph_pool_handle": lambda: "pool",
    }.items():
        monkeypatch.setattr(torch.cuda, name, fake)


def drawing(engine: CudaEngine, slots: tuple[int, ...], at: int, length: int = 1) -> list[Any]:
    rows = []
    for slot in slots:
        tokens = random_tokens(30 + slot, 60)
        sample = SampleRequest(SEEDED, 1, at, tokens[:at])
        row = Row(slot, at, tokens[at : at + length], window_of(engine.spec, 4), sample=sample)
        # One of the rows does not sample: requests stay at their rows.
        rows.append(dataclasses.replace(row, sample=None) if slot == 1 else row)
    return [(row.token_id, row.logprob) for row in engine.step(StepPlan(tuple(rows))).rows]


def test_replayed_steps_draw_what_launched_ones_draw(
    cuda: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Decode in changing buckets between chunks, once by graphs and once without."""
    steps = [((0,), 12), ((0, 1), 12), ((3, 1, 0), 1), ((0,), 1), ((0, 1, 2), 5), ((1, 0), 1)]
    engines = [make_cuda_engine(options=CudaOptions(max_running=4)) for _ in range(2)]
    runtime: Any = engines[0]._runtime
    decoded = held_by_graphs(monkeypatch, CudaDecoder, "run")
    held_by_graphs(monkeypatch, DeviceSampler, "run")
    runtime._graphs = runtime._capture()
    assert [len(step.token_ids) for step, _ in decoded] == [4] * 3 + [2] * 3 + [1] * 3
    assert {how["capture_error_mode"] for how in Graph.captures} == {"thread_local"}
    assert len({(how["pool"], id(how["stream"])) for how in Graph.captures}) == 1
    for number, (slots, length) in enumerate(steps):
        at = 9 * number
        got, wanted = (drawing(engine, slots, at, length) for engine in engines)
        assert got == wanted
        assert all(
            (token is None) == (slot == 1) for slot, (token, _) in zip(slots, got, strict=True)
        )
    assert Graph.replays == [2, 2, 2]


def test_graphs_go_before_the_group(cuda: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """NCCL waits for graphs that hold its collectives."""
    engine = make_cuda_engine()
    runtime: Any = engine._runtime
    gone = list[bool]()
    runtime._graphs = Graph()
    graph = weakref.ref(runtime._graphs)
    monkeypatch.setattr(runtime._group, "close", lambda: gone.append(graph() is None))
    engine.close()
    assert gone == [True]


def test_a_start_runs_the_largest_step_first_and_every_kind_of_step(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine = make_cuda_engine(options=CudaOptions(max_running=4, max_step_tokens=100))
    runtime: Any = engine._runtime
    ran, sampled = list[tuple[int, int]](), list[int]()

    def decode(self: Any, step: DeviceStep, logits: Any) -> None:
        assert not step.rows[:, 1].any()  # padding: nothing is written
        ran.append((len(step.token_ids), len(logits)))

    monkeypatch.setattr(CudaDecoder, "run", decode)
    monkeypatch.setattr(DeviceSampler, "run", lambda self, logits: sampled.append(len(logits)))
    runtime._warm_up()
    buckets, mixed = ran[:3], ran[3:]
    assert buckets == [(1, 1), (2, 2), (4, 4)]
    most = most_logits(engine.spec, runtime._options)
    assert mixed == [(n, min(n, most)) for n in (100, 50, 25, 13, 7, 4, 2)]
    assert max(sampled) == 4


# Memory.

LLAMA_3_8B = dataclasses.replace(
    cuda_spec(weight_format="bfloat16"),
    model=dataclasses.replace(
        cuda_spec().model,
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_layers=32,
        num_heads=32,
        num_kv_heads=8,
        head_dim=128,
    ),
    capacity=1024,
    max_chunk=512,
)
GIB = 2**30


def test_what_is_free_is_divided() -> None:
    """On paper: 80 GiB less 15 GiB of weights."""
    options, model = CudaOptions(), LLAMA_3_8B.model
    reserve = reserve_bytes(LLAMA_3_8B, options)
    per_token = 2 * (4096 + (6144 + 3 * 4096) + (4096 + 3 * 14336)) + 16 * (
        model.rope.rotary_dim // 2
    )
    assert token_bytes(LLAMA_3_8B) == per_token
    logits = 513 * 128256 * 4
    assert reserve == (8192 + 64) * per_token + logits + LIBRARIES_BYTES
    slots = slots_that_fit(LLAMA_3_8B, options, 65 * GIB)
    assert slots * LLAMA_3_8B.slot_bytes + reserve <= 65 * GIB
    assert (slots + 1) * LLAMA_3_8B.slot_bytes + reserve > 65 * GIB
    with_host = slots_that_fit(
        LLAMA_3_8B, dataclasses.replace(options, host_memory_bytes=GIB), 65 * GIB
    )
    assert with_host == slots - 2  # staging
    ranks = slots_that_fit(LLAMA_3_8B, options, 65 * GIB, num_ranks=2)
    assert ranks < slots  # logits are gathered


def test_no_room_for_a_slot_says_what_is_needed() -> None:
    options = CudaOptions()
    least = reserve_bytes(LLAMA_3_8B, options) + LLAMA_3_8B.slot_bytes
    assert slots_that_fit(LLAMA_3_8B, options, least) == 1
    with pytest.raises(SpecError, match=r"memory_budget_bytes: \d+ MiB are free, a step needs"):
        slots_that_fit(LLAMA_3_8B, options, least - 1)
    assert slots_of_budget(LLAMA_3_8B, LLAMA_3_8B.slot_bytes) == 1
    with pytest.raises(SpecError, match="do not hold one kv_slot"):
        slots_of_budget(LLAMA_3_8B, LLAMA_3_8B.slot_bytes - 1)


MADE_BY = {
    f"aten::{name}"
    for name in ("empty.memory_format", "new_empty", "empty_like", "index_select", "mm", "_to_copy")
}


class Held(TorchDispatchMode):  # type: ignore[misc]
    """The most bytes of tensors made inside it that existed at once."""

    def __init__(self) -> None:
        super().__init__()
        self._now = self.most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.name() in MADE_BY:
            self._count(result.untyped_storage())
        return result

    def _count(self, storage: Any) -> None:
        size = storage.nbytes()
        self._now += size
        self.most = max(self.most, self._now)
        weakref.finalize(storage, self._free, size)

    def _free(self, size: int) -> None:
        self._now -= size


@pytest.mark.parametrize("weight_format", ["float32", "bfloat16"])
def test_a_step_holds_no_more_than_was_set_aside(
    monkeypatch: pytest.MonkeyPatch, weight_format: WeightFormat
) -> None:
    """Its tensors, counted as they come and go; kernels, which make none, are left out."""
    engine = make_cuda_engine("qwen2", weight_format=weight_format)
    runtime: Any = engine._runtime
    tokens, mode = 200, Held()
    layout = Layout(tokens, 1, 4, 1)
    words = torch.zeros(layout.num_words, dtype=torch.int64)
    step = DeviceStep.of(words, layout, runtime._mixed_tiling([tokens]), in_order=False)
    for kernel in ("decoder.sink_attention", "decoder.rotate_and_cache", "decoder.rotation_angles"):
        monkeypatch.setattr(f"engine.cuda_{kernel}", lambda *args, **how: None)
    for kernel in ("rms_norm", "swiglu"):
        monkeypatch.setattr(f"engine.cuda_linear.{kernel}", lambda *args, **how: None)
    with mode:
        runtime._decoder.run(step, runtime._logits[:1])
    estimate = tokens * token_bytes(engine.spec)
    assert estimate / 3 < mode.most < estimate
