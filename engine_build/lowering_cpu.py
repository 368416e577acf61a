"""The decoder on ONNX Runtime's CPU provider.

Linear layers: block-wise 8-bit `MatMulNBits` (activations quantised per block too), or float32.

Attention, "split" form: the past is read where it lies (inputs bound to the kv_slots), the new K and V
are outputs that the host writes into the ring after the run, and no node copies a cache.

    scores = [ sink places: q rotated at its cache position | other places: q rotated at its
               token_index | this chunk's own keys ] + bias, softmax, times [past values | new values]

Every key is stored rotated at its token_index; a sink's is its cache position too, so the second
rotation of q is all that "move the sinks, not the window" takes.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from engine_build.onnx_writer import MICROSOFT, Dimension, GraphWriter
from engine_build.quantize import BLOCK, LONG_BLOCK, num_blocks, quantise
from engine_build.spec import ModelShape, WeightFormat
from engine_build.weights import MergedWeight, merged_weights

Floats = npt.NDArray[np.float32]

COS, SIN = "cos", "sin"
SINK_COS, SINK_SIN = "sink_cos", "sink_sin"
BIAS, IS_SINK, NUM_SINK_PLACES = "bias", "is_sink", "num_sink_places"
SCORE_SPLIT, PROBABILITY_SPLIT = "score_split", "probability_split"


def past_names(layer: int) -> tuple[str, str]:
    """Inputs: a layer's cached keys and values, float32 [rows, kv_heads, 1, places, head_dim]."""
    return f"past_key.{layer}", f"past_value.{layer}"


def new_names(layer: int) -> tuple[str, str]:
    """Outputs: a layer's new keys (rotated) and values, float32 [rows, kv_heads, chunk, head_dim]."""
    return f"new_key.{layer}", f"new_value.{layer}"


