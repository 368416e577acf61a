"""The inputs of a TensorRT plan by name, and the sizes of its cache. Needs neither ONNX nor TensorRT.

What each input means is told where the graph is written: engine_build/lowering_tensorrt.py.
"""

from __future__ import annotations

from engine_build.engine_names import LEVELS, SCALES
from engine_build.shard import shard_shape
from engine_build.spec import EngineSpec

TOKEN_IDS = "token_ids"
ANGLES, ROW_FIELDS, QUERY_AGES, WRITE_PLACES = "angles", "row_fields", "query_ages", "write_places"
NUM_ROW_FIELDS = 6
PRESENT = ".present"
"""Added to the name of a cache that is an input: the same cache as an output."""

_PLACES_TOGETHER = 16
_ALIGNMENT_BYTES = 256


def holds_weights(spec: EngineSpec) -> bool:
    """Whether the matrices of the layers are constants of the graph, so that a plan serves one rank alone."""
    return spec.target in ("tensorrt", "tensorrt-rtx") and spec.weight_format == "int4"


def is_input(name: str, spec: EngineSpec) -> bool:
    """Whether a tensor of the weights file is an input of the graph."""
    return not (holds_weights(spec) and name.endswith((LEVELS, SCALES)))


def cache_names(layer: int) -> tuple[str, str]:
    """Names of a layer's keys and values among the inputs; the outputs have `PRESENT` added."""
    return f"layers.{layer}.keys", f"layers.{layer}.values"


def num_places(spec: EngineSpec) -> int:
    """Token places of a kv_slot in a plan's cache: the slot, and one place that nobody ever sees.

    Rows of a batch that have no token in a step write there. Rounded up so that every kv_slot begins at
    a multiple of 256 bytes, which TensorRT wants of addresses.
    """
    places = -(-(spec.slot_tokens + 1) // _PLACES_TOGETHER) * _PLACES_TOGETHER
    place_bytes = kv_heads(spec) * spec.model.head_dim * spec.kv_bytes
    while places * place_bytes % _ALIGNMENT_BYTES:
        places += _PLACES_TOGETHER
    return places


def kv_heads(spec: EngineSpec) -> int:
    """KV heads of one rank."""
    return shard_shape(spec.model, spec.tp_size).num_kv_heads


def cache_row_bytes(spec: EngineSpec) -> int:
    """Bytes of one kv_slot in a plan's cache, on one rank."""
    place_bytes = kv_heads(spec) * spec.model.head_dim * spec.kv_bytes
    return 2 * spec.model.num_layers * num_places(spec) * place_bytes
