"""How decode attention is best cut up: tilings beside the engine's own choice, one change at a time.

The figures behind `engine.cuda_kernels.attention.decode_tiling`, which is where what is learnt here goes.
The kernel alone is timed, over several layers' caches in turn, so that no cache is still in L2; beside it
stands the time that reading the keys and values takes at the measured bandwidth.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import torch

from benchmarks.gpu.driving import window_of
from benchmarks.gpu.roofline import Limits, fit, kv_token_bytes
from benchmarks.gpu.shapes import Effort, Point
from benchmarks.gpu.summary import spread
from benchmarks.gpu.timing import device_times
from engine.cuda_kernels.attention import (
    Tiling,
    decode_tiling,
    interpreter_tiling,
    sink_attention,
    split_space,
)
from engine_build.spec import KV_TILE, EngineSpec

_LAYERS = 8
_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def alternatives(tiling: Tiling) -> Iterator[Tiling]:
    """`tiling`, then tilings that differ from it in one thing (a number of keys also in its splits)."""
    yield tiling
    for keys in (32, 128):
        yield dataclasses.replace(tiling, keys=keys)
    for warps in (2, 8):
        yield dataclasses.replace(tiling, num_warps=warps)
    for stages in (2, 4):
        yield dataclasses.replace(tiling, num_stages=stages)
    for splits in (tiling.splits // 2, tiling.splits * 2):
        if 1 <= splits <= 32:
            yield dataclasses.replace(tiling, splits=splits)


class DecodeAttention:
    """`batch` rows of one token in full, old conversations; `run` attends in one layer after another."""

    def __init__(self, spec: EngineSpec, batch: int, device: str) -> None:
        shape = spec.model
        self._spec, self._batch, self._device = spec, batch, device
        dtype = _DTYPES[spec.kv_dtype]
        places, dim = (-(-n // KV_TILE) * KV_TILE for n in (spec.slot_tokens, shape.head_dim))
        layers = min(_LAYERS, shape.num_layers)
        size = (batch, layers, 2, shape.num_kv_heads, places, dim)
        self.layers = layers
        self._slots = torch.empty(size, dtype=dtype, device=device).normal_()
        heads = (batch, shape.num_heads, shape.head_dim)
        # Scores of about one: q carries the scale of attention.
        self._q = torch.randn((2, *heads), device=device).mul_(shape.head_dim**-0.5).to(dtype)
        self.out = torch.empty(heads, dtype=dtype, device=device)
        window = window_of(spec)
        sizes = (window.sink_tokens, window.window_tokens, window.ring_tokens)
        start = 3 * spec.slot_tokens
        rows = [(slot, 1, start + 17 * slot, *sizes, 0, slot) for slot in range(batch)]
        self._rows = torch.tensor(rows, dtype=torch.int64, device=device)
        tiles = [(slot, 0) for slot in range(batch)]
        self._tiles = torch.tensor(tiles, dtype=torch.int64, device=device)
        arrived = batch * shape.num_kv_heads
        self._arrived = torch.zeros(arrived, dtype=torch.int32, device=device)

    def own_tiling(self) -> Tiling:
        """What the engine would choose."""
        shape = self._spec.model
        if self._device == "cpu":
            return interpreter_tiling(shape.heads_per_kv_head)
        processors = torch.cuda.get_device_properties(0).multi_processor_count
        rows = self._batch * shape.num_kv_heads
        return decode_tiling(self._spec.capacity, rows, shape.heads_per_kv_head, processors)

    def run(self, tiling: Tiling) -> None:
        shape = self._spec.model
        space = split_space(tiling, self._batch, shape.num_kv_heads, shape.head_dim, self._arrived)
        for layer in range(self.layers):
            cache = self._slots[:, layer]
            sink_attention(self._q, cache, self.out, self._rows, self._tiles, tiling, space)


def measure_attention(
    point: Point,
    batches: tuple[int, ...],
    device: str,
    memory_bytes: int,
    given: tuple[Limits, Effort],
) -> dict[str, Any]:
    """Milliseconds of one layer's attention for each batch and tiling; a tiling that the card refuses or
    that changes the result says so instead."""
    limits, effort = given
    spec = point.spec
    found = []
    for batch in (b for b in batches if fit(spec, b, memory_bytes).fits):
        attention = DecodeAttention(spec, batch, device)
        own = attention.own_tiling()
        attention.run(own)
        wanted = attention.out.float()
        tried = [
            {**dataclasses.asdict(tiling), **_measure(attention, tiling, wanted, device, effort)}
            for tiling in (alternatives(own) if device != "cpu" else (own,))
        ]
        read = batch * spec.capacity * kv_token_bytes(spec) / spec.model.num_layers
        limit_ms = 1e3 * read / limits.bandwidth
        timed = [one for one in tried if "ms" in one]
        found.append(
            {
                "batch": batch,
                "limit_ms": limit_ms,
                "own": tried[0],
                "best": min(timed, key=lambda one: float(one["ms"])) if timed else None,
                "tried": tried,
            }
        )
    return {**point.described(), "attention": found}


def _measure(
    attention: DecodeAttention, tiling: Tiling, wanted: torch.Tensor, device: str, effort: Effort
) -> dict[str, Any]:
    try:
        attention.run(tiling)
    except Exception as error:
        if "Resources" not in type(error).__name__:
            raise
        return {"refused": str(error)[:200]}
    difference = float((attention.out.float() - wanted).abs().max())
    if not difference <= 0.05 * float(wanted.abs().max()):
        return {"wrong_by": difference}
    call = _captured(attention, tiling, device)
    seconds = device_times(call, device, effort.least + effort.rounds)
    return {**spread([one / attention.layers for one in seconds])}


def _captured(attention: DecodeAttention, tiling: Tiling, device: str) -> Any:
    """The layers as one CUDA graph, so that launches are not what is measured."""
    if device == "cpu":
        return lambda: attention.run(tiling)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        attention.run(tiling)
    return graph.replay
