"""Symmetric block-wise 8-bit weights, in the order in which the CPU kernels read them.

Each block of 64 weights of an output row shares one float16 scale: weight = scale * (byte - 128). 32 rows
lie side by side, four bytes of each in turn, so that one load serves sixteen outputs. A token costs one
pass over all weights: 1.03 bytes each. `benchmarks.perplexity` holds them to within 1% of float32.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

BLOCK = 64
TILE = 32
ZERO_POINT = 128
_MAX = 127
_TOGETHER = 4

Bytes = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]
Halves = npt.NDArray[np.float16]
Shape = tuple[int, ...]


def stored_shapes(rows: int, columns: int) -> tuple[Shape, Shape]:
    """Shapes of `quantise`'s results for a matrix, rows and columns padded with zeros."""
    tiles, blocks = -(-rows // TILE), -(-columns // BLOCK)
    return (tiles, blocks * BLOCK // _TOGETHER, TILE, _TOGETHER), (tiles, blocks, TILE)


def quantise(weights: Floats) -> tuple[Bytes, Halves]:
    """float32 [n, k] as bytes uint8 [tiles, k / 4, 32, 4] and scales float16 [tiles, k / 64, 32]."""
    rows, columns = weights.shape
    levels_shape, scales_shape = stored_shapes(rows, columns)
    tiles, blocks, _ = scales_shape
    padding = ((0, tiles * TILE - rows), (0, blocks * BLOCK - columns))
    grouped = np.pad(weights, padding).reshape(tiles * TILE, blocks, BLOCK)
    scales = (np.abs(grouped).max(axis=-1) / np.float32(_MAX)).astype(np.float16)
    scales[scales == 0] = 1.0
    levels = np.rint(grouped / scales[..., None].astype(np.float32)).clip(-_MAX, _MAX) + ZERO_POINT
    by_row = levels.astype(np.uint8).reshape(tiles, TILE, -1, _TOGETHER)
    packed = np.ascontiguousarray(by_row.transpose(0, 2, 1, 3)).reshape(levels_shape)
    by_tile = scales.reshape(tiles, TILE, blocks).transpose(0, 2, 1)
    return packed, np.ascontiguousarray(by_tile).reshape(scales_shape)


def dequantise(levels: Bytes, scales: Halves, rows: int, columns: int) -> Floats:
    """Inverse of `quantise`, to within half a scale: float32 [rows, columns]."""
    tiles, blocks, _ = scales.shape
    by_row = levels.transpose(0, 2, 1, 3).reshape(tiles * TILE, blocks, BLOCK)
    row_scales = scales.transpose(0, 2, 1).reshape(tiles * TILE, blocks, 1).astype(np.float32)
    values = (by_row.astype(np.float32) - ZERO_POINT) * row_scales
    flat: Floats = values.reshape(tiles * TILE, -1)[:rows, :columns]
    return flat
