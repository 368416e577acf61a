"""Kernels over rows of activations, for steps too large to fold them into the linear layers."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from engine.cuda_kernels.common import interpreted, launch_options, power_of_two

_LARGEST_FLOAT8 = tl.constexpr(448.0)


@triton.jit(do_not_specialize=["num_rows"])
def _rms_norm(
    x,
    delta,
    weight,
    out,
    num_rows,
    width,
    epsilon,
    added: tl.constexpr,
    block: tl.constexpr,
    block_width: tl.constexpr,
    overlap: tl.constexpr,
):
    if overlap:
        gdc_launch_dependents()
        gdc_wait()
    row = tl.program_id(0) * block + tl.arange(0, block)
    column = tl.arange(0, block_width)
    real = (column < width)[None, :]
    place = row.to(tl.int64)[:, None] * width + column[None, :]
    shown = (row < num_rows)[:, None] & real
    value = tl.load(x + place, mask=shown, other=0.0).to(tl.float32)
    if added:
        value += tl.load(delta + place, mask=shown, other=0.0).to(tl.float32)
        total = value.to(x.dtype.element_ty)
        tl.store(x + place, total, mask=shown)
        value = total.to(tl.float32)
    factor = tl.rsqrt(tl.sum(value * value, 1) / width + epsilon)[:, None]
    scale = tl.load(weight + column, mask=column < width, other=0.0).to(tl.float32)[None, :]
    tl.store(out + place, (value * factor * scale).to(out.dtype.element_ty), mask=shown)


@triton.jit(do_not_specialize=["num_rows"])
def _swiglu(gate_up, out, num_rows, width, block: tl.constexpr, block_width: tl.constexpr):
    row = tl.program_id(0) * block + tl.arange(0, block)
    column = tl.program_id(1) * block_width + tl.arange(0, block_width)
    shown = (row < num_rows)[:, None] & (column < width)[None, :]
    source = gate_up + row.to(tl.int64)[:, None] * (2 * width) + column[None, :]
    gate = tl.load(source, mask=shown, other=0.0).to(tl.float32)
    up = tl.load(source + width, mask=shown, other=0.0).to(tl.float32)
    place = out + row.to(tl.int64)[:, None] * width + column[None, :]
    value = gate / (1.0 + tl.exp(-gate)) * up
    tl.store(place, value.to(out.dtype.element_ty), mask=shown)


@triton.jit(do_not_specialize=["num_rows"])
def _to_float8(x, out, scales, num_rows, width, block: tl.constexpr, block_width: tl.constexpr):
    row = tl.program_id(0) * block + tl.arange(0, block)
    column = tl.arange(0, block_width)
    shown = (row < num_rows)[:, None] & (column < width)[None, :]
    place = row.to(tl.int64)[:, None] * width + column[None, :]
    value = tl.load(x + place, mask=shown, other=0.0).to(tl.float32)
    scale = tl.maximum(tl.max(tl.abs(value), 1), 1e-12) / _LARGEST_FLOAT8
    scaled = tl.minimum(tl.maximum(value / scale[:, None], -_LARGEST_FLOAT8), _LARGEST_FLOAT8)
    tl.store(out + place, scaled.to(out.dtype.element_ty), mask=shown)
    tl.store(scales + row, scale, mask=row < num_rows)


def _block_of(rows: int, x: Tensor) -> int:
    return min(power_of_two(rows), 64) if interpreted(x.device) else 1


def _warps(width: int) -> int:
    return min(16, max(1, power_of_two(width) // 512))


def rms_norm(
    x: Tensor,
    weight: Tensor,
    epsilon: float,
    out: Tensor,
    delta: Tensor | None = None,
    *,
    overlap: bool = False,
) -> None:
    """RMS norm of x [rows, width] into `out`; with `delta`, x becomes x + delta first."""
    rows, width = x.shape
    block = _block_of(rows, x)
    _rms_norm[(triton.cdiv(rows, block),)](
        x,
        delta,
        weight,
        out,
        rows,
        width,
        epsilon,
        added=delta is not None,
        block=block,
        block_width=power_of_two(width),
        overlap=overlap,
        num_warps=_warps(width),
        **launch_options(overlap),
    )


def swiglu(gate_up: Tensor, out: Tensor) -> None:
    """silu(gate) * up of [rows, 2 * width], gate first, into [rows, width]."""
    rows, width = out.shape
    block = _block_of(rows, out)
    block_width = min(power_of_two(width), 2048)
    _swiglu[(triton.cdiv(rows, block), triton.cdiv(width, block_width))](
        gate_up,
        out,
        rows,
        width,
        block=block,
        block_width=block_width,
        num_warps=_warps(block_width),
    )


def to_float8(x: Tensor, out: Tensor, scales: Tensor) -> None:
    """x [rows, width] as float8_e4m3fn times a float32 scale for each row."""
    rows, width = x.shape
    block = _block_of(rows, x)
    _to_float8[(triton.cdiv(rows, block),)](
        x,
        out,
        scales,
        rows,
        width,
        block=block,
        block_width=power_of_two(width),
        num_warps=_warps(width),
    )
