"""Measures which kernel serves each linear layer best on the GPU at hand.

The same layer of all decoder layers is run in turn, so that the weights come from memory as they do in a
step, not from the cache. What a step spends between kernels is left out: it is the same for all choices, but
for the library's separate norm and gate, which are timed with it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from engine.cuda_kernels.common import WORD
from engine.cuda_kernels.linear import Blocks, Norm, Weights
from engine.cuda_kernels.packed_linear import PackedWeights
from engine.cuda_linear import LIBRARY, MOST_TILED, Choice, LinearLayers, bucket_of, key_of
from engine.cuda_weights import DecoderWeights
from engine_build.int4 import BLOCK

_ROUNDS = 5


def candidates(weights: Weights, tokens: int) -> Iterator[Choice]:
    """Ways worth a try for this many tokens: tiles that fit registers and shared memory of SM 80 to 90."""
    yield LIBRARY
    if isinstance(weights, PackedWeights):
        yield from _packed_candidates(tokens)
        return
    if tokens == 1:
        for outputs, inputs, stages in (
            (2, 1024, 4),
            (4, 1024, 3),
            (8, 512, 3),
            (8, 1024, 3),
        ):
            if inputs <= weights.num_inputs and not (weights.gated and outputs * inputs > 4096):
                yield Choice("vector", Blocks(outputs, inputs, 4, stages))
    if tokens > MOST_TILED:
        return
    wide = tokens > 64
    for outputs in (64, 128) if wide else (16, 32, 64):
        if weights.gated and outputs * bucket_of(tokens) > 64 * 128:
            continue
        deep = () if weights.gated else ((128, 6), (256, 3))
        for inputs, stages in ((64, 3), (64, 4)) if wide else ((128, 3), (128, 4), *deep):
            yield Choice("tile", Blocks(outputs, inputs, 8 if wide else 4, stages))
    if tokens <= WORD:
        yield Choice("tile", Blocks(32, 128, 2, 5))


def _packed_candidates(tokens: int) -> Iterator[Choice]:
    """Tiles of 16 outputs a warp: more warps would unpack the same weights again."""
    if tokens == 1:
        for outputs, inputs, warps in ((16, 512, 4), (32, 512, 4), (64, 512, 4), (32, 1024, 8)):
            yield Choice("vector", Blocks(outputs, inputs, warps, 1))
    if tokens <= MOST_TILED:
        for outputs in (16, 32, 64, 128):
            for stages in (3, 5):
                yield Choice("tile", Blocks(outputs, BLOCK, outputs // 16, stages))


@dataclass(frozen=True, slots=True)
class _Trial:
    """The same linear layer of all decoder layers, on inputs of one size."""

    linear: LinearLayers
    same: list[Weights]
    norm: Norm | None
    accumulate: bool
    x: Tensor
    out: Tensor

    def run(self, choice: Choice) -> None:
        for weights in self.same:
            self.linear.run_as(
                choice, self.x, weights, self.out, self.norm, accumulate=self.accumulate
            )

    def time_ms(self, choice: Choice) -> float:
        """The fastest of a few rounds; infinite if this GPU has too little shared memory for it."""
        try:
            self.run(choice)
        except triton.OutOfResources:
            return float("inf")
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.run(choice)
        times = []
        for _ in range(_ROUNDS):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            graph.replay()
            end.record()
            end.synchronize()
            times.append(float(begin.elapsed_time(end)))
        return min(times)


def tune(linear: LinearLayers, weights: DecoderWeights, buckets: list[int]) -> None:
    """Fill `linear.chosen` for these numbers of tokens. Most of the time goes into compiling."""
    layers, kind = weights.layers, weights.embed.dtype
    groups: list[tuple[list[Weights], Norm | None, bool]] = [
        ([layer.qkv for layer in layers], layers[0].input_norm, False),
        ([layer.output for layer in layers], None, True),
        ([layer.gate_up for layer in layers], layers[0].mlp_norm, False),
        ([layer.down for layer in layers], None, True),
        ([weights.head], weights.norm, False),
    ]
    for bucket in sorted({bucket_of(tokens) for tokens in buckets}):
        for same, norm, accumulate in groups:
            first = same[0]
            key = key_of(first, bucket)
            if key in linear.chosen:
                continue
            x = torch.randn(bucket, first.num_inputs, device=weights.embed.device).to(kind)
            wide = torch.float32 if first is weights.head else kind
            out = torch.zeros(bucket, first.num_outputs, dtype=wide, device=x.device)
            trial = _Trial(linear, same, norm, accumulate, x, out)
            linear.chosen[key] = min(candidates(first, bucket), key=trial.time_ms)
