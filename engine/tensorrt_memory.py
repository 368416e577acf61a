"""How much of a GPU's memory a TensorRT plan's cache may take. Plain arithmetic, as cuda_memory.py is.

    free once weights, the contexts' scratch, decode logits and the sampler are there
      = cache rows + logits that somebody wants to see or to draw from + a row that is moved + libraries

The engine runs its largest steps at start, when all else is there: an estimate that is too small ends as a
SpecError then, not as a failed step of somebody's turn.
"""

from __future__ import annotations

from engine_build.plan_inputs import cache_row_bytes
from engine_build.spec import EngineSpec, SpecError

LIBRARIES_BYTES = 512 * 2**20
"""Kernels that TensorRT-RTX compiles here, contexts, captured graphs, what torch rounds up."""

_LOGIT_BYTES = 4
_MIB = 2**20


def reserve_bytes(spec: EngineSpec, max_held: int) -> int:
    """What is kept free of cache rows: logits of a whole chunk, `max_held` rows of them that wait to be drawn
    from and those rows side by side, the copy of a cache row that changes places, and the libraries'."""
    # Of ranks: their own part, the parts of all as they come, and in order.
    copies = 1 if spec.tp_size == 1 else 3
    logits = (copies * spec.max_chunk + 2 * max_held) * spec.model.vocab_size * _LOGIT_BYTES
    return logits + cache_row_bytes(spec) + LIBRARIES_BYTES


def rows_of_budget(spec: EngineSpec, budget_bytes: int) -> int:
    """Cache rows that `budget_bytes` hold. Raises SpecError below one."""
    row_bytes = cache_row_bytes(spec)
    if budget_bytes < row_bytes:
        raise SpecError(
            "memory_budget_bytes",
            f"{budget_bytes / _MIB:.1f} MiB do not hold one kv_slot ({row_bytes / _MIB:.1f} MiB)",
            "Raise the budget or lower the capacity",
        )
    return budget_bytes // row_bytes


def rows_that_fit(spec: EngineSpec, max_held: int, free_bytes: int) -> int:
    """Cache rows for a rank with so much free memory. Raises SpecError if there is no room for one."""
    reserve, row_bytes = reserve_bytes(spec, max_held), cache_row_bytes(spec)
    if free_bytes < reserve + row_bytes:
        raise SpecError(
            "memory_budget_bytes",
            f"{free_bytes / _MIB:.0f} MiB are free, steps need {reserve / _MIB:.0f} MiB and a kv_slot "
            f"{row_bytes / _MIB:.1f} MiB",
            "Free the GPU, lower max_running or the capacity, or use more ranks",
        )
    return (free_bytes - reserve) // row_bytes
