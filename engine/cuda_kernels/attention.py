"""Attention over sinks and window, reading the kv_slots where they lie.

All rows of a step in one launch: decode rows and prefill chunks, each with its own S, R and ring. A program
has a tile of queries of one row and all the query heads that share a KV head, and walks over the keys it
sees: first the sinks, which meet the query rotated at its cache position, then the window in order of
token_index, which meets the query rotated at its token_index (design.md, section 2: "move the sinks").

    row:  keys  0 .. S-1 | lo ............. newest       lo = oldest that the tile's first query sees
          place    j     | S + (j - S) mod ring

Few long rows are split along the keys (Flash-Decoding, Dao et al. 2023); the program that finishes last
puts the parts together, so that no further launch is needed. Scores need no scale: q has it. Sums are
float32.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from engine.cuda_kernels.common import (
    WORD,
    dot,
    launch_options,
    power_of_two,
)
from engine.cuda_step import ROW_FIELDS

_LOG2_E = tl.constexpr(1.4426950408889634)
_FAR = tl.constexpr(1 << 30)


@dataclass(frozen=True, slots=True)
class Tiling:
    """How a step is cut up: `queries` of a row and `keys` at a time, each row's keys in `splits` parts."""

    block_m: int
    keys: int
    splits: int
    num_warps: int
    num_stages: int

    def queries(self, group: int) -> int:
        """Tokens of a tile when `group` query heads share a KV head."""
        return self.block_m // group


@dataclass(frozen=True, slots=True)
class SplitSpace:
    """Memory for the parts of split rows.

    `sums` float32 [parts, block_m, head_dim], `stats` float32 [parts, 2, block_m], `arrived` int32, zero
    between launches, [tiles * kv_heads].
    """

    sums: Tensor
    stats: Tensor
    arrived: Tensor


@triton.jit
def _update(q, keys, values, seen, loaded, acc, top, mass, even: tl.constexpr, d):
    """Online softmax over one block of keys (FlashAttention-2, arXiv 2307.08691, algorithm 1)."""
    if even:
        k = tl.load(keys, mask=loaded[:, None], other=0.0)
    else:
        k = tl.load(keys, mask=loaded[:, None] & d, other=0.0)
    scores = dot(q, tl.trans(k), tl.zeros(seen.shape, tl.float32)) * _LOG2_E
    scores = tl.where(seen, scores, -float("inf"))
    higher = tl.maximum(top, tl.max(scores, 1))
    # A query that has seen nothing yet: minus infinity less itself would be no number.
    base = tl.where(higher == -float("inf"), 0.0, higher)
    weights = tl.exp2(scores - base[:, None])
    fade = tl.exp2(top - base)
    if even:
        v = tl.load(values, mask=loaded[:, None], other=0.0)
    else:
        v = tl.load(values, mask=loaded[:, None] & d, other=0.0)
    acc = dot(weights.to(v.dtype), v, acc * fade[:, None])
    return acc, higher, mass * fade + tl.sum(weights, 1)


