"""Symmetric block-wise 8-bit weights, as ONNX Runtime's MatMulNBits reads them.

Each run of `BLOCK` weights of an output row shares one float32 scale: weight = scale * (byte - 128).
The same rule as llama.cpp's Q8_0 with wider scales, so weights that were Q8_0 stay what they were.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

BLOCK = 32
ZERO_POINT = 128
_MAX = 127

Bytes = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]


def num_blocks(columns: int) -> int:
    """Blocks in a row of `columns` weights, the last one padded with zeros."""
    return -(-columns // BLOCK)


def quantise(weights: Floats) -> tuple[Bytes, Floats]:
    """float32 [n, k] as bytes uint8 [n, blocks, BLOCK] and scales float32 [n, blocks]."""
    rows, columns = weights.shape
    padding = num_blocks(columns) * BLOCK - columns
    blocks = np.pad(weights, ((0, 0), (0, padding))).reshape(rows, -1, BLOCK)
    scales = np.abs(blocks).max(axis=-1) / np.float32(_MAX)
    scales[scales == 0] = 1.0
    levels = np.rint(blocks / scales[..., None])
    return (levels + ZERO_POINT).astype(np.uint8), scales.astype(np.float32)


def dequantise(levels: Bytes, scales: Floats, columns: int) -> Floats:
    """Inverse of `quantise`, to within half a scale: float32 [n, columns]."""
    values = (levels.astype(np.float32) - ZERO_POINT) * scales[..., None]
    flat: Floats = values.reshape(len(levels), -1)[:, :columns]
    return flat
