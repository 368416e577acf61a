"""What a decode step costs beside the model: sampling in its variants, logits to the host, launches."""

from __future__ import annotations

from typing import Any

from benchmarks.gpu.driving import GREEDY, decode_plans, step_seconds
from benchmarks.gpu.roofline import largest_batch
from benchmarks.gpu.shapes import Effort, Point
from benchmarks.gpu.subject import Subject
from benchmarks.gpu.summary import spread
from engine.sampling import SamplingParams

VARIANTS = {
    "greedy": GREEDY,
    "temperature 0.7, top-p 0.9": SamplingParams(temperature=0.7, top_p=0.9, seed=1),
    "top-k 40, min-p 0.05": SamplingParams(top_k=40, min_p=0.05, seed=2),
    "penalties over the window": SamplingParams(
        repetition_penalty=1.1, presence_penalty=0.2, seed=3
    ),
    "with 5 log-probabilities": SamplingParams(logprobs=True, top_logprobs=5, seed=4),
}


def measure_overheads(
    subject: Subject, point: Point, batches: tuple[int, ...], effort: Effort
) -> dict[str, Any]:
    """Variants in turn in every round, then the same greedy steps without CUDA graphs."""
    spec = point.spec
    slots = largest_batch(spec, batches, subject.memory_bytes)
    found: list[dict[str, Any]] = []
    for batch in (b for b in batches if b <= slots):
        engine = subject.open(spec, slots)
        seconds: dict[str, list[float]] = {name: [] for name in VARIANTS}
        for number in range(effort.rounds + 1):
            for name, params in VARIANTS.items():
                plans = decode_plans(spec, batch, effort.steps, params=params)
                taken = step_seconds(engine, plans)
                if number:
                    seconds[name].extend(taken[1:])
        found.append({"batch": batch, "sampling": {name: spread(v) for name, v in seconds.items()}})
    for result in found:
        engine = subject.open(spec, slots, capture=False)
        steps = effort.steps * (effort.rounds + 1)
        taken = step_seconds(engine, decode_plans(spec, result["batch"], steps))
        result["without_graphs"] = spread(taken[effort.steps :])
    return {**point.described(), "batches": found}
