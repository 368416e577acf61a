"""Restoring a cold conversation: replay of its last windows against a copy from pinned host memory."""

from __future__ import annotations

from typing import Any

from benchmarks.gpu.driving import prefill_plans, random_tokens, step_seconds
from benchmarks.gpu.shapes import SINK_TOKENS, Effort, Point
from benchmarks.gpu.subject import Subject
from benchmarks.gpu.summary import spread
from benchmarks.gpu.timing import wall_times
from engine.cuda_slots import PinnedSlots
from engine.protocol import Engine, SlotCopy, StepPlan


def measure_restore(
    subject: Subject, point: Point, windows: tuple[int, ...], effort: Effort
) -> dict[str, Any]:
    """Seconds until the slot is as it was. `cheaper` says which way is quicker at each depth."""
    spec = point.spec
    engine = subject.open(spec, 1)
    copied = _copies(subject, engine, effort.least)
    depths = []
    for count in windows:
        plans = _replay_plans(subject, point, count)
        seconds = [sum(step_seconds(engine, plans)) for _ in range(effort.rounds + 1)][1:]
        replay = spread(seconds)
        depth: dict[str, Any] = {"windows": count, **replay, "steps": len(plans)}
        if copied:
            depth["cheaper"] = "copy" if copied["restore"]["ms"] < replay["ms"] else "replay"
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


def _copies(subject: Subject, engine: Engine, repetitions: int) -> dict[str, Any]:
    """A kv_slot to and from the engine's own tier of pinned host memory, each until all of it is done."""
    slots = getattr(engine, "slots", None)
    if slots is None:
        return {}
    tier = PinnedSlots(slots, 1)
    save = SlotCopy("save", kv_slot=0, host_slot=0)
    restore = SlotCopy("restore", kv_slot=0, host_slot=0)
    saved = wall_times(lambda: tier.run([save]), subject.device, repetitions)
    restored = wall_times(lambda: tier.run([restore]), subject.device, repetitions)
    tier.close()
    return {"save": spread(saved), "restore": spread(restored)}
