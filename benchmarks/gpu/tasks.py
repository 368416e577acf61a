"""What there is to measure, in order of importance. Pure.

The first call of a lent machine takes what the bars need, the largest model first; a second one, with
`--resume`, the rest of the grid. Estimates are guesses until a card has answered, and include compiling.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from benchmarks.gpu.budget import Task
from benchmarks.gpu.shapes import Grid
from engine_build.spec import WeightFormat

SECTIONS = (
    "limits",
    "correctness",
    "variant",
    "versus",
    "decode",
    "prefill",
    "age",
    "restore",
    "overheads",
    "attention",
    "tensorrt_sm90",
    "profile",
)
"""Every section, as `--only` names them. `profile` runs only when asked for."""

NEED_LIMITS = ("decode", "prefill", "attention")
"""Sections that are set against the card's measured limits."""

LLAMAS = ("llama-2-7b", "llama-3-8b")
VERSUS_CAPACITIES = (1024, 512)
_FIRST, _SECOND, _THIRD = 0, 100, 200
_TENSORRT = 300


def tasks_for(grid: Grid, profile: bool = False) -> list[Task]:
    """All tasks of a grid, most important first. Those of the TensorRT engine come last."""
    found = [Task("limits", "all", 0, 30)]
    found += _correctness(grid)
    found += _variants(grid)
    found += _versus(grid)
    for place, model in enumerate(_by_importance(grid)):
        base = (_FIRST, _SECOND, _THIRD)[min(place, 2)]
        found += _measurements(grid, model, base)
        if profile:
            parameters = {"capacity": _middle(grid), "format": grid.weight_format}
            found.append(Task("profile", model, base + 40, 25, parameters))
    if "tiny" not in grid.models:
        found.append(Task("tensorrt_sm90", "all", 45, 60, {"engine": "tensorrt"}))
        found += _tensorrt(grid)
    return sorted(found, key=lambda task: task.importance)


def _by_importance(grid: Grid) -> list[str]:
    first = [model for model in ("llama-3-8b", "llama-2-7b") if model in grid.models]
    return first + [model for model in grid.models if model not in first]


def _middle(grid: Grid) -> int:
    return 2048 if 2048 in grid.capacities else grid.capacities[0]


def _correctness(grid: Grid) -> Iterator[Task]:
    def task(model: str, weight_format: WeightFormat, capacity: int, place: int) -> Task:
        chunk = min(grid.max_chunk, capacity // 2)
        parameters = {"capacity": capacity, "chunk": chunk, "format": weight_format}
        estimate_s = 80 if place == 1 and model != "tiny" else 40
        return Task("correctness", model, place, estimate_s, parameters)

    if "tiny" in grid.models:
        yield task("tiny", grid.weight_format, 16, 1)
        return
    yield task("llama-3-8b", "float32", 64, 1)
    yield task("llama-3-8b", "bfloat16", 64, 5)
    yield task("llama-3-8b", "bfloat16", 1024, 60)
    yield task("qwen2.5-0.5b", "bfloat16", 64, 61)
    yield task("llama-2-7b", "float16", 64, 62)
    yield task("llama-3-8b", "float8", 64, 63)


def _variants(grid: Grid) -> Iterator[Task]:
    """Options of the engine. Measuring every layer's kernels takes minutes: a call of its own."""
    first = _by_importance(grid)[0]
    for model in grid.models:
        shared = {"capacity": _middle(grid), "format": grid.weight_format}
        place = 3 if model == first else 50
        yield Task("variant", model, place, 60, {**shared, "tune": False, "overlap": False})
        if model != "tiny":
            yield Task("variant", model, place + 1, 60, {**shared, "tune": False, "overlap": True})
            yield Task("variant", model, place + 160, 240, {**shared, "tune": True})


def _versus(grid: Grid) -> Iterator[Task]:
    def task(peer: str, model: str, capacity: int, place: int, estimate_s: float) -> Task:
        return Task("versus", model, place, estimate_s, {"peer": peer, "capacity": capacity})

    if "tiny" in grid.models:
        for place, peer in enumerate(("streaming_llm", "recompute", "static_compile")):
            yield task(peer, "tiny", grid.capacities[0], 6 + place, 30)
        return
    for model in (model for model in LLAMAS if model in grid.models):
        for place, capacity in enumerate(VERSUS_CAPACITIES):
            yield task("streaming_llm", model, capacity, 6 + 60 * place, 40)
        yield task("recompute", model, 1024, 80, 40)
        yield task("static_compile", model, 1024, 85, 120)
        yield task("streaming_llm", model, 2048, 210, 40)
        yield task("streaming_llm", model, 4096, 211, 40)


def _measurements(grid: Grid, model: str, base: int) -> Iterator[Task]:
    middle = _middle(grid)
    for capacity in grid.capacities:
        place = base + (10 if capacity == middle else 15)
        yield Task("decode", model, place, 25, {"capacity": capacity, "format": grid.weight_format})
    parameters = {"capacity": middle, "format": grid.weight_format}
    yield Task("prefill", model, base + 11, 15, parameters)
    yield Task("age", model, base + 12, 15, parameters)
    yield Task("restore", model, base + 13, 20, parameters)
    yield Task("overheads", model, base + 14, 50, parameters)
    yield Task("attention", model, base + 250, 60, parameters)
    if model == "llama-3-8b" and "tiny" not in grid.models:
        eight_bit = {"capacity": middle, "format": "float8"}
        yield Task("decode", model, base + 230, 25, eight_bit)


def _tensorrt(grid: Grid) -> Iterator[Task]:
    """The TensorRT engine where it makes sense: no variants, no host tier. A plan is built for each
    capacity (about half a minute), so tasks of one plan follow each other."""

    def task(section: str, model: str, place: int, estimate_s: float, **more: Any) -> Task:
        parameters = {"engine": "tensorrt", "format": grid.weight_format, **more}
        return Task(section, model, _TENSORRT + place, estimate_s, parameters)

    middle, small = _middle(grid), {"capacity": 64, "chunk": 32}
    ordered = _by_importance(grid)
    yield task("correctness", ordered[0], 0, 90, **small)
    yield task("correctness", ordered[0], 13, 90, **{**small, "format": "float32"})
    for number, model in enumerate(ordered):
        place = 10 + 10 * number
        yield task("decode", model, place, 90, capacity=middle)
        yield task("prefill", model, place + 1, 30, capacity=middle)
        yield task("age", model, place + 2, 30, capacity=middle)
    for number, model in enumerate(ordered):
        for capacity in grid.capacities:
            if capacity != middle:
                yield task("decode", model, 50 + number, 90, capacity=capacity)
