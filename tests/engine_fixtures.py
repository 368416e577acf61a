"""Small engines to test with, and how tests drive them."""

from __future__ import annotations

import dataclasses
import functools
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from engine.onnx_engine import OnnxEngine
from engine.protocol import Engine, Logits, Row, StepPlan, TokenIds
from engine.window import SinkWindow
from engine_build.graph import export_graph
from engine_build.hf_config import shape_from_config
from engine_build.spec import EngineSpec, ModelShape, WeightFormat, kv_dtype_for
from tests.tiny_models import VOCAB_SIZE, tiny_config, tiny_tensors

PARTIAL_ROTARY = "llama-partial-rotary"
"""A family no checkpoint reader knows yet: half of each head is not rotated."""


@functools.cache
def tiny_shape(family: str) -> ModelShape:
    shape = shape_from_config(tiny_config(_config_family(family)))
    if family == PARTIAL_ROTARY:
        half = dataclasses.replace(shape.rope, rotary_dim=shape.head_dim // 2)
        return dataclasses.replace(shape, rope=half)
    return shape


@functools.cache
def cached_tensors(family: str) -> dict[str, npt.NDArray[np.float32]]:
    return tiny_tensors(_config_family(family))


def _config_family(family: str) -> str:
    return "llama" if family == PARTIAL_ROTARY else family


def make_engine(
    family: str = "llama",
    *,
    capacity: int = 40,
    max_chunk: int = 20,
    slots: int = 4,
    weight_format: WeightFormat = "float32",
    host_slots: int = 0,
) -> OnnxEngine:
    """An engine of a tiny model; its folder is gone again, as the weights are read at start."""
    kv_dtype = kv_dtype_for(weight_format)
    spec = EngineSpec(tiny_shape(family), capacity, max_chunk, weight_format, kv_dtype)
    with tempfile.TemporaryDirectory() as folder:
        export_graph(spec, cached_tensors(family), Path(folder), lambda fraction: None)
        (Path(folder) / "spec.json").write_text(spec.to_json())
        return OnnxEngine(
            Path(folder),
            memory_budget_bytes=slots * spec.slot_bytes,
            host_memory_bytes=host_slots * spec.slot_bytes,
        )


def window_of(spec: EngineSpec, sink_tokens: int) -> SinkWindow:
    """The window of a conversation that pins `sink_tokens`."""
    ring = spec.slot_tokens - sink_tokens
    return SinkWindow(sink_tokens, spec.capacity - sink_tokens, ring)


def random_tokens(seed: int, count: int, vocab: int = VOCAB_SIZE) -> TokenIds:
    return np.random.default_rng(seed).integers(0, vocab, count).astype(np.int32)


def cut(count: int, sizes: Sequence[int]) -> Iterable[tuple[int, int]]:
    """(begin, end) of consecutive chunks of these sizes, over and over, until `count`."""
    begin, turn = 0, 0
    while begin < count:
        end = min(count, begin + sizes[turn % len(sizes)])
        yield begin, end
        begin, turn = end, turn + 1


def feed(
    engine: Engine,
    tokens: TokenIds,
    row: Row,
    sizes: Sequence[int],
) -> Logits:
    """Run `tokens` from `row.start` on in chunks of these sizes; all logits, [len(tokens), vocab]."""
    result = []
    for begin, end in cut(len(tokens), sizes):
        part = dataclasses.replace(
            row, start=row.start + begin, tokens=tokens[begin:end], logits="all"
        )
        (done,) = engine.step(StepPlan((part,))).rows
        assert done.logits is not None
        result.append(done.logits)
    return np.concatenate(result)


def row_for(window: SinkWindow, kv_slot: int = 0, start: int = 0, window_start: int = 0) -> Row:
    """A row without tokens, to be filled in."""
    return Row(kv_slot, start, np.zeros(0, np.int32), window, window_start)
