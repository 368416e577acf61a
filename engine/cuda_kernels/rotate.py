"""Rotary embedding: angles from float64, then q/k norm, rotation and the cache write in one pass.

Keys are stored rotated at their token_index, sinks too. A query is rotated twice: at its token_index for
the window, whose keys then meet it at i - j; and at its cache position c(i) = min(i, S + R - 1) for the
sinks, which then meet it at c(i) - j. That is "move the sinks, not the window" with the motion on the
query's side: a stored key is never touched again.
"""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from engine.cuda_kernels.common import interpreted, launch_options, power_of_two
from engine.cuda_step import ROW_FIELDS

_TURN = tl.constexpr(6.283185307179586)


@dataclass(frozen=True, slots=True)
class HeadNorms:
    """RMS norm of each query and key head: weights [head_dim]."""

    q: Tensor
    k: Tensor
    epsilon: float


@triton.jit
def _angle(at, frequency):
    """float32 in [-pi, pi], reduced in float64: float32 products are off by 0.15 rad at 4 million."""
    angle = at.to(tl.float64)[:, None] * frequency[None, :]
    return (angle - tl.floor(angle / _TURN + 0.5) * _TURN).to(tl.float32)


@triton.jit(do_not_specialize=["num_tokens"])
def _rotation_angles(
    rows,
    token_rows,
    frequencies,
    out,
    num_tokens,
    factor,
    half: tl.constexpr,
    row_fields: tl.constexpr,
    block_t: tl.constexpr,
    block_half: tl.constexpr,
    overlap: tl.constexpr,
):
    token = tl.program_id(0) * block_t + tl.arange(0, block_t)
    live = token < num_tokens
    if overlap:
        gdc_launch_dependents()
        gdc_wait()
    fields = rows + tl.load(token_rows + token, mask=live, other=0) * row_fields
    index = tl.load(fields + 2) + token - tl.load(fields + 7)
    capacity = tl.load(fields + 3) + tl.load(fields + 4)
    pair = tl.arange(0, block_half)
    frequency = tl.load(frequencies + pair, mask=pair < half, other=0.0)
    at_index = _angle(index, frequency)
    at_cache = _angle(tl.minimum(index, capacity - 1), frequency)
    places = out + token.to(tl.int64)[:, None] * (4 * half) + pair[None, :]
    real = live[:, None] & (pair < half)[None, :]
    tl.store(places, tl.cos(at_index) * factor, mask=real)
    tl.store(places + half, tl.sin(at_index) * factor, mask=real)
    tl.store(places + 2 * half, tl.cos(at_cache) * factor, mask=real)
    tl.store(places + 3 * half, tl.sin(at_cache) * factor, mask=real)


