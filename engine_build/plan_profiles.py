"""The shapes that a TensorRT plan is built for: a few ranges of batch and chunk, tuned one by one.

A step runs its decode rows as one pass [batch, 1], padded to a bucket, and each prefill chunk as a pass
[1, chunk] of its exact length: padding a chunk would write keys of no token into the ring.
"""

from __future__ import annotations

from dataclasses import dataclass

from engine_build.engine_names import LOGIT_ROWS
from engine_build.plan_inputs import (
    ANGLES,
    NUM_ROW_FIELDS,
    QUERY_AGES,
    ROW_FIELDS,
    TOKEN_IDS,
    WRITE_PLACES,
    cache_names,
    kv_heads,
    num_places,
)
from engine_build.spec import EngineSpec

MAX_BATCH = 256
"""The most decode rows of one pass; a step of more is run in several."""

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Size:
    """A pass: conversations side by side, tokens of each, rows of logits."""

    batch: int
    chunk: int
    logits: int


@dataclass(frozen=True, slots=True)
class Profile:
    """Passes from `least` to `most`, tuned for `usual`."""

    least: Size
    usual: Size
    most: Size


_DECODE = ((1, 1, 1), (2, 8, 16), (17, 64, MAX_BATCH))


def plan_profiles(spec: EngineSpec) -> tuple[Profile, ...]:
    """Decode profiles by batch, then prefill if a chunk may have more than one token."""
    decode = [Profile(*(Size(batch, 1, batch) for batch in batches)) for batches in _DECODE]
    chunk = spec.max_chunk
    if chunk == 1:
        return tuple(decode)
    return (*decode, Profile(Size(1, 2, 1), Size(1, chunk, 1), Size(1, chunk, chunk)))


def profile_for(batch: int, chunk: int) -> int:
    """Index among `plan_profiles` of the one that holds a pass of this size."""
    if chunk > 1:
        return len(_DECODE)
    return next(n for n, (_, _, most) in enumerate(_DECODE) if batch <= most)


def decode_buckets(max_rows: int) -> tuple[int, ...]:
    """Batches that decode passes are padded to: powers of two, and `max_rows` (at most 256) itself."""
    largest = min(max_rows, MAX_BATCH)
    powers = [2**n for n in range(largest.bit_length()) if 2**n < largest]
    return (*powers, largest)


def input_shapes(spec: EngineSpec, size: Size) -> dict[str, Shape]:
    """Shapes of all inputs of a pass but the weights, by name."""
    batch, chunk = size.batch, size.chunk
    half = spec.model.rope.rotary_dim // 2
    cache = (batch, kv_heads(spec), num_places(spec), spec.model.head_dim)
    shapes: dict[str, Shape] = {
        TOKEN_IDS: (batch, chunk),
        ANGLES: (4, batch, chunk, half),
        WRITE_PLACES: (batch,),
        QUERY_AGES: (chunk,),
        ROW_FIELDS: (batch, NUM_ROW_FIELDS),
        LOGIT_ROWS: (size.logits,),
    }
    for layer in range(spec.model.num_layers):
        for name in cache_names(layer):
            shapes[name] = cache
    return shapes