class CpuLowering:
    """Writes linear layers, norms and attention for ONNX Runtime on a CPU.

    Inputs it adds:

        cos, sin            float32 [rows, chunk, rotary_dim / 2], angles at token_index
        sink_cos, sink_sin  the same at the cache position
        num_sink_places     int64 [1], the most sinks of any row, at least 1
        is_sink             bool  [rows, 1, 1, 1, num_sink_places]
        bias                float32 [rows, 1, 1, chunk, places + chunk], 0 or minus infinity
        score_split         int64 [2] = num_sink_places, places - num_sink_places
        probability_split   int64 [2] = places, chunk
    """

    def __init__(self, shape: ModelShape, weight_format: WeightFormat, graph: GraphWriter) -> None:
        self._shape = shape
        self._graph = graph
        self._int8 = weight_format == "int8"
        self._sizes = {weight.name: weight.shape for weight in merged_weights(shape)}
        half: list[Dimension] = ["rows", "chunk", shape.rope.rotary_dim // 2]
        for name in (COS, SIN, SINK_COS, SINK_SIN):
            graph.input(name, np.float32, half)
        graph.input(NUM_SINK_PLACES, np.int64, [1])
        graph.input(IS_SINK, np.bool_, ["rows", 1, 1, 1, "sink_places"])
        graph.input(BIAS, np.float32, ["rows", 1, 1, "chunk", "keys"])
        graph.input(SCORE_SPLIT, np.int64, [2])
        graph.input(PROBABILITY_SPLIT, np.int64, [2])

    def store(self, weight: MergedWeight, values: Floats) -> dict[str, Any]:
        """See `Lowering.store`."""
        if not (self._int8 and weight.is_matrix):
            return {weight.name: values}
        levels, scales = quantise(values, self._block(weight.name))
        return {
            weight.name + ".levels": levels,
            weight.name + ".scales": scales.reshape(-1),
        }

    def embedding(self, name: str, token_ids: str) -> str:
        """See `Lowering.embedding`."""
        if not self._int8:
            return self._graph.node("Gather", [self._float32(name), token_ids])
        rows, columns = self._sizes[name]
        levels, scales = self._quantised(name)
        size = self._block(name)
        blocks = num_blocks(columns, size)
        padded = blocks * size
        table = self._graph.alias(name + ".table", levels, (rows, padded))
        table_scales = self._graph.alias(name + ".table_scales", scales, (rows, blocks))
        gathered = self._graph.node(
            "GatherBlockQuantized",
            [table, token_ids, table_scales],
            MICROSOFT,
            gather_axis=0,
            quantize_axis=1,
            block_size=size,
            bits=8,
        )
        if padded == columns:
            return gathered
        cut = [self._graph.constant(value) for value in ([0], [columns], [2])]
        return self._graph.node("Slice", [gathered, *cut])

    def linear(self, x: str, name: str, bias: str | None = None) -> str:
        """See `Lowering.linear`."""
        rows, columns = self._sizes[name]
        if self._int8:
            extra = [] if bias is None else ["", "", self._float32(bias)]
            return self._graph.node(
                "MatMulNBits",
                [x, *self._quantised(name), *extra],
                MICROSOFT,
                K=columns,
                N=rows,
                bits=8,
                block_size=self._block(name),
                accuracy_level=4,
            )
        product = self._graph.node("FusedMatMul", [x, self._float32(name)], MICROSOFT, transB=1)
        return product if bias is None else self._graph.node("Add", [product, self._float32(bias)])

    def norm(self, x: str, name: str) -> str:
        """See `Lowering.norm`."""
        weight, epsilon = self._float32(name), self._shape.rms_norm_eps
        return self._graph.node("RMSNormalization", [x, weight], axis=-1, epsilon=epsilon)

    def add_norm(self, x: str, delta: str, name: str) -> tuple[str, str]:
        """See `Lowering.add_norm`."""
        normed, total = name + ":normed", name + ":sum"
        self._graph.nodes(
            "SkipSimplifiedLayerNormalization",
            [x, delta, self._float32(name)],
            4,
            MICROSOFT,
            epsilon=self._shape.rms_norm_eps,
            output_names=[normed, "", "", total],
        )
        return total, normed

    def attention(self, layer: int, q: str, k: str, v: str) -> str:
        """See `Lowering.attention`."""
        graph, shape, head_dim = self._graph, self._shape, self._shape.head_dim
        past_key, past_value = self._past(layer)
        new_key, new_value = new_names(layer)
        self._rotate(k, COS, SIN, new_key)
        graph.node("Identity", [v], output_names=[new_value])
        for name in (new_key, new_value):
            graph.output(name, np.float32, ["rows", shape.num_kv_heads, "chunk", head_dim])
        # Heads that share a KV head stay apart: one query each is a matrix-vector product, which
        # reads the cache where it lies; folded together, the cache would be packed first.
        by_head = graph.constant([0, shape.num_kv_heads, shape.heads_per_kv_head, -1, head_dim])
        query = graph.node("Reshape", [self._rotate(q, COS, SIN), by_head])
        sink_query = graph.node("Reshape", [self._rotate(q, SINK_COS, SINK_SIN), by_head])
        grouped = graph.constant([0, 0, 1, -1, head_dim])
        chunk_key = graph.node("Reshape", [new_key, grouped])
        chunk_value = graph.node("Reshape", [v, grouped])
        at_sinks = [graph.constant([0]), NUM_SINK_PLACES, graph.constant([3])]
        sink_key = graph.node("Slice", [past_key, *at_sinks])
        near, far = graph.nodes("Split", [self._dot(query, past_key), SCORE_SPLIT], 2, axis=-1)
        near = graph.node("Where", [IS_SINK, self._dot(sink_query, sink_key), near])
        scores = graph.node("Concat", [near, far, self._dot(query, chunk_key)], axis=-1)
        weights = graph.node("Softmax", [graph.node("Add", [scores, BIAS])], axis=-1)
        past_weights, chunk_weights = graph.nodes("Split", [weights, PROBABILITY_SPLIT], 2, axis=-1)
        from_past = graph.node("MatMul", [past_weights, past_value])
        from_chunk = graph.node("MatMul", [chunk_weights, chunk_value])
        total = graph.node("Add", [from_past, from_chunk])
        by_token = graph.node("Transpose", [total], perm=[0, 3, 1, 2, 4])
        return graph.node("Reshape", [by_token, graph.constant([0, 0, shape.num_heads * head_dim])])

    def _past(self, layer: int) -> tuple[str, str]:
        shape = self._shape
        dims: list[Dimension] = ["rows", shape.num_kv_heads, 1, "places", shape.head_dim]
        key, value = past_names(layer)
        return self._graph.input(key, np.float32, dims), self._graph.input(value, np.float32, dims)

    def _rotate(self, heads: str, cos: str, sin: str, output: str | None = None) -> str:
        rope = self._shape.rope
        attributes: dict[str, Any] = {}
        if rope.rotary_dim != self._shape.head_dim:
            attributes["rotary_embedding_dim"] = rope.rotary_dim
        names = None if output is None else [output]
        (rotated,) = self._graph.nodes(
            "RotaryEmbedding", [heads, cos, sin], 1, output_names=names, **attributes
        )
        return rotated

    def _dot(self, query: str, key: str) -> str:
        return self._graph.node("FusedMatMul", [query, key], MICROSOFT, transB=1)

    def _float32(self, name: str) -> str:
        return self._graph.weight(name, np.float32, self._sizes[name])

    def _block(self, name: str) -> int:
        long = name.endswith(".down") and self._sizes[name][1] % LONG_BLOCK == 0
        return LONG_BLOCK if long else BLOCK

    def _quantised(self, name: str) -> tuple[str, str]:
        rows, columns = self._sizes[name]
        size = self._block(name)
        blocks = num_blocks(columns, size)
        levels = self._graph.weight(name + ".levels", np.uint8, (rows, blocks, size))
        return levels, self._graph.weight(name + ".scales", np.float32, (rows * blocks,))
