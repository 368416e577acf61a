"""Refuses plans that would read or write the wrong memory or rotate at the wrong angle."""

from __future__ import annotations

from engine.protocol import Row, StepPlan
from engine_build.spec import EngineSpec

MAX_TOKEN_INDEX = 2**40
"""Far beyond any conversation, and float64 angles are still good to 1e-4 there."""


def check_plan(plan: StepPlan, spec: EngineSpec, max_resident: int, host_slots: int = 0) -> None:
    """Raises ValueError naming the field of the first copy or row that the engine cannot run."""
    for number, copy in enumerate(plan.copies):
        if not 0 <= copy.kv_slot < max_resident:
            raise ValueError(
                f"copies[{number}].kv_slot: {copy.kv_slot} is not in 0..{max_resident - 1}"
            )
        if not 0 <= copy.host_slot < host_slots:
            raise ValueError(
                f"copies[{number}].host_slot: {copy.host_slot}, there are {host_slots} host slots"
            )
    seen: set[int] = set()
    for number, row in enumerate(plan.rows):
        problem = _problem(row, spec, max_resident)
        if row.kv_slot in seen:
            problem = f"kv_slot: {row.kv_slot} is in this plan twice"
        if problem:
            raise ValueError(f"rows[{number}].{problem}")
        seen.add(row.kv_slot)


def _problem(row: Row, spec: EngineSpec, max_resident: int) -> str | None:
    tokens, window = row.tokens, row.window
    if not 0 <= row.kv_slot < max_resident:
        return f"kv_slot: {row.kv_slot} is not in 0..{max_resident - 1}"
    if not 0 <= row.start < MAX_TOKEN_INDEX:
        return f"start: {row.start} is not in 0..2**40 - 1"
    if tokens.ndim != 1 or tokens.dtype.kind not in "iu":
        return f"tokens: {tokens.dtype} {tokens.shape} is not a vector of integers"
    if not 1 <= len(tokens) <= spec.max_chunk:
        return f"tokens: {len(tokens)} of them, not 1..{spec.max_chunk}"
    # Most rows have one token, and the reductions would cost more than all other checks.
    lowest, highest = tokens[0], tokens[0]
    if len(tokens) > 1:
        lowest, highest = tokens.min(), tokens.max()
    if lowest < 0 or highest >= spec.model.vocab_size:
        return f"tokens: an id is not in 0..{spec.model.vocab_size - 1}"
    if max(row.start, window.sink_tokens) < min(row.start + len(tokens), row.window_start):
        return f"window_start: {row.window_start} is past a token of this row"
    if window.sink_tokens > spec.max_sink_tokens:
        return f"window.sink_tokens: {window.sink_tokens} > {spec.max_sink_tokens}"
    if window.ring_tokens < 1:
        return "window.ring_tokens: a conversation needs a ring"
    if window.slot_tokens > spec.slot_tokens:
        return f"window.slot_tokens: {window.slot_tokens} > {spec.slot_tokens}"
    if row.logits not in ("none", "last", "all"):
        return f"logits: {row.logits!r} is not none, last or all"
    return None


def check_rings(plan: StepPlan) -> None:
    """For engines that write a chunk before they read: no key may be overwritten that the chunk's first
    query still sees. Raises ValueError naming the field.
    """
    for number, row in enumerate(plan.rows):
        needed = row.window.window_tokens + len(row.tokens) - 1
        if row.window.ring_tokens < needed:
            raise ValueError(
                f"rows[{number}].window.ring_tokens: {row.window.ring_tokens} < {needed}, which a chunk "
                f"of {len(row.tokens)} tokens needs"
            )
