"""Symmetric 4-bit weights: groups of an output's inputs share a scale, weight = level * scale.

Levels are -8 to 7, rounded to nearest on the scale that makes the group's squared error least: a short
search, since a scale that clips the largest weight a little serves all others better. Scales have 16 bits.

Two ways to keep them:

    words   for the CUDA engine: int32 [outputs, words], eight levels + 8 each. A block of 128 inputs is 16
            words; bits 4i to 4i + 3 of word j hold input 16 i + j. So eight masks unpack eight runs of
            neighbouring inputs, and no lane needs what another one unpacked. Inputs are padded to whole
            blocks with zeros, scales [outputs, groups] likewise.
    pairs   as ONNX and TensorRT have it: int4 [inputs, outputs], two's complement, two to a byte, the first
            in the low bits; scales [groups, outputs]
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from engine_build.spec import SpecError

GROUPS = (128, 64, 32)
"""Inputs that share a scale: the largest of these that divides a matrix."""

BLOCK = 128
WORDS = 16
ZERO_POINT = 8
"""A block of inputs is so many words; a level is kept as itself plus 8."""

_LEAST, _MOST = -8, 7
_SHARES = (1.0, 0.94, 0.875, 0.83, 0.78, 0.73, 0.67, 0.6)
"""Of the scale at which a group's largest weight is level 7: what is tried. At 7/8 it is level -8."""
_TOGETHER = 1 << 18

Floats = npt.NDArray[np.float32]
Levels = npt.NDArray[np.int8]
Words = npt.NDArray[np.int32]
Bytes = npt.NDArray[np.uint8]


def group_of(inputs: int) -> int:
    """Inputs that share a scale in a matrix this wide. Raises SpecError where no group divides it."""
    for group in GROUPS:
        if inputs % group == 0:
            return group
    raise SpecError(
        "weight_format",
        f"int4 shares scales among 32 to 128 inputs, and a matrix has {inputs} on each rank",
        f"Use another format, or ranks whose parts are multiples of {GROUPS[-1]}",
    )


def num_words(inputs: int) -> int:
    """Words of an output with so many inputs."""
    return -(-inputs // BLOCK) * WORDS


def num_scales(inputs: int) -> int:
    """Scales of an output, those of padding included."""
    return num_words(inputs) // WORDS * BLOCK // group_of(inputs)


def quantise(values: Floats, scale_dtype: npt.DTypeLike) -> tuple[Levels, npt.NDArray[Any]]:
    """Levels int8 [outputs, inputs] and scales [outputs, groups] of float32 [outputs, inputs].

    Raises SpecError as `group_of`.
    """
    outputs, inputs = values.shape
    group = group_of(inputs)
    levels = np.empty((outputs, inputs // group, group), np.int8)
    scales = np.empty((outputs, inputs // group), np.dtype(scale_dtype))
    rows = max(1, _TOGETHER // inputs)  # so that what is worked on stays in the processor's cache
    for begin in range(0, outputs, rows):
        part = slice(begin, begin + rows)
        grouped = np.ascontiguousarray(values[part], np.float32).reshape(-1, inputs // group, group)
        scales[part] = _best_scales(grouped, np.dtype(scale_dtype))
        levels[part] = _rounded(grouped, scales[part].astype(np.float32), np.empty_like(grouped))
    return levels.reshape(outputs, inputs), scales


def _best_scales(grouped: Floats, dtype: np.dtype[Any]) -> npt.NDArray[Any]:
    """Of `_SHARES`, for each group [outputs, groups, group]; as `dtype`, and judged as such."""
    largest = np.maximum(np.abs(grouped).max(axis=-1), np.float32(1e-30))
    work = np.empty_like(grouped)
    best = np.zeros(largest.shape, dtype)
    least = np.full(largest.shape, np.inf, np.float32)
    for share in _SHARES:
        scales = (largest * np.float32(share / _MOST)).astype(dtype)
        scales[scales == 0] = 1.0
        wide = scales.astype(np.float32)
        _rounded(grouped, wide, work)
        work *= wide[..., None]
        work -= grouped
        error = np.einsum("ogi,ogi->og", work, work)
        better = error < least
        best[better], least[better] = scales[better], error[better]
    return best


def _rounded(grouped: Floats, scales: Floats, out: Floats) -> Floats:
    np.multiply(grouped, (1 / scales)[..., None], out=out)
    np.rint(out, out=out)
    return np.clip(out, _LEAST, _MOST, out=out)


def dequantise(levels: Levels, scales: npt.NDArray[Any]) -> Floats:
    """Inverse of `quantise`, but for what was rounded."""
    outputs, inputs = levels.shape
    grouped = levels.reshape(outputs, scales.shape[1], -1).astype(np.float32)
    result: Floats = (grouped * scales.astype(np.float32)[..., None]).reshape(outputs, inputs)
    return result


def to_words(levels: Levels, scales: npt.NDArray[Any]) -> tuple[Words, npt.NDArray[Any]]:
    """Levels and scales as words int32 [outputs, words] and scales [outputs, groups], padded."""
    outputs, inputs = levels.shape
    padded = np.zeros((outputs, num_words(inputs) // WORDS * BLOCK), np.uint32)
    padded[:, :inputs] = (levels.astype(np.int16) + ZERO_POINT).astype(np.uint32)
    padded[:, inputs:] = ZERO_POINT
    runs = padded.reshape(outputs, -1, BLOCK // WORDS, WORDS)
    shifts = np.arange(0, 32, 4, dtype=np.uint32)[:, None]
    words = np.bitwise_or.reduce(runs << shifts, axis=2).reshape(outputs, -1).view(np.int32)
    all_scales = np.zeros((outputs, num_scales(inputs)), scales.dtype)
    all_scales[:, : scales.shape[1]] = scales
    return words, all_scales


def from_words(
    words: Words, scales: npt.NDArray[Any], inputs: int
) -> tuple[Levels, npt.NDArray[Any]]:
    """Inverse of `to_words`, of a matrix with so many inputs."""
    outputs = len(words)
    shifts = np.arange(0, 32, 4, dtype=np.uint32)[:, None]
    runs = words.view(np.uint32).reshape(outputs, -1, 1, WORDS) >> shifts & 15
    levels = runs.reshape(outputs, -1)[:, :inputs].astype(np.int8) - np.int8(ZERO_POINT)
    return levels, scales[:, : inputs // group_of(inputs)]


def to_pairs(levels: Levels, scales: npt.NDArray[Any]) -> tuple[Bytes, npt.NDArray[Any]]:
    """Levels and scales as bytes uint8 [inputs, outputs / 2] and scales [groups, outputs]."""
    by_input = np.ascontiguousarray(levels.T).view(np.uint8) & 15
    pairs = (by_input[:, ::2] | by_input[:, 1::2] << 4).astype(np.uint8)
    return pairs, np.ascontiguousarray(scales.T)


def from_pairs(pairs: Bytes, scales: npt.NDArray[Any]) -> tuple[Levels, npt.NDArray[Any]]:
    """Inverse of `to_pairs`."""
    both = np.stack([pairs & 15, pairs >> 4], axis=-1).reshape(len(pairs), -1)
    levels = (both ^ 8).view(np.int8) - np.int8(8)
    return np.ascontiguousarray(levels.T), np.ascontiguousarray(scales.T)
