"""Which of the engine's variants is fastest on this card, and the table of kernels that it reads.

`CudaOptions.tune` lets the engine measure at start which kernel serves each linear layer at each number of
tokens (minutes, most of them compiling); `CudaOptions.overlap` starts kernels early. Each combination is a
section of its own, so that one that breaks costs only itself. What is measured later in the run,
correctness too, uses what `chosen_options` reads from the results.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from benchmarks.gpu.driving import decode_plans, step_seconds, warm_up
from benchmarks.gpu.roofline import largest_batch
from benchmarks.gpu.shapes import Effort, Point
from benchmarks.gpu.subject import Subject
from benchmarks.gpu.summary import spread
from engine.cuda_options import CudaOptions


def measure_variant(
    subject: Subject, point: Point, batches: tuple[int, ...], effort: Effort, options: CudaOptions
) -> dict[str, Any]:
    """Milliseconds of a decode step at each batch that fits; `choices`: what the engine measured."""
    spec = point.spec
    slots = largest_batch(spec, batches, subject.memory_bytes)
    subject.options = options
    engine = subject.open(spec, slots)
    found = []
    for batch in (b for b in batches if b <= slots):
        warm_up(engine, decode_plans(spec, batch, effort.least), effort.warm_s)
        seconds = step_seconds(engine, decode_plans(spec, batch, 2 * effort.steps))
        found.append({"batch": batch, **spread(seconds)})
    choices: Mapping[str, str] = getattr(engine, "choices", {})
    return {
        **point.described(),
        "tune": options.tune,
        "overlap": options.overlap,
        "batches": found,
        "mean_ms": math.exp(sum(math.log(row["ms"]) for row in found) / len(found)),
        "choices": dict(choices),
    }
