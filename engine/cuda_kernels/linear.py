"""Linear layers for few tokens: each weight is read once, at the speed of memory.

    out = x @ w.T                 w [outputs, inputs], optionally float8 with a scale for each output
    normed:      x is RMS-normed on the way: the sum of squares comes from the same pass over x
    gated:       w holds gate over up; out = silu(gate) * up
    accumulate:  out += ... (the residual stream)

`vector_linear` is for one token and multiplies on the CUDA cores; `tile_linear` is for a few dozen and
multiplies on the tensor cores, the weights as the left operand, so that 16 tokens fill a tile.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from engine.cuda_kernels.common import WORD, dot, launch_options, power_of_two, widened

LINE_BYTES = 128
PREFETCHED_LINES = 1024


@dataclass(frozen=True, slots=True)
class Blocks:
    """Shape of a program: outputs and inputs at a time, warps, stages of the load pipeline."""

    outputs: int
    inputs: int
    num_warps: int = 4
    num_stages: int = 3


@dataclass(frozen=True, slots=True)
class Weights:
    """A matrix [outputs, inputs] as stored, `scale` float32 [outputs] if it is float8, `bias` [outputs].

    `gated`: the outputs are gate then up, and the layer gives half as many.
    """

    matrix: Tensor
    scale: Tensor | None = None
    bias: Tensor | None = None
    gated: bool = False

    @property
    def num_outputs(self) -> int:
        rows = int(self.matrix.shape[0])
        return rows // 2 if self.gated else rows

    @property
    def num_inputs(self) -> int:
        return int(self.matrix.shape[1])


@dataclass(frozen=True, slots=True)
class Norm:
    """RMS norm of the layer's input: weight [inputs]."""

    weight: Tensor
    epsilon: float


@triton.jit
def finish(acc, scale, bias, n, wanted, scaled: tl.constexpr, biased: tl.constexpr):
    """Scale and bias of outputs n, after the norm."""
    if scaled:
        acc *= tl.load(scale + n, mask=wanted, other=0.0)
    if biased:
        acc += tl.load(bias + n, mask=wanted, other=0.0).to(tl.float32)
    return acc


@triton.jit
def prefetch(rows, width, lines: tl.constexpr, line: tl.constexpr):
    """Ask for the first `lines` cache lines of these rows, `line` elements each, to be brought to L2."""
    at = tl.minimum(tl.arange(0, lines) * line, width - 1)
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;",
        "=r,l",
        [(rows[:, None] + at[None, :]).to(tl.int64)],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def _vector_linear(
    x,
    weight,
    scale,
    bias,
    norm,
    out,
    num_outputs,
    num_inputs,
    epsilon,
    normed: tl.constexpr,
    gated: tl.constexpr,
    scaled: tl.constexpr,
    biased: tl.constexpr,
    accumulate: tl.constexpr,
    block_n: tl.constexpr,
    block_k: tl.constexpr,
    lines: tl.constexpr,
    line: tl.constexpr,
    stages: tl.constexpr,
    overlap: tl.constexpr,
):
    n = tl.program_id(0) * block_n + tl.arange(0, block_n)
    wanted = n < num_outputs
    k = tl.arange(0, block_k)
    # A vocabulary times a hidden size comes near 2**31 elements.
    row = weight + tl.minimum(n, num_outputs - 1).to(tl.int64) * num_inputs
    row2 = row + num_outputs.to(tl.int64) * num_inputs
    first, second = row[:, None] + k[None, :], row2[:, None] + k[None, :]
    squares = tl.zeros((block_k,), tl.float32)
    acc = tl.zeros((block_n, block_k), tl.float32)
    acc2 = tl.zeros((block_n, block_k), tl.float32)
    # Weights do not depend on the kernel before, so they are brought to L2 while it ends; activations do.
    if overlap:
        gdc_launch_dependents()
        prefetch(row, num_inputs, lines, line)
        if gated:
            prefetch(row2, num_inputs, lines, line)
        gdc_wait()
    for start in tl.range(0, num_inputs, block_k, num_stages=stages):
        left = start + k < num_inputs
        inside = wanted[:, None] & left[None, :]
        w = tl.load(first + start, mask=inside, other=0.0, eviction_policy="evict_first")
        value = tl.load(x + start + k, mask=left, other=0.0).to(tl.float32)
        if normed:
            squares += value * value
            value *= tl.load(norm + start + k, mask=left, other=0.0).to(tl.float32)
        acc += widened(w, tl.float32) * value[None, :]
        if gated:
            w2 = tl.load(second + start, mask=inside, other=0.0, eviction_policy="evict_first")
            acc2 += widened(w2, tl.float32) * value[None, :]
    factor = 1.0
    if normed:
        factor = tl.rsqrt(tl.sum(squares, 0) / num_inputs + epsilon)
    total = finish(tl.sum(acc, 1) * factor, scale, bias, n, wanted, scaled, biased)
    if gated:
        up = tl.sum(acc2, 1) * factor
        up = finish(up, scale, bias, num_outputs + n, wanted, scaled, biased)
        total = total / (1.0 + tl.exp(-total)) * up
    if accumulate:
        total += tl.load(out + n, mask=wanted, other=0.0).to(tl.float32)
    tl.store(out + n, total.to(out.dtype.element_ty), mask=wanted)


