"""Where a decode step's time goes, kernel by kernel, by torch's own profiler: a table to tune from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.gpu.driving import decode_plans, step_seconds
from benchmarks.gpu.roofline import largest_batch
from benchmarks.gpu.shapes import Point
from benchmarks.gpu.subject import Subject

STEPS = 5
_ROWS = 40


def measure_profile(
    subject: Subject, point: Point, batches: tuple[int, ...], out: Path
) -> dict[str, Any]:
    """A table of `STEPS` steps at each batch that fits, added to OUT/profile.txt."""
    spec = point.spec
    slots = largest_batch(spec, batches, subject.memory_bytes)
    engine = subject.open(spec, slots)
    activities = [ProfilerActivity.CPU]
    order = "self_cpu_time_total"
    if subject.device.startswith("cuda"):
        activities.append(ProfilerActivity.CUDA)
        order = "self_cuda_time_total"
    path = out / "profile.txt"
    for batch in (b for b in batches if b <= slots):
        step_seconds(engine, decode_plans(spec, batch, 4))
        with profile(activities=activities) as recorded:
            step_seconds(engine, decode_plans(spec, batch, STEPS))
            if subject.device.startswith("cuda"):
                torch.cuda.synchronize()
        table = recorded.key_averages().table(
            sort_by=order, row_limit=_ROWS, max_name_column_width=70
        )
        with path.open("a") as file:
            file.write(f"{STEPS} decode steps, batch {batch}: {point.described()}\n{table}\n\n")
    return {**point.described(), "file": path.name}
