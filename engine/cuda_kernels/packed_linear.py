"""Linear layers of 4-bit weights (engine_build/int4.py, "words"): half a byte is read for each weight.

The same layers as linear.py, in the same two ways, activations being 16-bit. `unpack` is for more tokens than
that: rows of a matrix as 16-bit numbers, for the vendor's library.

`parts`: groups in a block of 128 inputs; `per_group`: levels of a word in each. `even`: no block of inputs
ends beyond the last input, so that none is looked out for.

Unpacking has to be cheap: at the speed of memory a multiprocessor has about three instructions for a weight,
and converting an integer costs more. So levels become floats by being put into a mantissa. `vector_packed`
leaves it at that: 4 bits at the top of the mantissa of 1 are 1 + level / 16, and what the 1 adds to a sum
follows from the activations, once for all outputs. Sums of a group are scaled, not its weights.
"""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from engine.cuda_kernels.common import (
    EMULATED,
    WORD,
    dot,
    interpreted,
    power_of_two,
)
from engine.cuda_kernels.linear import (
    LINE_BYTES,
    PREFETCHED_LINES,
    Blocks,
    Norm,
    Weights,
    finish,
    launch_arguments,
    prefetch,
)
from engine_build.int4 import BLOCK, WORDS, ZERO_POINT

