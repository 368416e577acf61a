"""Where a decode step of the CPU engine goes: ONNX Runtime's own profile beside the engine's counters."""

from __future__ import annotations

import json
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.peers.sinkserve_worker import Subject

PARTS = {"BlockLinear": "linear layers", "SinkAttention": "attention and cache writes"}
OTHER = "norms, activations, embedding"


def breakdown(engine_dir: Path, rows: int, threads: int, capacity: int) -> dict[str, float]:
    """Milliseconds of a decode step of `rows` full conversations, by part.

    The graph's parts come from a profiled run, which makes its small nodes dearer than they are; "whole
    step" is a run without. New keys and values are written into the cache by the attention itself.
    """
    whole = _steps(engine_dir, rows, threads, capacity, None)
    with tempfile.TemporaryDirectory() as folder:
        _steps(engine_dir, rows, threads, capacity, Path(folder) / "trace")
        (trace,) = Path(folder).glob("trace*.json")
        parts = _graph_parts(json.loads(trace.read_text(encoding="utf-8")))
    return {**parts, **whole}


def _steps(
    engine_dir: Path, rows: int, threads: int, capacity: int, profile: Path | None
) -> dict[str, float]:
    subject = Subject(str(engine_dir), threads, rows, capacity, 4, profile)
    numbers = np.random.default_rng(0)
    for row in range(rows):
        subject.prefill(row, numbers.integers(1000, 40000, capacity + 64).tolist())
    subject.decode(rows, 8)
    times, steps = subject.engine.times, 48
    before = (times.prepare_s, times.run_s, times.sample_s)
    seconds = subject.decode(rows, steps)
    after = (times.prepare_s, times.run_s, times.sample_s)
    subject.engine.close()
    names = ("prepare (host)", "graph", "sampling (host)")
    spent = {
        name: 1000 * (end - begin) / steps
        for name, begin, end in zip(names, before, after, strict=True)
    }
    whole = 1000 * seconds / steps
    return {**spent, "Python around it": whole - sum(spent.values()), "whole step": whole}


def _graph_parts(events: list[dict[str, Any]]) -> dict[str, float]:
    runs = [event for event in events if event["name"] == "model_run"]
    # The last runs are decode steps of all rows.
    counted = runs[-40:]
    begin = counted[0]["ts"]
    spent: Counter[str] = Counter()
    for event in events:
        is_kernel = event.get("cat") == "Node" and event["name"].endswith("kernel_time")
        if is_kernel and event["ts"] >= begin:
            spent[PARTS.get(event["args"]["op_name"], OTHER)] += event["dur"]
    return {f"graph: {name}": spent[name] / len(counted) / 1000 for name in sorted(spent)}
