"""A decoder's weights in the form that graphs use, and the file that holds them.

Checkpoint tensors are merged (q, k, v into one matrix; gate and up into another) and the attention
scale 1/sqrt(head_dim) is folded into q, so that no graph computes it.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from engine_build.engine_names import Declared, StoredAt
from engine_build.spec import ModelShape

Floats = npt.NDArray[np.float32]
Tensors = Mapping[str, Floats]

_ALIGNMENT = 64
_DTYPE_NAMES = {
    np.dtype(np.float32): "F32",
    np.dtype(np.float16): "F16",
    np.dtype(ml_dtypes.bfloat16): "BF16",
    np.dtype(ml_dtypes.float8_e4m3fn): "F8_E4M3",
    np.dtype(np.int32): "I32",
    np.dtype(np.int8): "I8",
    np.dtype(np.uint8): "U8",
}


@dataclass(frozen=True, slots=True)
class MergedWeight:
    """A weight of the graph: `load` makes its float32 array out of checkpoint tensors."""

    name: str
    shape: tuple[int, ...]
    load: Callable[[Tensors], Floats]

    @property
    def is_matrix(self) -> bool:
        return len(self.shape) == 2


def merged_weights(shape: ModelShape) -> list[MergedWeight]:
    """Every weight of a decoder of this shape, matrices as [output, input], in order of use.

    Names: `embed`, `layers.N.{input_norm, qkv, qkv.bias, q_norm, k_norm, output, output.bias,
    mlp_norm, gate_up, down}`, `norm`, `head` (only if not tied to `embed`).
    """
    hidden, inner, head_dim = shape.hidden_size, shape.intermediate_size, shape.head_dim
    q_size = shape.num_heads * head_dim
    qkv_size = q_size + 2 * shape.num_kv_heads * head_dim
    result = [_plain("embed", "model.embed_tokens.weight", (shape.vocab_size, hidden))]
    for layer in range(shape.num_layers):
        ours, theirs = f"layers.{layer}.", f"model.layers.{layer}."
        attention = theirs + "self_attn."
        result.append(_plain(ours + "input_norm", theirs + "input_layernorm.weight", (hidden,)))
        result.append(_qkv(shape, ours + "qkv", attention, "weight", (qkv_size, hidden)))
        if shape.qkv_bias:
            result.append(_qkv(shape, ours + "qkv.bias", attention, "bias", (qkv_size,)))
        if shape.qk_norm:
            scale = 1.0 / math.sqrt(head_dim)
            norm = _plain(ours + "q_norm", attention + "q_norm.weight", (head_dim,), scale)
            result.append(norm)
            result.append(_plain(ours + "k_norm", attention + "k_norm.weight", (head_dim,)))
        result.append(_plain(ours + "output", attention + "o_proj.weight", (hidden, q_size)))
        if shape.output_bias:
            result.append(_plain(ours + "output.bias", attention + "o_proj.bias", (hidden,)))
        norm_name = theirs + "post_attention_layernorm.weight"
        result.append(_plain(ours + "mlp_norm", norm_name, (hidden,)))
        parts = [theirs + "mlp.gate_proj.weight", theirs + "mlp.up_proj.weight"]
        result.append(_joined(ours + "gate_up", parts, (2 * inner, hidden)))
        result.append(_plain(ours + "down", theirs + "mlp.down_proj.weight", (hidden, inner)))
    result.append(_plain("norm", "model.norm.weight", (hidden,)))
    if not shape.tied_head:
        result.append(_plain("head", "lm_head.weight", (shape.vocab_size, hidden)))
    return result


def _plain(name: str, source: str, shape: tuple[int, ...], scale: float = 1.0) -> MergedWeight:
    def load(tensors: Tensors) -> Floats:
        return tensors[source] if scale == 1.0 else tensors[source] * np.float32(scale)

    return MergedWeight(name, shape, load)


def _joined(name: str, sources: list[str], shape: tuple[int, ...]) -> MergedWeight:
    return MergedWeight(name, shape, lambda tensors: np.concatenate([tensors[s] for s in sources]))


def _qkv(
    model: ModelShape, name: str, attention: str, kind: str, shape: tuple[int, ...]
) -> MergedWeight:
    scale = np.float32(1.0 if model.qk_norm else 1.0 / math.sqrt(model.head_dim))

    def load(tensors: Tensors) -> Floats:
        q, k, v = (tensors[f"{attention}{part}_proj.{kind}"] for part in "qkv")
        return np.concatenate([q * scale, k, v])

    return MergedWeight(name, shape, load)


class WeightFileWriter:
    """Writes a safetensors file tensor by tensor, never holding more than one.

    Tensors are laid out widest elements first, the data starting at a multiple of 64 bytes.
    """

    def __init__(self, path: Path, declared: Mapping[str, Declared]) -> None:
        self._own = dict(declared)
        order = sorted(self._own, key=lambda name: -self._own[name].dtype.itemsize)
        header: dict[str, Any] = {"__metadata__": {"format": "sinkserve"}}
        offset = 0
        for name in order:
            tensor = self._own[name]
            end = offset + tensor.num_bytes
            header[name] = {
                "dtype": _DTYPE_NAMES[tensor.dtype],
                "shape": list(tensor.shape),
                "data_offsets": [offset, end],
            }
            offset = end
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-(8 + len(text)) % _ALIGNMENT)
        base = 8 + len(text)
        self.stored = {
            name: StoredAt(base + header[name]["data_offsets"][0], self._own[name].num_bytes)
            for name in order
        }
        self._unwritten = set(order)
        self._file = path.open("wb")
        self._file.write(len(text).to_bytes(8, "little") + text)
        self._file.truncate(base + offset)

    def write(self, name: str, values: npt.NDArray[Any]) -> None:
        """Store one tensor. Raises ValueError when it is not as declared."""
        declared = self._own[name]
        if values.dtype != declared.dtype or values.shape != declared.shape:
            raise ValueError(f"{name} is {values.dtype} {values.shape}, declared {declared}")
        self._file.seek(self.stored[name].offset)
        self._file.write(np.ascontiguousarray(values).view(np.uint8).data)
        self._unwritten.remove(name)

    def close(self) -> None:
        """Finish the file. Raises ValueError if a declared tensor was never written."""
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        if self._unwritten:
            raise ValueError(f"weights never written: {sorted(self._unwritten)}")


def read_weight_file(path: Path) -> dict[str, npt.NDArray[Any]]:
    """The tensors of a weights file by name, mapped: nothing is read until it is looked at."""
    dtypes = {name: dtype for dtype, name in _DTYPE_NAMES.items()}
    whole = np.memmap(path, dtype=np.uint8, mode="r")
    base = 8 + int.from_bytes(whole[:8].tobytes(), "little")
    header: dict[str, Any] = json.loads(whole[8:base].tobytes())
    result = {}
    for name, tensor in header.items():
        if name != "__metadata__":
            begin, end = tensor["data_offsets"]
            values = whole[base + begin : base + end].view(dtypes[tensor["dtype"]])
            result[name] = values.reshape(tensor["shape"])
    return result
