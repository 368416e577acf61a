"""The weights of a CUDA engine: 16-bit matrices, or float8 with a scale for each output. It needs no graph.

Norms, biases and scales stay float32: together they are less than a thousandth of the file. The embedding
and the head stay 16-bit where the layers are float8: rounding a token's own vector shows most.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from engine_build.lowering_cpu import LEVELS, SCALES
from engine_build.onnx_writer import Declared
from engine_build.spec import EngineSpec, WeightFormat
from engine_build.weights import Floats, MergedWeight, Tensors, WeightFileWriter, merged_weights

LARGEST_FLOAT8 = 448.0
"""Of float8_e4m3fn, which has no infinity: what is larger becomes no number."""

_WIDE: dict[WeightFormat, npt.DTypeLike] = {
    "float32": np.float32,
    "float16": np.float16,
    "bfloat16": ml_dtypes.bfloat16,
    "float8": ml_dtypes.bfloat16,
}


def is_float8(weight: MergedWeight, weight_format: WeightFormat) -> bool:
    """Whether this weight is kept as float8 and scales."""
    outer = weight.name in ("embed", "head")
    return weight_format == "float8" and weight.is_matrix and not outer


def store(weight: MergedWeight, values: Floats, weight_format: WeightFormat) -> dict[str, Any]:
    """The tensors, by name, that are kept of a weight."""
    if is_float8(weight, weight_format):
        levels, scales = quantise_float8(values)
        return {weight.name + LEVELS: levels, weight.name + SCALES: scales}
    return {weight.name: values.astype(_stored_type(weight, weight_format))}


def quantise_float8(values: Floats) -> tuple[npt.NDArray[Any], Floats]:
    """float8_e4m3fn [outputs, inputs] and float32 [outputs], whose product is nearest to `values`."""
    largest = np.maximum(np.abs(values).max(axis=1), np.float32(1e-12))
    scales = (largest / np.float32(LARGEST_FLOAT8)).astype(np.float32)
    return (values / scales[:, None]).astype(ml_dtypes.float8_e4m3fn), scales


def write_cuda_weights(
    spec: EngineSpec, tensors: Tensors, file: Path, progress: Callable[[float], None]
) -> None:
    """Write the weights of all ranks as one file: a rank cuts its part when it loads."""
    weights = merged_weights(spec.model)
    declared: dict[str, Declared] = {}
    for weight in weights:
        if is_float8(weight, spec.weight_format):
            levels = Declared(np.dtype(ml_dtypes.float8_e4m3fn), weight.shape)
            declared[weight.name + LEVELS] = levels
            declared[weight.name + SCALES] = Declared(np.dtype(np.float32), weight.shape[:1])
        else:
            kind = np.dtype(_stored_type(weight, spec.weight_format))
            declared[weight.name] = Declared(kind, weight.shape)
    writer = WeightFileWriter(file, declared)
    for done, weight in enumerate(weights):
        progress(done / len(weights))
        for name, values in store(weight, weight.load(tensors), spec.weight_format).items():
            writer.write(name, values)
    writer.close()
    progress(1.0)


def _stored_type(weight: MergedWeight, weight_format: WeightFormat) -> npt.DTypeLike:
    return _WIDE[weight_format] if weight.is_matrix else np.float32
