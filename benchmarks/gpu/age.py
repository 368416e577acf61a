"""Time per token at conversation ages from a thousand to four million tokens, set and not streamed."""

from __future__ import annotations

from typing import Any

from benchmarks.gpu.driving import decode_plans, step_seconds, warm_up
from benchmarks.gpu.shapes import Effort, Point
from benchmarks.gpu.subject import Subject
from benchmarks.gpu.summary import spread
from benchmarks.report import median


def measure_age(
    subject: Subject, point: Point, ages: tuple[int, ...], effort: Effort
) -> dict[str, Any]:
    """Batch 1, ages in turn in every round, so that a drift of the clocks meets all alike.

    `spread` is the largest median over the smallest, less one. Ages below a full cache are left out.
    """
    spec = point.spec
    engine = subject.open(spec, 1)
    old = [age for age in ages if age >= spec.capacity]
    warm_up(engine, decode_plans(spec, 1, effort.steps), effort.warm_s)
    seconds: dict[int, list[float]] = {age: [] for age in old}
    for number in range(effort.rounds + 1):
        for age in old:
            taken = step_seconds(engine, decode_plans(spec, 1, effort.steps, age))
            if number:
                # The first step after another age finds cold caches.
                seconds[age].extend(taken[1:])
    medians = [median(values) for values in seconds.values()]
    return {
        **point.described(),
        "ages": [{"age": age, **spread(seconds[age])} for age in old],
        "spread": max(medians) / min(medians) - 1,
    }