@triton.jit(do_not_specialize=["num_tokens"])
def _sink_attention(
    q,
    cache,
    out,
    rows,
    tiles,
    sums,
    stats,
    arrived,
    num_tokens,
    slot_stride,
    values_offset,
    head_stride,
    kv_heads: tl.constexpr,
    group: tl.constexpr,
    dim: tl.constexpr,
    place_stride: tl.constexpr,
    row_fields: tl.constexpr,
    block_m: tl.constexpr,
    block_n: tl.constexpr,
    block_d: tl.constexpr,
    splits: tl.constexpr,
    overlap: tl.constexpr,
):
    tile, head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    if overlap:
        gdc_launch_dependents()
    row = tl.load(tiles + 2 * tile)
    offset = tl.load(tiles + 2 * tile + 1).to(tl.int32)
    fields = rows + row * row_fields
    slot, count = tl.load(fields), tl.load(fields + 1).to(tl.int32)
    start, sinks, window = tl.load(fields + 2), tl.load(fields + 3), tl.load(fields + 4)
    ring, window_start = tl.load(fields + 5), tl.load(fields + 6)
    first_token = tl.load(fields + 7)
    if offset >= count:
        # Padding waits too: only then does the end of this kernel mean the end of all before it.
        if overlap:
            gdc_wait()
        return

    queries: tl.constexpr = block_m // group
    even: tl.constexpr = block_d == dim
    m, n, d = tl.arange(0, block_m), tl.arange(0, block_n), tl.arange(0, block_d)[None, :]
    inside = d < dim
    step = offset + m // group
    live = (m < queries * group) & (step < count)
    heads = kv_heads * group
    place_q = (first_token + step) * heads + head * group + m % group
    place_q = place_q[:, None] * dim + d
    held = live[:, None] & inside

    # Token indices reach 2**40; differences inside a window are small.
    oldest = tl.maximum(start + offset - window + 1, tl.maximum(sinks, window_start))
    newest = start + tl.minimum(offset + queries, count) - 1
    num_sinks = tl.minimum(sinks, newest + 1).to(tl.int32)
    num_window = tl.maximum(newest - oldest + 1, 0).to(tl.int32)
    at_sinks = tl.minimum(start + step, _FAR).to(tl.int32)
    at_window = (start + step - oldest).to(tl.int32)
    reach = window.to(tl.int32)
    around = ring.to(tl.int32)
    begin = ((oldest - sinks) % ring).to(tl.int32)

    sink_blocks = tl.cdiv(num_sinks, block_n)
    blocks = sink_blocks + tl.cdiv(num_window, block_n)
    share = tl.cdiv(blocks, splits)
    low = split * share
    high = tl.minimum(low + share, blocks)

    keys = cache + slot * slot_stride + head.to(tl.int64) * head_stride + d
    values = keys + values_offset
    acc = tl.zeros((block_m, block_d), tl.float32)
    top = tl.full((block_m,), -float("inf"), tl.float32)
    mass = tl.zeros((block_m,), tl.float32)
    if overlap:
        gdc_wait()

    rotated = tl.load(q + num_tokens.to(tl.int64) * heads * dim + place_q, mask=held, other=0.0)
    for block in range(low, tl.minimum(high, sink_blocks)):
        j = block * block_n + n
        place = j[:, None] * place_stride
        seen = (j[None, :] <= at_sinks[:, None]) & (j < num_sinks)[None, :]
        acc, top, mass = _update(
            rotated, keys + place, values + place, seen, j < num_sinks, acc, top, mass, even, inside
        )
    rotated = tl.load(q + place_q, mask=held, other=0.0)
    for block in range(tl.maximum(low, sink_blocks), high):
        j = (block - sink_blocks) * block_n + n
        place = begin + j
        place = tl.where(place >= around, place - around, place) + sinks.to(tl.int32)
        place = place[:, None] * place_stride
        seen = (j[None, :] <= at_window[:, None]) & (j[None, :] > at_window[:, None] - reach)
        acc, top, mass = _update(
            rotated,
            keys + place,
            values + place,
            seen,
            j < num_window,
            acc,
            top,
            mass,
            even,
            inside,
        )

    if splits == 1:
        result = acc / mass[:, None]
        tl.store(out + place_q, result.to(out.dtype.element_ty), mask=held)
    else:
        unit = tile * kv_heads + head
        part = unit * splits + split
        square = m[:, None] * dim + d
        tl.store(sums + part * block_m * dim + square, acc, mask=held)
        tl.store(stats + part * 2 * block_m + m, top, mask=live)
        tl.store(stats + part * 2 * block_m + block_m + m, mass, mask=live)
        # All of this program's stores come before its arrival; whoever arrives last sees all parts.
        tl.debug_barrier()
        before = tl.atomic_add(arrived + unit, 1, sem="acq_rel", scope="gpu")
        if before == splits - 1:
            part = unit * splits
            total = tl.zeros((block_m, block_d), tl.float32)
            top = tl.full((block_m,), -float("inf"), tl.float32)
            mass = tl.zeros((block_m,), tl.float32)
            for other in tl.static_range(splits):
                where = stats + (part + other) * 2 * block_m + m
                their_top = tl.load(where, mask=live, other=-float("inf"), cache_modifier=".cg")
                their_mass = tl.load(where + block_m, mask=live, other=0.0, cache_modifier=".cg")
                theirs = tl.load(
                    sums + (part + other) * block_m * dim + square,
                    mask=held,
                    other=0.0,
                    cache_modifier=".cg",
                )
                higher = tl.maximum(top, their_top)
                base = tl.where(higher == -float("inf"), 0.0, higher)
                mine, their = tl.exp2(top - base), tl.exp2(their_top - base)
                total = total * mine[:, None] + theirs * their[:, None]
                mass = mass * mine + their_mass * their
                top = higher
            result = total / mass[:, None]
            tl.store(out + place_q, result.to(out.dtype.element_ty), mask=held)
            tl.store(arrived + unit, 0)


