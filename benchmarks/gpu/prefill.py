"""Prefill: tokens a second deep in a full conversation, against the measured rate of matrix products."""

from __future__ import annotations

from typing import Any

from benchmarks.gpu.driving import prefill_plans, random_tokens, step_seconds, warm_up
from benchmarks.gpu.roofline import Limits, prefill_work
from benchmarks.gpu.shapes import Effort, Point
from benchmarks.gpu.subject import Subject
from benchmarks.gpu.summary import spread
from benchmarks.report import median
from engine.protocol import StepPlan


def measure_prefill(
    subject: Subject, point: Point, limits: Limits, effort: Effort
) -> dict[str, Any]:
    """Chunks of `max_chunk` tokens of one conversation that is full and slides."""
    spec = point.spec
    engine = subject.open(spec, 1)
    chunk = spec.max_chunk

    def plans(chunks: int) -> list[StepPlan]:
        tokens = random_tokens(3, chunks * chunk, spec.model.vocab_size)
        return prefill_plans(spec, 2 * spec.slot_tokens, tokens)

    first = step_seconds(engine, plans(3))
    measured = plans(effort.repetitions(first[-1]))
    # All of them once before: where the ring's end cuts a chunk decides which kernels it needs.
    warm_up(engine, measured, effort.warm_s)
    seconds = step_seconds(engine, measured)
    work = prefill_work(spec, chunk, limits)
    return {
        **point.described(),
        "chunk": chunk,
        **spread(seconds),
        "tokens_per_s": chunk / median(seconds),
        "limit_ms": 1e3 * work.seconds(limits),
        "of_roofline": work.seconds(limits) / median(seconds),
        "operations": work.operations,
        "of_matmul_rate": work.operations / median(seconds) / limits.matmul,
    }
