"""What all kernels share: how they are launched, and how they wait for the one before.

`overlap` is programmatic dependent launch (Hopper): a kernel is started while the one before drains,
and waits with `griddepcontrol` before it touches anything that was written on the device. Kernels
launched without it wait for all before them, as ever.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

WORD = 16
"""Tiles of `tl.dot` are at least this wide."""

EMULATED = tl.constexpr(triton.knobs.runtime.interpret)
"""Whether kernels run in the interpreter, which knows no assembler."""


@triton.jit
def dot(a, b, acc):
    """acc + a @ b. The interpreter takes the bits of bfloat16 for integers, so it gets float32."""
    if EMULATED:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def widened(levels, kind: tl.constexpr):
    """float8_e4m3fn as `kind`, exactly. Triton's own way to bfloat16 is one F2F an element, which runs at a
    fraction of the rate of arithmetic; by way of float32 pairs are packed at once."""
    if EMULATED or levels.dtype != tl.float8e4nv:
        return levels.to(kind)
    if kind == tl.float32:
        return tl.inline_asm_elementwise(
            """{
            .reg .b16 low, high, a, b, c, d;
            .reg .b32 first, second;
            mov.b32 {low, high}, $4;
            cvt.rn.f16x2.e4m3x2 first, low;
            cvt.rn.f16x2.e4m3x2 second, high;
            mov.b32 {a, b}, first;
            mov.b32 {c, d}, second;
            cvt.f32.f16 $0, a;
            cvt.f32.f16 $1, b;
            cvt.f32.f16 $2, c;
            cvt.f32.f16 $3, d;
            }""",
            "=f,=f,=f,=f,r",
            [levels],
            dtype=tl.float32,
            is_pure=True,
            pack=4,
        )
    if kind == tl.bfloat16:
        return tl.inline_asm_elementwise(
            """{
            .reg .b16 low, high, a, b, c, d;
            .reg .b32 first, second;
            .reg .f32 p, q, r, s;
            mov.b32 {low, high}, $2;
            cvt.rn.f16x2.e4m3x2 first, low;
            cvt.rn.f16x2.e4m3x2 second, high;
            mov.b32 {a, b}, first;
            mov.b32 {c, d}, second;
            cvt.f32.f16 p, a;
            cvt.f32.f16 q, b;
            cvt.f32.f16 r, c;
            cvt.f32.f16 s, d;
            cvt.rn.bf16x2.f32 $0, q, p;
            cvt.rn.bf16x2.f32 $1, s, r;
            }""",
            "=r,=r,r",
            [levels],
            dtype=tl.bfloat16,
            is_pure=True,
            pack=4,
        )
    return levels.to(kind)


def launch_options(overlap: bool) -> dict[str, Any]:
    """Keyword arguments of a launch; the interpreter knows nothing of `launch_pdl`."""
    return {"launch_pdl": True} if overlap else {}


def interpreted(device: torch.device) -> bool:
    """Whether kernels run as Python over CPU tensors, where few large programs are fastest."""
    return bool(device.type == "cpu")


def power_of_two(count: int) -> int:
    """The smallest power of two that is no less."""
    return int(triton.next_power_of_2(count))
