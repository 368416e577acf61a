"""Our engine and a peer in turn, round by round, each in its own process: both meet the same clocks."""

from __future__ import annotations

import time
from typing import Any

from benchmarks.gpu.budget import Task
from benchmarks.gpu.process import WorkerProcess
from benchmarks.gpu.shapes import Effort
from benchmarks.gpu.summary import spread
from benchmarks.report import median, paired_ratio

RECOMPUTED = 4
"""Steps a round of a peer that takes a window's prefill for each."""


def measure_versus(
    subject: WorkerProcess,
    peer: WorkerProcess,
    task: Task,
    timeout_s: float,
    given: dict[str, Any],
    effort: Effort,
) -> dict[str, Any]:
    """Batch 1, greedy, full windows. `ratio`: median over the rounds of their time over ours. `given`: see
    `SubjectProcess.measure`.

    Raises WorkerFailed if either cannot, or not within `timeout_s` in all.
    """
    end = time.monotonic() + timeout_s
    name, capacity = task.parameters["peer"], task.parameters["capacity"]
    # First, since what is open may fill the card, and the peer needs room.
    asked = {"model": task.model, "capacity": capacity, "steps": effort.steps, "given": given}
    subject.call("rounds", end - time.monotonic(), **asked)
    opened = peer.call(
        "open", end - time.monotonic(), peer=name, model=task.model, capacity=capacity
    )
    ours: list[float] = []
    theirs: list[float] = []
    paired: list[tuple[float, float]] = []
    described: dict[str, Any] = {}
    for number in range(effort.rounds + 1):
        mine = subject.call("rounds", end - time.monotonic(), **asked)
        steps = min(effort.steps, RECOMPUTED) if name == "recompute" else effort.steps
        other = peer.call("decode", end - time.monotonic(), steps=steps)
        described = {key: value for key, value in mine.items() if key != "seconds"}
        if number:
            ours.extend(mine["seconds"])
            theirs.extend(other["seconds"])
            paired.append((median(other["seconds"]), median(mine["seconds"])))
    return {
        **described,
        "peer": name,
        "peer_dtype": opened["dtype"],
        "ours": {**spread(ours), "tokens_per_s": 1 / median(ours)},
        "theirs": {**spread(theirs), "tokens_per_s": 1 / median(theirs)},
        "ratio": paired_ratio([pair[0] for pair in paired], [pair[1] for pair in paired]),
    }
