"""Sampling on the device: logits that are there become token ids there, and the host waits once a step.

    prepare(requests) -> run(logits) -> read()

`prepare` fills static buffers from pinned memory, asynchronously; `run` is a fixed sequence of kernel
launches over them, without allocation or synchronisation, so that a CUDA graph can hold it; `read` is
the one place that waits. All three belong on the caller's current stream.

The rules are those of engine/sampling.py, to the token: same order of operations, ties to the lower
id, inverse CDF in order of token id, u = Philox(seed, turn, k). Where u lies within float rounding of an
edge of the CDF the neighbouring token may come out.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from engine.protocol import SampleRequest
from engine.sampling import Sampled, sample_rows


class DeviceSampler:
    """Samples up to `max_rows` rows of a vocabulary of `vocab_size` on `device`.

    Raises ValueError for more requests or rows than that, or logits that do not fit.
    """

    def __init__(self, max_rows: int, vocab_size: int, device: torch.device | str) -> None:
        self._max_rows = max_rows
        self._vocab_size = vocab_size
        self._device = torch.device(device)
        self._requests: tuple[SampleRequest, ...] = ()
        self._logits = torch.empty((0, vocab_size), device=self._device)

    def prepare(self, requests: Sequence[SampleRequest]) -> None:
        """Say what rows 0 .. len(requests) - 1 of the next `run` are to draw.

        Rows of `run` beyond them are left alone: a graph may be captured for more rows than a step has.
        """
        if len(requests) > self._max_rows:
            raise ValueError(f"{len(requests)} requests, max_rows is {self._max_rows}")
        self._requests = tuple(requests)

    def run(self, logits: torch.Tensor) -> None:
        """Draw a token from each row of `logits`, float32, float16 or bfloat16 [rows, vocab_size],
        contiguous along the vocabulary. They are left as they are and must stay until `read`."""
        if logits.dim() != 2 or logits.shape[1] != self._vocab_size or logits.stride(1) != 1:
            raise ValueError(f"logits {tuple(logits.shape)}, not [rows, {self._vocab_size}]")
        if logits.shape[0] > self._max_rows:
            raise ValueError(f"{logits.shape[0]} rows of logits, max_rows is {self._max_rows}")
        self._logits = logits

    def read(self) -> list[Sampled]:
        """Wait for the last `run`: one result per request of the last `prepare`, in its order.

        A row whose logits are not finite, or whose logit_bias names no token, says so in `failed`.
        """
        logits = self._logits[: len(self._requests)].float().cpu().numpy()
        return sample_rows(logits, self._requests)