@triton.jit(do_not_specialize=["num_tokens"])
def _tile_linear(
    x,
    weight,
    scale,
    bias,
    norm,
    out,
    num_tokens,
    num_outputs,
    num_inputs,
    epsilon,
    normed: tl.constexpr,
    gated: tl.constexpr,
    scaled: tl.constexpr,
    biased: tl.constexpr,
    accumulate: tl.constexpr,
    block_m: tl.constexpr,
    block_n: tl.constexpr,
    block_k: tl.constexpr,
    lines: tl.constexpr,
    line: tl.constexpr,
    overlap: tl.constexpr,
):
    n = tl.program_id(0) * block_n + tl.arange(0, block_n)
    m = tl.program_id(1) * block_m + tl.arange(0, block_m)
    k = tl.arange(0, block_k)
    wanted, live = n < num_outputs, m < num_tokens
    row = weight + tl.minimum(n, num_outputs - 1).to(tl.int64) * num_inputs
    row2 = row + num_outputs.to(tl.int64) * num_inputs
    first, second = row[:, None] + k[None, :], row2[:, None] + k[None, :]
    rows = x + m[:, None] * num_inputs + k[None, :]
    squares = tl.zeros((block_m, block_k), tl.float32)
    acc = tl.zeros((block_n, block_m), tl.float32)
    acc2 = tl.zeros((block_n, block_m), tl.float32)
    if overlap:
        gdc_launch_dependents()
        prefetch(row, num_inputs, lines, line)
        if gated:
            prefetch(row2, num_inputs, lines, line)
        gdc_wait()
    for start in range(0, num_inputs, block_k):
        left = start + k < num_inputs
        value = tl.load(rows + start, mask=live[:, None] & left[None, :], other=0.0)
        kind = value.dtype
        if normed:
            wide = value.to(tl.float32)
            squares += wide * wide
            weights = tl.load(norm + start + k, mask=left, other=0.0).to(tl.float32)
            value = (wide * weights[None, :]).to(kind)
        inside = wanted[:, None] & left[None, :]
        w = tl.load(first + start, mask=inside, other=0.0, eviction_policy="evict_first")
        acc = dot(widened(w, kind), tl.trans(value), acc)
        if gated:
            w2 = tl.load(second + start, mask=inside, other=0.0, eviction_policy="evict_first")
            acc2 = dot(widened(w2, kind), tl.trans(value), acc2)
    total, up = tl.trans(acc), tl.trans(acc2)
    if normed:
        factor = tl.rsqrt(tl.sum(squares, 1) / num_inputs + epsilon)[:, None]
        total, up = total * factor, up * factor
    columns, real = n[None, :], wanted[None, :]
    total = finish(total, scale, bias, columns, real, scaled, biased)
    if gated:
        up = finish(up, scale, bias, num_outputs + columns, real, scaled, biased)
        total = total / (1.0 + tl.exp(-total)) * up
    places = out + m.to(tl.int64)[:, None] * num_outputs + columns
    shown = live[:, None] & real
    if accumulate:
        total += tl.load(places, mask=shown, other=0.0).to(tl.float32)
    tl.store(places, total.to(out.dtype.element_ty), mask=shown)


def _line(weights: Weights) -> int:
    """Elements of a cache line."""
    return LINE_BYTES // int(weights.matrix.element_size())


def _lines(weights: Weights, outputs: int) -> int:
    """Cache lines of each row to prefetch: all of it, if that is a few for each thread."""
    whole = power_of_two(triton.cdiv(weights.num_inputs, _line(weights)))
    return min(whole, max(1, PREFETCHED_LINES // power_of_two(outputs)))


def launch_arguments(
    x: Tensor,
    weights: Weights,
    out: Tensor,
    norm: Norm | None,
    *,
    accumulate: bool,
    overlap: bool,
) -> dict[str, Any]:
    """What the kernels of linear layers, of whole numbers and of packed ones, are told alike, by name."""
    return {
        "x": x,
        "weight": weights.matrix,
        "scale": weights.scale,
        "bias": weights.bias,
        "norm": norm.weight if norm else None,
        "out": out,
        "num_outputs": weights.num_outputs,
        "num_inputs": weights.num_inputs,
        "epsilon": norm.epsilon if norm else 0.0,
        "normed": norm is not None,
        "gated": weights.gated,
        "biased": weights.bias is not None,
        "accumulate": accumulate,
        "overlap": overlap,
        **launch_options(overlap),
    }


def vector_linear(
    x: Tensor,
    weights: Weights,
    out: Tensor,
    blocks: Blocks,
    norm: Norm | None = None,
    *,
    accumulate: bool = False,
    overlap: bool = False,
) -> None:
    """x [1, inputs] into out [1, outputs], both contiguous."""
    grid = (triton.cdiv(weights.num_outputs, blocks.outputs),)
    _vector_linear[grid](
        **launch_arguments(x, weights, out, norm, accumulate=accumulate, overlap=overlap),
        scaled=weights.scale is not None,
        block_n=blocks.outputs,
        block_k=blocks.inputs,
        lines=_lines(weights, blocks.outputs),
        line=_line(weights),
        stages=blocks.num_stages,
        num_warps=blocks.num_warps,
    )


def tile_linear(
    x: Tensor,
    weights: Weights,
    out: Tensor,
    blocks: Blocks,
    norm: Norm | None = None,
    *,
    accumulate: bool = False,
    overlap: bool = False,
) -> None:
    """x [tokens, inputs] into out [tokens, outputs], both contiguous. Tokens are one tile up to 256."""
    tokens = len(x)
    block_m = min(max(power_of_two(tokens), WORD), 256)
    grid = (triton.cdiv(weights.num_outputs, blocks.outputs), triton.cdiv(tokens, block_m))
    _tile_linear[grid](
        **launch_arguments(x, weights, out, norm, accumulate=accumulate, overlap=overlap),
        num_tokens=tokens,
        scaled=weights.scale is not None,
        block_m=block_m,
        block_n=blocks.outputs,
        block_k=blocks.inputs,
        lines=_lines(weights, blocks.outputs),
        line=_line(weights),
        num_warps=blocks.num_warps,
        num_stages=blocks.num_stages,
    )
