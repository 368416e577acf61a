"""How a GPU's memory is divided: what steps need is set aside, kv_slots get the rest. Plain arithmetic.

    free once weights, logits and the sampler are there
      = kv_slots + staging of the host tier + the largest step + logits that somebody wants to see + libraries

The engine runs that largest step at start, when all else is there: an estimate that is too small ends as a
SpecError then, not as a failed step of somebody's turn.
"""

from __future__ import annotations

from engine.cuda_options import CudaOptions
from engine_build.spec import EngineSpec, SpecError

NUM_STAGING = 2
"""kv_slots of device memory through which the host tier copies."""

LIBRARIES_BYTES = 1024 * 2**20
"""cuBLAS's workspace (32 MiB for each stream on Hopper), code of kernels, graphs, parts of split attention
rows, pieces of a matrix that is unpacked, and what the caching allocator rounds up."""

_MIB = 2**20
_PLAIN = ("float32", "float16", "bfloat16")


def largest_step_tokens(spec: EngineSpec, options: CudaOptions) -> int:
    """The most tokens of one launch: a part of a plan has at least one row, however long."""
    return max(options.max_step_tokens, spec.max_chunk)


def most_logits(spec: EngineSpec, options: CudaOptions) -> int:
    """The most rows of logits of one launch: those of a row that shows all and samples, at least."""
    return max(options.max_running, spec.max_chunk + 1)


def token_bytes(spec: EngineSpec) -> int:
    """Device memory that a token of a step needs while layers run; `spec.model` is the rank's own shape.

    Tensors that exist at the same time, in the widest moment of attention and in that of the MLP. Both
    count, as blocks freed by the one are too small for the other. Narrow weights go through copies.
    """
    model = spec.model
    hidden, inner = model.hidden_size, model.intermediate_size
    heads, kv = model.num_heads * model.head_dim, model.num_kv_heads * model.head_dim
    narrow = spec.weight_format not in _PLAIN
    copies = 2 if narrow else 1
    qkv = heads + 2 * kv
    # normed + qkv | qkv + q rotated twice + attended | attended + its product
    attention = max(hidden + copies * qkv, qkv + 3 * heads, heads + (hidden if narrow else 0))
    # normed + gate and up + gated | gated + its product
    mlp = hidden + (2 * copies + 1) * inner
    levels = max(hidden, inner, heads) if narrow else 0
    angles = 4 * (model.rope.rotary_dim // 2) * 4
    return spec.kv_bytes * (hidden + attention + mlp) + levels + angles


def reserve_bytes(spec: EngineSpec, options: CudaOptions, num_ranks: int = 1) -> int:
    """What a rank keeps free of kv_slots: its largest step beside the captured ones, logits beyond those
    of `max_running` rows, and what libraries take."""
    tokens = largest_step_tokens(spec, options) + options.max_running
    rows = most_logits(spec, options)
    beyond = rows if rows > options.max_running else 0
    # The parts of all ranks, as they come and in order.
    gathered = 3 * rows if num_ranks > 1 else 0
    logits = (beyond + gathered) * spec.model.vocab_size * 4
    return tokens * token_bytes(spec) + logits + LIBRARIES_BYTES


def slots_that_fit(
    spec: EngineSpec, options: CudaOptions, free_bytes: int, num_ranks: int = 1
) -> int:
    """kv_slots for a rank with so much free memory. Raises SpecError if there is no room for one."""
    staging = NUM_STAGING * spec.slot_bytes if options.host_memory_bytes else 0
    reserve = reserve_bytes(spec, options, num_ranks) + staging
    if free_bytes < reserve + spec.slot_bytes:
        raise SpecError(
            "memory_budget_bytes",
            f"{free_bytes / _MIB:.0f} MiB are free, a step needs {reserve / _MIB:.0f} MiB and a kv_slot "
            f"{spec.slot_bytes / _MIB:.1f} MiB",
            "Free the GPU, lower max_step_tokens, max_running or the capacity, or use more ranks",
        )
    return (free_bytes - reserve) // spec.slot_bytes


def slots_of_budget(spec: EngineSpec, budget_bytes: int) -> int:
    """kv_slots that `budget_bytes` hold. Raises SpecError below one."""
    if budget_bytes < spec.slot_bytes:
        raise SpecError(
            "memory_budget_bytes",
            f"{budget_bytes / _MIB:.1f} MiB do not hold one kv_slot ({spec.slot_bytes / _MIB:.1f} MiB)",
            "Raise the budget, lower the capacity, or use more ranks",
        )
    return budget_bytes // spec.slot_bytes