_BLOCK, _WORDS = tl.constexpr(BLOCK), tl.constexpr(WORDS)
_SLOTS = tl.constexpr(BLOCK // WORDS)
"""Levels in a word: one of each run of 16 inputs."""
_LINE = tl.constexpr(LINE_BYTES // 4)
_ZERO = tl.constexpr(float(ZERO_POINT))


@dataclass(frozen=True, slots=True)
class PackedWeights(Weights):
    """`matrix` int32 [outputs, words] of levels, `scale` 16-bit [outputs, groups], for `inputs` inputs."""

    inputs: int = 0

    @property
    def num_inputs(self) -> int:
        return self.inputs

    @property
    def num_words(self) -> int:
        """Of an output."""
        return int(self.matrix.shape[1])

    @property
    def parts(self) -> int:
        """Groups in a block of 128 inputs."""
        return 0 if self.scale is None else int(self.scale.shape[1]) * WORDS // self.num_words


@triton.jit
def _into(words, mask: tl.constexpr, exponent: tl.constexpr):
    """(words & mask) | exponent as float32: one instruction, for which compilers take two."""
    if EMULATED:
        bits = (words & mask) | exponent
    else:
        bits = tl.inline_asm_elementwise(
            f"lop3.b32 $0, $1, {mask}, {exponent}, 0xEA;",
            "=r,r",
            [words],
            dtype=tl.int32,
            is_pure=True,
            pack=1,
        )
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _level(words, slot: tl.constexpr):
    """Level number `slot` of each word, float32.

    Four bits at place p of the mantissa of 2**(23 - p) count ones. Slots above 4 share a shift.
    """
    place: tl.constexpr = 4 * (slot % 5) + (4 if slot > 4 else 0)
    moved = words >> 16 if slot > 4 else words
    kept = _into(moved, 15 << place, (150 - place) << 23)
    return kept - (2.0 ** (23 - place) + _ZERO)


@triton.jit
def _fraction(words, slot: tl.constexpr):
    """1 + kept / 16 of an even slot, 1 + kept / 256 of an odd one, float32; kept is the level plus 8.

    Slots 1 and 2, 3 and 4, 5 and 6 lie side by side after one shift.
    """
    left: tl.constexpr = (15 if slot % 2 else 19) - 4 * slot
    moved = words << left if left >= 0 else words >> -left
    return _into(moved, 0x78000 if slot % 2 else 0x780000, 0x3F800000)


@triton.jit
def _wait(row, row2, num_words, gated: tl.constexpr, lines: tl.constexpr):
    """For the kernel before; weights do not depend on it, and are fetched meanwhile."""
    gdc_launch_dependents()
    prefetch(row, num_words, lines, _LINE)
    if gated:
        prefetch(row2, num_words, lines, _LINE)
    gdc_wait()


@triton.jit
def _scaled(total, added, scales, inside):
    """Sums of a group without what was added to its levels, times its scales."""
    return (total - added[None, :]) * tl.load(scales, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _write(
    total,
    up,
    bias,
    out,
    places,
    columns,
    num_outputs,
    real,
    shown,
    gated: tl.constexpr,
    biased: tl.constexpr,
    accumulate: tl.constexpr,
):
    """Bias, gate, sum, store; `columns` are the outputs, `real` which of them there are."""
    total = finish(total, None, bias, columns, real, False, biased)
    if gated:
        up = finish(up, None, bias, num_outputs + columns, real, False, biased)
        total = total / (1.0 + tl.exp(-total)) * up
    if accumulate:
        total += tl.load(out + places, mask=shown, other=0.0).to(tl.float32)
    tl.store(out + places, total.to(out.dtype.element_ty), mask=shown)


@triton.jit
def _vector_packed(
    x,
    weight,
    scale,
    bias,
    norm,
    out,
    num_outputs,
    num_inputs,
    num_words,
    epsilon,
    normed: tl.constexpr,
    gated: tl.constexpr,
    biased: tl.constexpr,
    accumulate: tl.constexpr,
    parts: tl.constexpr,
    per_group: tl.constexpr,
    even: tl.constexpr,
    block_n: tl.constexpr,
    block_w: tl.constexpr,
    lines: tl.constexpr,
    overlap: tl.constexpr,
):
    n = tl.program_id(0) * block_n + tl.arange(0, block_n)
    wanted = n < num_outputs
    t = tl.arange(0, block_w)
    known_n = tl.minimum(n, num_outputs - 1).to(tl.int64)
    row, row2 = weight + known_n * num_words, weight + (known_n + num_outputs) * num_words
    first, second = row[:, None] + t[None, :], row2[:, None] + t[None, :]
    num_scales = num_words // _WORDS * parts
    scales = scale + (known_n * num_scales)[:, None] + (t // _WORDS * parts)[None, :]
    ahead = wanted[:, None] & (t < num_words)[None, :]
    w = tl.load(first, mask=ahead, other=0, eviction_policy="evict_first")
    w2 = w
    if gated:
        w2 = tl.load(second, mask=ahead, other=0, eviction_policy="evict_first")
    squares = tl.zeros((block_w,), tl.float32)
    acc = tl.zeros((block_n, block_w), tl.float32)
    acc2 = tl.zeros((block_n, block_w), tl.float32)
    if overlap:
        _wait(row, row2, num_words, gated, lines)
    for start in range(0, num_words, block_w):
        inside = wanted[:, None] & ((start + t < num_words) | even)[None, :]
        # The next words are on their way while these are multiplied.
        ahead = wanted[:, None] & (start + block_w + t < num_words)[None, :]
        offset = start + block_w
        following = tl.load(first + offset, mask=ahead, other=0, eviction_policy="evict_first")
        following2 = following
        if gated:
            following2 = tl.load(
                second + offset, mask=ahead, other=0, eviction_policy="evict_first"
            )
        base = (start + t) // _WORDS * _BLOCK + t % _WORDS
        for slot in tl.static_range(_SLOTS):
            if slot % per_group == 0:
                total = tl.zeros((block_n, block_w), tl.float32)
                total2 = tl.zeros((block_n, block_w), tl.float32)
                added = tl.zeros((block_w,), tl.float32)
            at = base + slot * _WORDS
            left = (at < num_inputs) | even
            value = tl.load(x + at, mask=left, other=0.0).to(tl.float32)
            if normed:
                squares += value * value
                value *= tl.load(norm + at, mask=left, other=0.0).to(tl.float32)
            value *= 16.0 if slot % 2 else 1.0
            added += value * (1.03125 if slot % 2 else 1.5)
            total += _fraction(w, slot) * value[None, :]
            if gated:
                total2 += _fraction(w2, slot) * value[None, :]
            if slot % per_group == per_group - 1:
                here = scales + (start // _WORDS * parts + slot // per_group)
                acc += _scaled(total, added, here, inside)
                if gated:
                    there = here + num_outputs.to(tl.int64) * num_scales
                    acc2 += _scaled(total2, added, there, inside)
        w = following
        w2 = following2
    whole = 16.0
    if normed:
        whole *= tl.rsqrt(tl.sum(squares, 0) / num_inputs + epsilon)
    total, up = tl.sum(acc, 1) * whole, tl.sum(acc2, 1) * whole
    _write(total, up, bias, out, n, n, num_outputs, wanted, wanted, gated, biased, accumulate)


@triton.jit(do_not_specialize=["num_tokens"])
def _tile_packed(
    x,
    weight,
    scale,
    bias,
    norm,
    out,
    num_tokens,
    num_outputs,
    num_inputs,
    num_words,
    epsilon,
    normed: tl.constexpr,
    gated: tl.constexpr,
    biased: tl.constexpr,
    accumulate: tl.constexpr,
    parts: tl.constexpr,
    per_group: tl.constexpr,
    even: tl.constexpr,
    block_m: tl.constexpr,
    block_n: tl.constexpr,
    lines: tl.constexpr,
    overlap: tl.constexpr,
):
    n = tl.program_id(0) * block_n + tl.arange(0, block_n)
    m = tl.program_id(1) * block_m + tl.arange(0, block_m)
    t = tl.arange(0, _WORDS)
    wanted, live = n < num_outputs, m < num_tokens
    known_n = tl.minimum(n, num_outputs - 1).to(tl.int64)
    row, row2 = weight + known_n * num_words, weight + (known_n + num_outputs) * num_words
    num_scales = num_words // _WORDS * parts
    scales = scale + known_n * num_scales
    scales2 = scales + num_outputs.to(tl.int64) * num_scales
    rows = x + m[:, None] * num_inputs + t[None, :]
    squares = tl.zeros((block_m, _WORDS), tl.float32)
    acc = tl.zeros((block_n, block_m), tl.float32)
    acc2 = tl.zeros((block_n, block_m), tl.float32)
    if overlap:
        _wait(row, row2, num_words, gated, lines)
    for block in range(num_words // _WORDS):
        words = block * _WORDS + t[None, :]
        w = tl.load(row[:, None] + words, eviction_policy="evict_first")
        w2 = w
        if gated:
            w2 = tl.load(row2[:, None] + words, eviction_policy="evict_first")
        for slot in tl.static_range(_SLOTS):
            if slot % per_group == 0:
                total = tl.zeros((block_n, block_m), tl.float32)
                total2 = tl.zeros((block_n, block_m), tl.float32)
            at = block * _BLOCK + slot * _WORDS
            left = (at + t < num_inputs) | even
            value = tl.load(rows + at, mask=live[:, None] & left[None, :], other=0.0)
            kind = value.dtype
            if normed:
                wide = value.to(tl.float32)
                squares += wide * wide
                factors = tl.load(norm + at + t, mask=left, other=0.0).to(tl.float32)
                value = (wide * factors[None, :]).to(kind)
            total = dot(_level(w, slot).to(kind), tl.trans(value), total)
            if gated:
                total2 = dot(_level(w2, slot).to(kind), tl.trans(value), total2)
            if slot % per_group == per_group - 1:
                group = block * parts + slot // per_group
                acc += total * tl.load(scales + group).to(tl.float32)[:, None]
                if gated:
                    acc2 += total2 * tl.load(scales2 + group).to(tl.float32)[:, None]
    total, up = tl.trans(acc), tl.trans(acc2)
    if normed:
        factor = tl.rsqrt(tl.sum(squares, 1) / num_inputs + epsilon)[:, None]
        total, up = total * factor, up * factor
    columns, real = n[None, :], wanted[None, :]
    places = m.to(tl.int64)[:, None] * num_outputs + columns
    shown = live[:, None] & real
    _write(
        total, up, bias, out, places, columns, num_outputs, real, shown, gated, biased, accumulate
    )


@triton.jit(do_not_specialize=["num_rows"])
def _unpack(
    weight,
    scale,
    out,
    num_rows,
    num_inputs,
    num_words,
    parts: tl.constexpr,
    block: tl.constexpr,
    block_w: tl.constexpr,
):
    n = tl.program_id(0) * block + tl.arange(0, block)
    t = tl.program_id(1) * block_w + tl.arange(0, block_w)
    inside = (n < num_rows)[:, None] & (t < num_words)[None, :]
    row = n.to(tl.int64)[:, None]
    w = tl.load(weight + row * num_words + t[None, :], mask=inside, other=0)
    scales = scale + row * (num_words // _WORDS * parts) + (t // _WORDS * parts)[None, :]
    base = t // _WORDS * _BLOCK + t % _WORDS
    for slot in tl.static_range(_SLOTS):
        factor = tl.load(scales + slot * parts // _SLOTS, mask=inside, other=0.0).to(tl.float32)
        at = base + slot * _WORDS
        value = (_level(w, slot) * factor).to(out.dtype.element_ty)
        tl.store(
            out + row * num_inputs + at[None, :], value, mask=inside & (at < num_inputs)[None, :]
        )


def _lines(weights: PackedWeights, outputs: int) -> int:
    """Cache lines of each row to prefetch: all of it, if that is a few for each thread."""
    whole = power_of_two(triton.cdiv(weights.num_words, LINE_BYTES // 4))
    return min(whole, max(1, PREFETCHED_LINES // power_of_two(outputs)))


def vector_packed(
    x: Tensor,
    weights: PackedWeights,
    out: Tensor,
    blocks: Blocks,
    norm: Norm | None = None,
    *,
    accumulate: bool = False,
    overlap: bool = False,
) -> None:
    """x [1, inputs] into out [1, outputs], both contiguous."""
    block_w = max(WORDS, blocks.inputs * WORDS // BLOCK)
    _vector_packed[(triton.cdiv(weights.num_outputs, blocks.outputs),)](
        **launch_arguments(x, weights, out, norm, accumulate=accumulate, overlap=overlap),
        num_words=weights.num_words,
        parts=weights.parts,
        per_group=BLOCK // WORDS // weights.parts,
        even=weights.num_inputs % (block_w * BLOCK // WORDS) == 0,
        block_n=blocks.outputs,
        block_w=block_w,
        lines=_lines(weights, blocks.outputs),
        num_warps=blocks.num_warps,
        num_stages=1,
    )


def tile_packed(
    x: Tensor,
    weights: PackedWeights,
    out: Tensor,
    blocks: Blocks,
    norm: Norm | None = None,
    *,
    accumulate: bool = False,
    overlap: bool = False,
) -> None:
    """x [tokens, inputs] into out [tokens, outputs], both contiguous; always 128 inputs at a time."""
    tokens = len(x)
    block_m = min(max(power_of_two(tokens), WORD), 64)
    grid = (triton.cdiv(weights.num_outputs, blocks.outputs), triton.cdiv(tokens, block_m))
    _tile_packed[grid](
        **launch_arguments(x, weights, out, norm, accumulate=accumulate, overlap=overlap),
        num_tokens=tokens,
        num_words=weights.num_words,
        parts=weights.parts,
        per_group=BLOCK // WORDS // weights.parts,
        even=weights.num_inputs % BLOCK == 0,
        block_m=block_m,
        block_n=blocks.outputs,
        lines=_lines(weights, blocks.outputs),
        num_warps=blocks.num_warps,
        num_stages=blocks.num_stages,
    )


def unpack(weights: PackedWeights, rows: slice, out: Tensor) -> None:
    """These rows of the matrix as numbers: `out` [rows, inputs], 16-bit, contiguous."""
    matrix, scale = weights.matrix[rows], weights.scale
    block, block_w = (64, 256) if interpreted(out.device) else (4, 128)
    block_w = min(block_w, power_of_two(weights.num_words))
    grid = (triton.cdiv(len(matrix), block), triton.cdiv(weights.num_words, block_w))
    _unpack[grid](
        matrix,
        None if scale is None else scale[rows],
        out,
        len(matrix),
        weights.num_inputs,
        weights.num_words,
        parts=weights.parts,
        block=block,
        block_w=block_w,
        num_warps=4,
    )