@triton.jit(do_not_specialize=["num_tokens"])
def _rotate_and_cache(
    qkv,
    angles,
    q_norm,
    k_norm,
    q_out,
    cache,
    rows,
    token_rows,
    num_tokens,
    slot_stride,
    values_offset,
    head_stride,
    epsilon,
    heads: tl.constexpr,
    kv_heads: tl.constexpr,
    dim: tl.constexpr,
    half: tl.constexpr,
    place_stride: tl.constexpr,
    row_fields: tl.constexpr,
    normed: tl.constexpr,
    block: tl.constexpr,
    block_half: tl.constexpr,
    block_rest: tl.constexpr,
    overlap: tl.constexpr,
):
    all_heads: tl.constexpr = heads + 2 * kv_heads
    rest: tl.constexpr = dim - 2 * half
    unit = tl.program_id(0) * block + tl.arange(0, block)
    token, head = unit // all_heads, unit % all_heads
    live = token < num_tokens
    pair = tl.arange(0, block_half)[None, :]
    turned = pair < half
    if overlap:
        gdc_launch_dependents()
        gdc_wait()

    fields = rows + tl.load(token_rows + token, mask=live, other=0) * row_fields
    slot, count, start = tl.load(fields), tl.load(fields + 1), tl.load(fields + 2)
    sinks, ring = tl.load(fields + 3), tl.load(fields + 5)
    offset = token - tl.load(fields + 7)
    index = start + offset
    # Padding has no ring either.
    past = (index - sinks) % tl.maximum(ring, 1)
    place = tl.where(index < sinks, index, sinks + past)
    is_q, is_v = head < heads, head >= heads + kv_heads
    # The last head of the last token may lie past 2**31 elements of a long prefill.
    source = qkv + unit.to(tl.int64)[:, None] * dim
    shown = live[:, None] & turned
    x1 = tl.load(source + pair, mask=shown, other=0.0).to(tl.float32)
    x2 = tl.load(source + half + pair, mask=shown, other=0.0).to(tl.float32)
    if rest > 0:
        beyond = 2 * half + tl.arange(0, block_rest)[None, :]
        kept = live[:, None] & (beyond < dim)
        x3 = tl.load(source + beyond, mask=kept, other=0.0).to(tl.float32)
    if normed:
        squares = tl.sum(x1 * x1, 1) + tl.sum(x2 * x2, 1)
        if rest > 0:
            squares += tl.sum(x3 * x3, 1)
        factor = tl.where(is_v, 1.0, tl.rsqrt(squares / dim + epsilon))[:, None]
        for_q, for_v = is_q[:, None], is_v[:, None]
        q1 = tl.load(q_norm + pair, mask=turned, other=0.0).to(tl.float32)
        k1 = tl.load(k_norm + pair, mask=turned, other=0.0).to(tl.float32)
        q2 = tl.load(q_norm + half + pair, mask=turned, other=0.0).to(tl.float32)
        k2 = tl.load(k_norm + half + pair, mask=turned, other=0.0).to(tl.float32)
        x1 *= factor * tl.where(for_v, 1.0, tl.where(for_q, q1, k1))
        x2 *= factor * tl.where(for_v, 1.0, tl.where(for_q, q2, k2))
        if rest > 0:
            q3 = tl.load(q_norm + beyond, mask=beyond < dim, other=0.0).to(tl.float32)
            k3 = tl.load(k_norm + beyond, mask=beyond < dim, other=0.0).to(tl.float32)
            x3 *= factor * tl.where(for_v, 1.0, tl.where(for_q, q3, k3))

    turn = angles + token.to(tl.int64)[:, None] * (4 * half) + pair
    cos = tl.load(turn, mask=shown, other=0.0)
    sin = tl.load(turn + half, mask=shown, other=0.0)
    y1, y2 = x1 * cos - x2 * sin, x2 * cos + x1 * sin
    as_q = live & is_q
    kind = q_out.dtype.element_ty
    to_q = q_out + (token.to(tl.int64) * heads + head)[:, None] * dim
    tl.store(to_q + pair, y1.to(kind), mask=as_q[:, None] & turned)
    tl.store(to_q + half + pair, y2.to(kind), mask=as_q[:, None] & turned)
    at_cache = as_q[:, None] & turned
    cos = tl.load(turn + 2 * half, mask=at_cache, other=0.0)
    sin = tl.load(turn + 3 * half, mask=at_cache, other=0.0)
    for_sinks = to_q + num_tokens.to(tl.int64) * heads * dim
    tl.store(for_sinks + pair, (x1 * cos - x2 * sin).to(kind), mask=at_cache)
    tl.store(for_sinks + half + pair, (x2 * cos + x1 * sin).to(kind), mask=at_cache)

    cached = live & (head >= heads) & (offset < count)
    kv_head = (head - heads) % kv_heads
    kind = cache.dtype.element_ty
    to_kv = slot * slot_stride + kv_head.to(tl.int64) * head_stride + place * place_stride
    to_kv = cache + (to_kv + tl.where(is_v, values_offset, 0))[:, None]
    written = cached[:, None] & turned
    tl.store(to_kv + pair, tl.where(is_v[:, None], x1, y1).to(kind), mask=written)
    tl.store(to_kv + half + pair, tl.where(is_v[:, None], x2, y2).to(kind), mask=written)
    if rest > 0:
        real = beyond < dim
        tl.store(to_q + beyond, x3.to(q_out.dtype.element_ty), mask=as_q[:, None] & real)
        tl.store(for_sinks + beyond, x3.to(q_out.dtype.element_ty), mask=as_q[:, None] & real)
        tl.store(to_kv + beyond, x3.to(kind), mask=cached[:, None] & real)


def rotation_angles(
    rows: Tensor,
    token_rows: Tensor,
    frequencies: Tensor,
    factor: float,
    out: Tensor,
    *,
    overlap: bool = False,
) -> None:
    """float32 [tokens, 4, rotary_dim / 2]: cosine and sine at token_index, then at the cache position.

    `rows` int64 [rows, 8], `token_rows` int64 [tokens], `frequencies` float64 [rotary_dim / 2].
    """
    tokens, _, half = out.shape
    block_t = 64 if interpreted(out.device) else 4
    _rotation_angles[(triton.cdiv(tokens, block_t),)](
        rows,
        token_rows,
        frequencies,
        out,
        tokens,
        factor,
        half=half,
        row_fields=ROW_FIELDS,
        block_t=block_t,
        block_half=power_of_two(half),
        overlap=overlap,
        num_warps=4,
        **launch_options(overlap),
    )


def rotate_and_cache(
    qkv: Tensor,
    angles: Tensor,
    norms: HeadNorms | None,
    cache: Tensor,
    rows: Tensor,
    token_rows: Tensor,
    q_out: Tensor,
    *,
    overlap: bool = False,
) -> None:
    """Norm, rotate, write `q_out` [2, tokens, heads, head_dim] and the rows' keys and values.

    `qkv` [tokens, (heads + 2 kv_heads) * head_dim]; `cache` [kv_slots, 2, kv_heads, places, padded
    head_dim], one layer of the whole. Padding rows write nothing into the cache.
    """
    _, tokens, heads, dim = q_out.shape
    kv_heads, half = cache.shape[2], angles.shape[2]
    units = tokens * (heads + 2 * kv_heads)
    block = 256 if interpreted(qkv.device) else 8
    _rotate_and_cache[(triton.cdiv(units, block),)](
        qkv,
        angles,
        norms.q if norms else None,
        norms.k if norms else None,
        q_out,
        cache,
        rows,
        token_rows,
        tokens,
        cache.stride(0),
        cache.stride(1),
        cache.stride(2),
        norms.epsilon if norms else 0.0,
        heads=heads,
        kv_heads=kv_heads,
        dim=dim,
        half=half,
        place_stride=cache.stride(3),
        row_fields=ROW_FIELDS,
        normed=norms is not None,
        block=block,
        block_half=power_of_two(half),
        block_rest=power_of_two(max(1, dim - 2 * half)),
        overlap=overlap,
        num_warps=4,
        **launch_options(overlap),
    )
