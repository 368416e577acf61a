"""Times of calls on a card: warm-up, then many repetitions."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

Call = Callable[[], Any]


def synchronize(device: str) -> None:
    """Wait for all work of the device; nothing to do on the CPU."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()


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
