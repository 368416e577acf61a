"""Decode steps as CUDA graphs: one for each bucket of rows, all over the same memory.

Everything a graph reads is fixed when it is captured: addresses, numbers of programs, splits of attention.
What changes between steps is in one vector that is copied to its place before the replay.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.cuda_decoder import CudaDecoder, DeviceStep
from engine.cuda_kernels.attention import Tiling
from engine.cuda_step import PackedStep, bucket_layout, pack_decode


@dataclass(frozen=True, slots=True)
class _Captured:
    graph: torch.cuda.CUDAGraph
    words: Tensor


class DecodeGraphs:
    """The graphs of `buckets`, whose logits are the first rows of `logits` [largest bucket, vocab]."""

    def __init__(
        self,
        decoder: CudaDecoder,
        buckets: list[int],
        tiling: Callable[[int], Tiling],
        logits: Tensor,
    ) -> None:
        self._logits = logits
        self._captured: dict[int, _Captured] = {}
        pool = torch.cuda.graph_pool_handle()
        # The largest first: the smaller ones find room in its memory.
        for bucket in sorted(buckets, reverse=True):
            layout = bucket_layout(bucket)
            words = torch.from_numpy(pack_decode((), bucket).words).to(logits.device)
            step = DeviceStep.of(words, layout, tiling(bucket), in_order=True)
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                # Compiles kernels and lets the library choose: neither can happen in a capture.
                decoder.run(step, logits[:bucket])
                decoder.run(step, logits[:bucket])
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=pool):
                decoder.run(step, logits[:bucket])
            self._captured[bucket] = _Captured(graph, words)

    def run(self, packed: PackedStep) -> Tensor:
        """Replay the graph of the step's bucket: float32 [bucket, vocab], good until the next replay."""
        bucket = packed.layout.tokens
        captured = self._captured[bucket]
        captured.words.copy_(torch.from_numpy(packed.words).pin_memory(), non_blocking=True)
        captured.graph.replay()
        return self._logits[:bucket]
