"""Decode steps as CUDA graphs: one for each bucket of rows, all over the same memory.

Everything a graph reads is fixed when it is captured: addresses, numbers of programs, splits of attention.
What changes between steps is in one vector that is copied to its place before the replay. What a graph
computes on the way lies in a pool that all share: none is replayed while another runs, and what is read after
it, logits and tokens, lies outside.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from engine.cuda_decoder import CudaDecoder, DeviceStep
from engine.cuda_kernels.attention import Tiling
from engine.cuda_sampling import DeviceSampler
from engine.cuda_step import bucket_layout, pack_decode


class DecodeGraphs:
    """A graph for each bucket of `tilings`: decode, and draw by `sampler` if this rank does.

    A step's words are at the beginning of `words`, its logits come to be the first rows of `logits`
    [largest bucket, vocab].
    """

    def __init__(
        self,
        decoder: CudaDecoder,
        sampler: DeviceSampler | None,
        tilings: Mapping[int, Tiling],
        words: Tensor,
        logits: Tensor,
    ) -> None:
        self._logits = {bucket: logits[:bucket] for bucket in tilings}
        self._graphs: dict[int, torch.cuda.CUDAGraph] = {}
        pool = torch.cuda.graph_pool_handle()
        # One stream for all: each stream that cuBLAS meets costs a workspace that is never given back.
        stream = torch.cuda.Stream(logits.device)
        # The largest first: the smaller ones find room in its memory.
        for bucket in sorted(tilings, reverse=True):
            packed = pack_decode((), bucket)
            layout = bucket_layout(bucket)
            words[: layout.num_words].copy_(torch.from_numpy(packed.words))
            step = DeviceStep.of(words, layout, tilings[bucket], in_order=True)
            out = self._logits[bucket]

            def run(step: DeviceStep = step, out: Tensor = out) -> None:
                decoder.run(step, out)
                if sampler is not None:
                    sampler.run(out)

            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                # Compiles kernels, lets the library choose and NCCL connect: none can happen in a capture.
                run()
                run()
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            # Other threads (NCCL's watchdog, those of Ray) may call CUDA meanwhile.
            with torch.cuda.graph(
                graph, pool=pool, stream=stream, capture_error_mode="thread_local"
            ):
                run()
            self._graphs[bucket] = graph

    def run(self, bucket: int) -> Tensor:
        """Replay a bucket's graph: float32 [bucket, vocab], good until the next replay."""
        self._graphs[bucket].replay()
        return self._logits[bucket]
