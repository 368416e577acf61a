"""The weights of a CUDA engine: 16-bit matrices, float8 with a scale for each output, or 4 bits with a scale
for each group of inputs (engine_build/int4.py). It needs no graph.

Norms, biases and scales of outputs stay float32: together they are less than a thousandth of the file. The
embedding and the head stay 16-bit where the layers are not: rounding a token's own vector shows most.
"""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from engine_build import int4
from engine_build.engine_names import LEVELS, SCALES, Declared
from engine_build.shard import shard_size, whole_weights
from engine_build.spec import EngineSpec, WeightFormat
from engine_build.weights import Floats, MergedWeight

LARGEST_FLOAT8 = 448.0
"""Of float8_e4m3fn, which has no infinity: what is larger becomes no number."""

_WIDE: dict[WeightFormat, npt.DTypeLike] = {
    "float32": np.float32,
    "float16": np.float16,
    "bfloat16": ml_dtypes.bfloat16,
    "float8": ml_dtypes.bfloat16,
    "int4": ml_dtypes.bfloat16,
}
INT4_SCALE = np.dtype(ml_dtypes.bfloat16)


def is_scaled(weight: MergedWeight, weight_format: WeightFormat) -> bool:
    """Whether this weight is kept as float8 or 4 bits, and scales."""
    outer = weight.name in ("embed", "head")
    return weight_format in ("float8", "int4") and weight.is_matrix and not outer


def quantise_float8(values: Floats) -> tuple[npt.NDArray[Any], Floats]:
    """float8_e4m3fn [outputs, inputs] and float32 [outputs], whose product is nearest to `values`."""
    largest = np.maximum(np.abs(values).max(axis=1), np.float32(1e-12))
    scales = (largest / np.float32(LARGEST_FLOAT8)).astype(np.float32)
    return (values / scales[:, None]).astype(ml_dtypes.float8_e4m3fn), scales


class CudaWeights:
    """What is kept of each weight of a rank: `declared`, by name, and how to make it."""

    def __init__(self, spec: EngineSpec) -> None:
        self._format = spec.weight_format
        self.declared: dict[str, Declared] = {}
        for weight in whole_weights(spec.model, spec.tp_size):
            shape = shard_size(weight, spec.model, spec.tp_size)
            if is_scaled(weight, self._format):
                levels, scales = self._scaled(*shape)
                self.declared[weight.name + LEVELS] = levels
                self.declared[weight.name + SCALES] = scales
            else:
                self.declared[weight.name] = Declared(self._type(weight), shape)

    def store(self, weight: MergedWeight, values: Floats) -> dict[str, Any]:
        """The tensors, by name, that are kept of a rank's part of a weight."""
        if is_scaled(weight, self._format):
            levels, scales = self._rounded(values)
            return {weight.name + LEVELS: levels, weight.name + SCALES: scales}
        return {weight.name: values.astype(self._type(weight))}

    def _scaled(self, outputs: int, inputs: int) -> tuple[Declared, Declared]:
        if self._format == "int4":
            words = Declared(np.dtype(np.int32), (outputs, int4.num_words(inputs)))
            return words, Declared(INT4_SCALE, (outputs, int4.num_scales(inputs)))
        levels = Declared(np.dtype(ml_dtypes.float8_e4m3fn), (outputs, inputs))
        return levels, Declared(np.dtype(np.float32), (outputs,))

    def _rounded(self, values: Floats) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
        if self._format == "int4":
            return int4.to_words(*int4.quantise(values, INT4_SCALE))
        return quantise_float8(values)

    def _type(self, weight: MergedWeight) -> np.dtype[Any]:
        return np.dtype(_WIDE[self._format] if weight.is_matrix else np.float32)
