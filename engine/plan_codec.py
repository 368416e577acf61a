"""A StepPlan as bytes for the other tensor-parallel ranks, and back.

    magic "SSPL" | version u16 | copies u16 | rows u32 | CRC-32 of the rest u32
    int64 [rows, 8]: kv_slot, start, tokens, sink_tokens, window_tokens, ring_tokens, window_start, wants
    int32: the tokens of all rows, one after another
    int32 [copies, 3]: 0 to save, 1 to restore; kv_slot, host_slot

Little-endian. `wants` is 0, 1 or 2 for logits none, last or all, plus 4 for a sample. How to sample is
rank 0's business alone and stays there: the others get `UNSAMPLED` in its place.
"""

from __future__ import annotations

import struct
import zlib

import numpy as np

from engine.protocol import Row, SampleRequest, SlotCopy, StepPlan
from engine.sampling import SamplingParams
from engine.window import SinkWindow

VERSION = 2
UNSAMPLED = SampleRequest(SamplingParams(temperature=0.0), 0, 0, np.zeros(0, np.int32))
"""Says that rank 0 draws a token after this row."""

_MAGIC = b"SSPL"
_HEADER = struct.Struct("<4sHHII")
_FIELDS = 8
_COPY_FIELDS = 3
_LOGITS = ("none", "last", "all")
_SAMPLES = 4


class PlanDamaged(ValueError):
    """Bytes that are no plan of this version, or not all of it."""


def encode_plan(plan: StepPlan) -> bytes:
    """See the module. The plan has passed `plan_check.check_plan`."""
    table = np.array(
        [
            (
                row.kv_slot,
                row.start,
                len(row.tokens),
                row.window.sink_tokens,
                row.window.window_tokens,
                row.window.ring_tokens,
                row.window_start,
                _LOGITS.index(row.logits) + (0 if row.sample is None else _SAMPLES),
            )
            for row in plan.rows
        ],
        dtype="<i8",
    )
    tokens = [np.asarray(row.tokens, dtype="<i4").tobytes() for row in plan.rows]
    copies = np.array(
        [(copy.direction == "restore", copy.kv_slot, copy.host_slot) for copy in plan.copies],
        dtype="<i4",
    )
    body = b"".join([table.tobytes(), *tokens, copies.tobytes()])
    counts = (len(plan.copies), len(plan.rows))
    return _HEADER.pack(_MAGIC, VERSION, *counts, zlib.crc32(body)) + body


def decode_plan(data: bytes) -> StepPlan:
    """Inverse of `encode_plan`, up to how to sample. Raises PlanDamaged."""
    if len(data) < _HEADER.size:
        raise PlanDamaged(f"{len(data)} bytes are no plan")
    magic, version, num_copies, num_rows, checksum = _HEADER.unpack_from(data)
    if (magic, version) != (_MAGIC, VERSION):
        raise PlanDamaged(f"not a plan of version {VERSION}: every rank must run the same release")
    body = memoryview(data)[_HEADER.size :]
    table_bytes = num_rows * _FIELDS * 8
    if zlib.crc32(body) != checksum or len(body) < table_bytes:
        raise PlanDamaged("the plan was altered on its way, or cut")
    table = np.frombuffer(body[:table_bytes], dtype="<i8").reshape(num_rows, _FIELDS).tolist()
    words = np.frombuffer(body[table_bytes : len(body) - len(body) % 4], dtype="<i4")
    num_tokens = len(words) - num_copies * _COPY_FIELDS
    tokens, copies = words[: max(num_tokens, 0)], words[max(num_tokens, 0) :]
    counts = [fields[2] for fields in table]
    if len(body) % 4 or min(counts, default=0) < 0 or sum(counts) != num_tokens:
        raise PlanDamaged(f"the rows name {sum(counts)} tokens, {num_tokens} came")
    rows, end = [], 0
    for fields, count in zip(table, counts, strict=True):
        begin, end = end, end + count
        rows.append(_row(fields, tokens[begin:end].astype(np.int32)))
    return StepPlan(
        tuple(rows), tuple(_copy(*fields) for fields in copies.reshape(-1, _COPY_FIELDS).tolist())
    )


def _copy(direction: int, kv_slot: int, host_slot: int) -> SlotCopy:
    if direction not in (0, 1):
        raise PlanDamaged(f"a copy goes in direction {direction}, which means nothing")
    return SlotCopy("restore" if direction else "save", kv_slot, host_slot)


def _row(fields: list[int], tokens: np.typing.NDArray[np.int32]) -> Row:
    kv_slot, start, _, sink_tokens, window_tokens, ring_tokens, window_start, wants = fields
    if not 0 <= wants < _SAMPLES + len(_LOGITS) or wants == _SAMPLES - 1:
        raise PlanDamaged(f"a row wants {wants}, which means nothing")
    try:
        window = SinkWindow(sink_tokens, window_tokens, ring_tokens)
    except ValueError as error:
        raise PlanDamaged(str(error)) from error
    sample = UNSAMPLED if wants >= _SAMPLES else None
    logits = _LOGITS[wants % _SAMPLES]
    return Row(kv_slot, start, tokens, window, window_start, sample, logits)  # type: ignore[arg-type]
