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


def launch_options(overlap: bool) -> dict[str, Any]:
    """Keyword arguments of a launch; the interpreter knows nothing of `launch_pdl`."""
    return {"launch_pdl": True} if overlap else {}


def interpreted(device: torch.device) -> bool:
    """Whether kernels run as Python over CPU tensors, where few large programs are fastest."""
    return bool(device.type == "cpu")


def power_of_two(count: int) -> int:
    """The smallest power of two that is no less."""
    return int(triton.next_power_of_2(count))
