"""Times of calls on a card: warm-up, many repetitions, medians with their spread."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from benchmarks.report import median, percentile

Call = Callable[[], Any]


def synchronize(device: str) -> None:
    """Wait for all work of the device; nothing to do on the CPU."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def spread(seconds: Sequence[float]) -> dict[str, float]:
    """Median, 10th and 90th percentile, in milliseconds, and how many samples they are of."""
    return {
        "ms": 1e3 * median(seconds),
        "ms_p10": 1e3 * percentile(seconds, 10),
        "ms_p90": 1e3 * percentile(seconds, 90),
        "samples": len(seconds),
    }


def device_times(call: Call, device: str, repetitions: int, warmup: int = 3) -> list[float]:
    """Seconds of `call` on the device, by events around it on the current stream.

    For work that is queued without a wait. On the CPU: wall time.
    """
    for _ in range(warmup):
        call()
    synchronize(device)
    if not device.startswith("cuda"):
        return wall_times(call, device, repetitions, warmup=0)
    marks = [
        (torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True))
        for _ in range(repetitions)
    ]
    for begin, end in marks:
        begin.record()
        call()
        end.record()
    synchronize(device)
    return [begin.elapsed_time(end) / 1e3 for begin, end in marks]


def wall_times(call: Call, device: str, repetitions: int, warmup: int = 3) -> list[float]:
    """Seconds of `call` on the host's clock, the device idle before and after each."""
    for _ in range(warmup):
        call()
    seconds = []
    for _ in range(repetitions):
        synchronize(device)
        begin = time.perf_counter()
        call()
        synchronize(device)
        seconds.append(time.perf_counter() - begin)
    return seconds


def repetitions_for(seconds: float, total_s: float, least: int = 10, most: int = 200) -> int:
    """How often to repeat a call of `seconds` within about `total_s`."""
    return max(least, min(most, int(total_s / max(seconds, 1e-6))))
