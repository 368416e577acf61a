"""Decode: milliseconds a step and tokens a second at each batch, against the roofline of the point."""

from __future__ import annotations

from typing import Any

from benchmarks.gpu.driving import decode_plans, step_seconds, warm_up
from benchmarks.gpu.roofline import Limits, decode_work, fit, largest_batch
from benchmarks.gpu.shapes import Effort, Point
from benchmarks.gpu.subject import Subject
from benchmarks.gpu.summary import spread
from benchmarks.report import median


def measure_decode(
    subject: Subject, point: Point, batches: tuple[int, ...], limits: Limits, effort: Effort
) -> dict[str, Any]:
    """A full engine of `point`: every batch that fits, from 1 up; greedy, every conversation full."""
    spec = point.spec
    points: list[dict[str, Any]] = []
    skipped = []
    slots = largest_batch(spec, batches, subject.memory_bytes)
    for batch in batches:
        if batch > slots:
            reason = fit(spec, batch, subject.memory_bytes).reason
            skipped.append({"batch": batch, "reason": reason})
            continue
        engine = subject.open(spec, slots)
        first = warm_up(engine, decode_plans(spec, batch, effort.least), effort.warm_s)
        steps = effort.repetitions(first)
        seconds = step_seconds(engine, decode_plans(spec, batch, steps))
        work = decode_work(spec, batch, limits)
        limit = work.seconds(limits)
        points.append(
            {
                "batch": batch,
                **spread(seconds),
                "tokens_per_s": batch / median(seconds),
                "limit_ms": 1e3 * limit,
                "bound": work.bound(limits),
                "of_roofline": limit / median(seconds),
                "bytes_moved": work.bytes_moved,
                "operations": work.operations,
            }
        )
    return {**point.described(), "slots": slots, "points": points, "skipped": skipped}