def decode_tiling(longest: int, rows: int, group: int, num_processors: int) -> Tiling:
    """For rows of one token: tiles as small as tensor cores allow, splits that fill the processors twice.

    `longest` is the most keys a row can have, `rows` counts each KV head: both are known before the step,
    so that a captured launch serves rows of any length.
    """
    keys = 64
    wanted = min(triton.cdiv(2 * num_processors, rows), longest // keys)
    splits = 1
    while 2 * splits <= min(wanted, 32):
        splits *= 2
    return Tiling(max(WORD, power_of_two(group)), keys, splits, num_warps=4, num_stages=3)


def prefill_tiling(group: int, head_dim: int, split: bool) -> Tiling:
    """For chunks: as many queries as keep the sums in registers. `split` if there are few of them; into one
    number of parts only, as each would have to be compiled."""
    narrow = split or head_dim > 128
    block_m = max(64 if narrow else 128, power_of_two(group))
    return Tiling(block_m, 64, 8 if split else 1, num_warps=4 if narrow else 8, num_stages=2)


def interpreter_tiling(group: int) -> Tiling:
    """Few programs: what costs time in the interpreter is their number."""
    return Tiling(max(64, power_of_two(group)), 64, 1, num_warps=4, num_stages=1)


def split_space(
    tiling: Tiling, num_tiles: int, kv_heads: int, dim: int, like: Tensor
) -> SplitSpace:
    """Memory for one launch; `arrived` is given by the caller's zeroed `like` int32 tensor."""
    parts = num_tiles * kv_heads * tiling.splits if tiling.splits > 1 else 0
    options = {"dtype": torch.float32, "device": like.device}
    sums = torch.empty((parts, tiling.block_m, dim), **options)
    return SplitSpace(sums, torch.empty((parts, 2, tiling.block_m), **options), like)


def sink_attention(
    q: Tensor,
    cache: Tensor,
    out: Tensor,
    rows: Tensor,
    tiles: Tensor,
    tiling: Tiling,
    space: SplitSpace,
    *,
    overlap: bool = False,
) -> None:
    """Attend.

    `q` [2, tokens, heads, head_dim], rotated at token_index, then at the cache position; `cache`
    [kv_slots, 2, kv_heads, places, padded head_dim], one layer's keys (rotated at token_index) and values, a
    view of the whole; `rows` int64 [rows, 8]; `tiles` int64 [n, 2]: row, and the first of its tokens in
    the tile; `out` [tokens, heads, head_dim].
    """
    _, tokens, heads, dim = q.shape
    kv_heads = cache.shape[2]
    block_d = power_of_two(max(dim, WORD))
    grid = (len(tiles), kv_heads, tiling.splits)
    _sink_attention[grid](
        q,
        cache,
        out,
        rows,
        tiles,
        space.sums,
        space.stats,
        space.arrived,
        tokens,
        cache.stride(0),
        cache.stride(1),
        cache.stride(2),
        kv_heads=kv_heads,
        group=heads // kv_heads,
        dim=dim,
        place_stride=cache.stride(3),
        row_fields=ROW_FIELDS,
        block_m=tiling.block_m,
        block_n=tiling.keys,
        block_d=block_d,
        splits=tiling.splits,
        overlap=overlap,
        num_warps=tiling.num_warps,
        num_stages=tiling.num_stages,
        **launch_options(overlap),
    )
