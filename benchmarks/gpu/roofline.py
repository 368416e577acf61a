"""What a step must move and compute at the least, and how long that takes on a measured card. Pure.

    time limit = max(bytes / bandwidth, operations / matmul rate)

Bytes that must go through the card's memory: every weight once a step, the keys and values that each
row sees, those it writes, and such activations as are too large to stay in the L2 cache (each written
once and read once). An operation is one multiplication or one addition.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from benchmarks.gpu.shapes import linear_parameters
from engine_build.spec import EngineSpec, WeightFormat

_WEIGHT_BYTES: Mapping[WeightFormat, float] = {
    "float32": 4,
    "float16": 2,
    "bfloat16": 2,
    "float8": 1,
    "int8": 1,
    "int4": 0.5 + 2 / 128,
}


@dataclass(frozen=True, slots=True)
class Limits:
    """What the card was measured to do: bytes and operations a second, bytes of L2."""

    bandwidth: float
    matmul: float
    l2_bytes: int


@dataclass(frozen=True, slots=True)
class Work:
    """The least that a step moves (bytes) and computes (operations)."""

    weight_bytes: int
    kv_read_bytes: int
    kv_write_bytes: int
    activation_bytes: int
    linear_operations: int
    attention_operations: int

    @property
    def bytes_moved(self) -> int:
        return self.weight_bytes + self.kv_read_bytes + self.kv_write_bytes + self.activation_bytes

    @property
    def operations(self) -> int:
        return self.linear_operations + self.attention_operations

    def seconds(self, limits: Limits) -> float:
        """The shortest time this work can take."""
        return max(self.bytes_moved / limits.bandwidth, self.operations / limits.matmul)

    def bound(self, limits: Limits) -> str:
        """Which of the two limits it: "bandwidth" or "matmul"."""
        by_bytes = self.bytes_moved / limits.bandwidth
        return "bandwidth" if by_bytes >= self.operations / limits.matmul else "matmul"


def weight_bytes(spec: EngineSpec) -> int:
    """Bytes of the weights that a step reads: layers and head, which has 16 bits or more."""
    shape, size = spec.model, _WEIGHT_BYTES[spec.weight_format]
    head = shape.vocab_size * shape.hidden_size
    head_size = max(2, size)
    return int((linear_parameters(shape) - head) * size + head * head_size)


def resident_weight_bytes(spec: EngineSpec) -> int:
    """Bytes of all weights in memory: the embedding too, where it is not the head."""
    shape = spec.model
    embedding = 0 if shape.tied_head else shape.vocab_size * shape.hidden_size
    return weight_bytes(spec) + int(embedding * max(2, _WEIGHT_BYTES[spec.weight_format]))


def kv_token_bytes(spec: EngineSpec) -> int:
    """Bytes of one token's keys and values in all layers, without padding."""
    shape = spec.model
    return 2 * shape.num_layers * shape.num_kv_heads * shape.head_dim * spec.kv_bytes


def decode_work(spec: EngineSpec, batch: int, limits: Limits) -> Work:
    """One decode step of `batch` full conversations."""
    return _work(spec, batch, batch, batch * spec.capacity, batch * spec.capacity, limits)


def prefill_work(spec: EngineSpec, chunk: int, limits: Limits, rows: int = 1) -> Work:
    """One step of `rows` chunks of `chunk` tokens deep in full conversations; one logit row each.

    A chunk reads the keys that any of its queries sees once, and scores `capacity` keys a query.
    """
    tokens = rows * chunk
    read = rows * (spec.capacity + chunk - 1)
    return _work(spec, tokens, rows, read, tokens * spec.capacity, limits)


def _work(
    spec: EngineSpec, tokens: int, logit_rows: int, keys_read: int, scores: int, limits: Limits
) -> Work:
    shape = spec.model
    head = shape.vocab_size * shape.hidden_size
    layers = linear_parameters(shape) - head
    item = 4 if spec.weight_format == "float32" else 2
    # The widest tensors between two kernels of a layer, and the float32 logits.
    inner = tokens * 2 * shape.intermediate_size * item
    logits = logit_rows * shape.vocab_size * 4
    spilled = shape.num_layers * inner * (inner > limits.l2_bytes)
    spilled += logits * (logits > limits.l2_bytes)
    return Work(
        weight_bytes=weight_bytes(spec),
        kv_read_bytes=keys_read * kv_token_bytes(spec),
        kv_write_bytes=tokens * kv_token_bytes(spec),
        activation_bytes=2 * spilled,
        linear_operations=2 * (tokens * layers + logit_rows * head),
        attention_operations=4 * shape.num_layers * shape.num_heads * shape.head_dim * scores,
    )


@dataclass(frozen=True, slots=True)
class Fit:
    """Whether a point fits into memory; `reason` says what is missing."""

    fits: bool
    needed_bytes: int
    reason: str = ""


WORKSPACE_BYTES = 5 << 30
"""CUDA context, libraries, activations of a step of 8192 tokens, logits, graphs: kept free beside weights and
slots. The engine's own reserve for Llama-3-8B at batch 256 comes to less."""


def fit(spec: EngineSpec, batch: int, memory_bytes: int) -> Fit:
    """Whether weights, `batch` kv_slots and the workspace fit into `memory_bytes`."""
    slots, weights = batch * spec.slot_bytes, resident_weight_bytes(spec)
    needed = weights + slots + WORKSPACE_BYTES
    if needed <= memory_bytes:
        return Fit(True, needed)
    reason = (
        f"{batch} kv_slots of {spec.slot_bytes / 2**20:,.0f} MiB and {weights / 2**30:.1f} GiB of "
        f"weights need {needed / 2**30:.0f} GiB, the card has {memory_bytes / 2**30:.0f}"
    )
    return Fit(False, needed, reason)


def largest_batch(spec: EngineSpec, batches: tuple[int, ...], memory_bytes: int) -> int:
    """The largest of `batches` that fits, 0 if none does."""
    return max((batch for batch in batches if fit(spec, batch, memory_bytes).fits), default=0)
