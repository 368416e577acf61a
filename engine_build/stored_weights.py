"""The weights that an engine directory holds, as floating point again: what the engine computes with.

Nothing is rounded on the way: every stored format fits into float32.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from engine_build import int4
from engine_build.checkpoint import read_checkpoint
from engine_build.engine_names import LEVELS, SCALES, WEIGHTS_FILE
from engine_build.quantize import dequantise
from engine_build.shard import rank_folder, rank_weights, shard_shape
from engine_build.spec import EngineSpec, ModelShape, SpecError, Target
from engine_build.weights import Floats, merged_weights, read_weight_file

WeightOf = Callable[[str], Floats]
"""A weight by its name in `merged_weights`, float32."""

_Stored = Mapping[str, npt.NDArray[Any]]


def stored_weights(engine_dir: Path, spec: EngineSpec) -> WeightOf:
    """The weights of an engine directory, read when they are asked for; those of ranks, put together.

    Raises SpecError for a file that is missing, damaged or not of this release.
    """
    whole = (engine_dir / WEIGHTS_FILE).is_file()
    num_files = 1 if whole else spec.tp_size
    files = [_read(rank_folder(engine_dir, rank, num_files)) for rank in range(num_files)]
    sizes = {weight.name: weight.shape for weight in rank_weights(spec.model, 0, num_files)}

    def load(name: str) -> Floats:
        parts = [_as_float32(file, name, sizes.get(name, ()), spec.target) for file in files]
        return parts[0] if len(parts) == 1 else _joined(name, parts, spec.model)

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


def _read(folder: Path) -> _Stored:
    try:
        return read_weight_file(folder / WEIGHTS_FILE)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _unreadable(f"cannot be read: {error}") from error


def _as_float32(stored: _Stored, name: str, shape: tuple[int, ...], target: Target) -> Floats:
    if name in stored:
        return stored[name].astype(np.float32, copy=False)
    levels, scales = stored.get(name + LEVELS), stored.get(name + SCALES)
    if levels is None or scales is None:
        raise _unreadable(f"has no {name}")
    if target == "cpu":
        return dequantise(levels, scales, *shape)
    if levels.dtype == np.int32:
        return int4.dequantise(*int4.from_words(levels, scales, shape[1]))
    if scales.ndim == 2:
        return int4.dequantise(*int4.from_pairs(levels, scales))
    by_output = levels if target == "cuda" else levels.T  # one scale for each output
    product: Floats = by_output.astype(np.float32) * scales.astype(np.float32)[:, None]
    return product


def _joined(name: str, parts: Sequence[Floats], model: ModelShape) -> Floats:
    """The inverse of `shard_values`, over all ranks."""
    kind = name.split(".", 2)[2] if name.startswith("layers.") else name
    if kind in ("output", "down"):
        return np.concatenate(parts, axis=1)
    if kind == "head":
        return np.concatenate(parts)
    if kind == "gate_up":
        halves = [np.split(part, 2) for part in parts]
        return np.concatenate([gate for gate, _ in halves] + [up for _, up in halves])
    if kind in ("qkv", "qkv.bias"):
        return _joined_heads(parts, model)
    return parts[0]


def _joined_heads(parts: Sequence[Floats], model: ModelShape) -> Floats:
    """Query heads of all ranks, then each key/value head once: ranks may share one."""
    local = shard_shape(model, len(parts))
    sharing = max(1, len(parts) // model.num_kv_heads)
    q_rows, kv_rows = local.num_heads * model.head_dim, local.num_kv_heads * model.head_dim
    q, k, v = zip(*(np.split(part, [q_rows, q_rows + kv_rows]) for part in parts), strict=True)
    return np.concatenate([*q, *k[::sharing], *v[::sharing]])


def _unreadable(problem: str) -> SpecError:
    return SpecError(WEIGHTS_FILE, problem, "Build the engine again with `sinkserve build`")
