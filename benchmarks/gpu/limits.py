"""What the card can do, measured in the same run as everything else: bandwidth, matrix products, launches."""

from __future__ import annotations

import time
from typing import Any

import torch

from benchmarks.gpu.shapes import matrices
from benchmarks.gpu.summary import spread
from benchmarks.gpu.timing import device_times, synchronize
from benchmarks.report import median
from engine_build.spec import ModelShape

_COPY_BYTES = 4 << 30
_SQUARE = 8192
_LAUNCHES = 200
_WAKE_S = 1.5


def measure_limits(device: str, models: dict[str, ModelShape], tiny: bool) -> dict[str, Any]:
    """Copy and read bandwidth, bf16 matrix products (square, and the models' own at a chunk of 512),
    launch overhead, and copies to and from pinned host memory. `tiny` for a machine without a card.
    """
    copy_bytes = 1 << 22 if tiny else _COPY_BYTES
    if not tiny:
        _wake(device)
    return {
        **_bandwidth(device, copy_bytes),
        **_matmul(device, 128 if tiny else _SQUARE),
        "products": {
            name: _products(device, shape, 8 if tiny else 512) for name, shape in models.items()
        },
        **_launches(device),
        **_host_copies(device, copy_bytes // 4),
    }


def _wake(device: str) -> None:
    """Keep the card busy until its clocks are up: limits measured on a card that was idle would be too low,
    and every share of them too high."""
    x = torch.randn(4096, 4096, device=device, dtype=torch.bfloat16)
    end = time.monotonic() + _WAKE_S
    while time.monotonic() < end:
        for _ in range(20):
            torch.mm(x, x)
        synchronize(device)


def _bandwidth(device: str, size: int) -> dict[str, Any]:
    source = torch.randn(size // 4, device=device, dtype=torch.float32)
    target = torch.empty_like(source)
    copy = device_times(lambda: target.copy_(source), device, 20)
    read = device_times(lambda: torch.sum(source), device, 20)
    return {
        "copy_bytes_per_s": 2 * size / median(copy),
        "read_bytes_per_s": size / median(read),
        "copied_bytes": size,
        "copy": spread(copy),
        "read": spread(read),
    }


def _matmul(device: str, side: int) -> dict[str, Any]:
    a = torch.randn(side, side, device=device, dtype=torch.bfloat16)
    b = torch.randn(side, side, device=device, dtype=torch.bfloat16)
    out = torch.empty_like(a)
    seconds = device_times(lambda: torch.mm(a, b, out=out), device, 30)
    return {
        "matmul_operations_per_s": 2 * side**3 / median(seconds),
        "matmul_side": side,
        "matmul": spread(seconds),
    }


def _products(device: str, shape: ModelShape, tokens: int) -> dict[str, Any]:
    """Operations a second of each of the model's own products for `tokens` tokens."""
    rates = {}
    for name, rows, columns, _ in matrices(shape):
        x = torch.randn(tokens, columns, device=device, dtype=torch.bfloat16)
        # In a model no matrix is in L2 when its turn comes.
        copies = max(1, min(16, (256 << 20) // (2 * rows * columns)))
        weights = [
            torch.randn(rows, columns, device=device, dtype=torch.bfloat16) for _ in range(copies)
        ]
        turn = iter(range(1 << 30))

        def product(
            x: torch.Tensor = x,
            weights: list[torch.Tensor] = weights,
            turn: Any = turn,
        ) -> None:
            torch.nn.functional.linear(x, weights[next(turn) % len(weights)])

        seconds = device_times(product, device, 20)
        rates[name] = {
            "tokens": tokens,
            "operations_per_s": 2 * tokens * rows * columns / median(seconds),
            **spread(seconds),
        }
    return rates


def _launches(device: str) -> dict[str, Any]:
    """Seconds a kernel costs when it does next to nothing: launched one by one, and from a graph."""
    x = torch.zeros(32, device=device)

    def many() -> None:
        for _ in range(_LAUNCHES):
            x.add_(1.0)

    seconds = []
    for _ in range(12):
        synchronize(device)
        begin = time.perf_counter()
        many()
        synchronize(device)
        seconds.append((time.perf_counter() - begin) / _LAUNCHES)
    found: dict[str, Any] = {"launch_eager_s": median(seconds[2:])}
    if device.startswith("cuda"):
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            many()
        replays = device_times(graph.replay, device, 20)
        found["launch_graph_s"] = median(replays) / _LAUNCHES
    return found


def _host_copies(device: str, size: int) -> dict[str, Any]:
    if not device.startswith("cuda"):
        return {}
    there = torch.empty(size, dtype=torch.uint8, device=device)
    here = torch.empty(size, dtype=torch.uint8, pin_memory=True)
    to_host = device_times(lambda: here.copy_(there, non_blocking=True), device, 5, warmup=1)
    to_device = device_times(lambda: there.copy_(here, non_blocking=True), device, 5, warmup=1)
    return {
        "to_host_bytes_per_s": size / median(to_host),
        "to_device_bytes_per_s": size / median(to_device),
    }
