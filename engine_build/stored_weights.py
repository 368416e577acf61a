"""The weights that an engine directory holds, as floating point again: what the engine computes with.

Nothing is rounded on the way: every stored format fits into float32.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from engine_build.checkpoint import read_checkpoint
from engine_build.graph import WEIGHTS_FILE
from engine_build.lowering_cpu import LEVELS, SCALES
from engine_build.quantize import dequantise
from engine_build.spec import EngineSpec, ModelShape, SpecError
from engine_build.weights import Floats, merged_weights

WeightOf = Callable[[str], Floats]
"""A weight by its name in `merged_weights`, float32."""


@dataclass(frozen=True, slots=True)
class _Entry:
    dtype: str
    shape: tuple[int, ...]
    offset: int
    length: int


def stored_weights(engine_dir: Path, spec: EngineSpec) -> WeightOf:
    """The weights of an engine directory, read when they are asked for.

    Raises SpecError for a file that is not of this release.
    """
    file = engine_dir / WEIGHTS_FILE
    entries = _entries(file)
    sizes = {weight.name: weight.shape for weight in merged_weights(spec.model)}

    def load(name: str) -> Floats:
        if name in entries:
            return _as_float32(file, entries[name])
        if name + LEVELS in entries:
            levels = _raw(file, entries[name + LEVELS], np.uint8)
            scales = _raw(file, entries[name + SCALES], np.float16)
            rows, columns = sizes[name]
            return dequantise(levels, scales, rows, columns)
        raise _unreadable(file, f"it has no {name}")

    return load


def checkpoint_weights(model: Path, shape: ModelShape) -> WeightOf:
    """The same weights as the model at `model` has them, before any rounding.

    Raises SpecError when that is not a model of this shape.
    """
    checkpoint = read_checkpoint(model)
    if checkpoint.shape != shape:
        raise SpecError(
            "model",
            f"{model} is not what this engine was built from: its shape differs",
            "Name the checkpoint that was built",
        )
    by_name = {weight.name: weight for weight in merged_weights(shape)}
    return lambda name: by_name[name].load(checkpoint.tensors)


def _entries(file: Path) -> dict[str, _Entry]:
    try:
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            header: dict[str, Any] = json.loads(stream.read(length))
        return {
            name: _Entry(
                entry["dtype"],
                tuple(entry["shape"]),
                8 + length + entry["data_offsets"][0],
                entry["data_offsets"][1] - entry["data_offsets"][0],
            )
            for name, entry in header.items()
            if name != "__metadata__"
        }
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _unreadable(file, str(error)) from error


def _raw(file: Path, entry: _Entry, dtype: type[np.generic]) -> npt.NDArray[Any]:
    count = entry.length // np.dtype(dtype).itemsize
    mapped = np.memmap(file, dtype=dtype, mode="r", offset=entry.offset, shape=(count,))
    return mapped.reshape(entry.shape)


def _as_float32(file: Path, entry: _Entry) -> Floats:
    if entry.dtype == "F32":
        return _raw(file, entry, np.float32)
    if entry.dtype == "F16":
        return _raw(file, entry, np.float16).astype(np.float32)
    if entry.dtype == "BF16":
        bits = _raw(file, entry, np.uint16).astype(np.uint32) << 16
        return bits.view(np.float32)
    raise _unreadable(file, f"weights of type {entry.dtype} are not known")


def _unreadable(file: Path, problem: str) -> SpecError:
    return SpecError(
        file.name, f"cannot be read: {problem}", "Build the engine again with `sinkserve build`"
    )
