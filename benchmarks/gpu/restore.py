"""Restoring a cold conversation: replay of its last windows against a copy from pinned host memory."""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.gpu.driving import prefill_plans, random_tokens, step_seconds
from benchmarks.gpu.shapes import SINK_TOKENS, Effort, Point
from benchmarks.gpu.subject import Subject
from benchmarks.gpu.summary import spread
from benchmarks.gpu.timing import device_times
from engine.protocol import StepPlan


def measure_restore(
    subject: Subject, point: Point, windows: tuple[int, ...], effort: Effort
) -> dict[str, Any]:
    """Seconds until the slot is as it was. `cheaper` says which way is quicker at each depth."""
    spec = point.spec
    engine = subject.open(spec, 1)
    copied = _copies(subject, spec.slot_bytes)
    depths = []
    for count in windows:
        plans = _replay_plans(subject, point, count)
        seconds = [sum(step_seconds(engine, plans)) for _ in range(effort.rounds + 1)][1:]
        replay = spread(seconds)
        depth: dict[str, Any] = {"windows": count, **replay, "steps": len(plans)}
        if copied:
            depth["cheaper"] = "copy" if copied["to_device"]["ms"] < replay["ms"] else "replay"
        depths.append(depth)
    return {**point.described(), "slot_bytes": spec.slot_bytes, "replay": depths, "copy": copied}


def _replay_plans(subject: Subject, point: Point, windows: int) -> list[StepPlan]:
    """Sinks, then the last `windows` windows, as cluster/restore.py plans them."""
    spec = point.spec
    recent = windows * (spec.capacity - SINK_TOKENS)
    begin = 10 * recent + SINK_TOKENS
    tokens = random_tokens(windows, SINK_TOKENS + recent, spec.model.vocab_size)
    sinks = prefill_plans(spec, 0, tokens[:SINK_TOKENS], window_start=begin)
    return sinks + prefill_plans(spec, begin, tokens[SINK_TOKENS:], window_start=begin)


def _copies(subject: Subject, size: int) -> dict[str, Any]:
    """One slot's bytes between pinned host memory and the card, as a single copy: the least it can take."""
    if not subject.device.startswith("cuda"):
        return {}
    there = torch.empty(size, dtype=torch.uint8, device=subject.device).random_()
    here = torch.empty(size, dtype=torch.uint8, pin_memory=True)
    to_host = device_times(lambda: here.copy_(there, non_blocking=True), subject.device, 10)
    to_device = device_times(lambda: there.copy_(here, non_blocking=True), subject.device, 10)
    return {"to_host": spread(to_host), "to_device": spread(to_device)}
