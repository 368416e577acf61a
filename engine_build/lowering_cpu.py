"""The decoder on ONNX Runtime's CPU provider.

Linear layers: block-wise 8-bit weights (activations rounded to 8 bits per block too), or float32. All
but the float32 matrix products are operators of our own (engine/kernels). Attention takes all rows of a
step at once and writes new keys and values into the kv_slots' memory where it lies; no node copies a
cache.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from engine_build.engine_names import LEVELS, SCALES
from engine_build.onnx_writer import MICROSOFT, SINKSERVE, GraphWriter
from engine_build.quantize import quantise, stored_shapes
from engine_build.shard import rank_weights, shard_shape
from engine_build.spec import EngineSpec
from engine_build.weights import MergedWeight

Floats = npt.NDArray[np.float32]

TOKEN_IDS, ANGLES, ROWS, CACHE = "token_ids", "angles", "rows", "cache"
REDUCER = "reducer"
ROW_FIELDS = 7


class CpuLowering:
    """Writes linear layers, norms and attention for ONNX Runtime on a CPU.

    Inputs it adds:

        angles  float32 [tokens, 4, rotary_dim / 2], cosine and sine at token_index, then at the cache
                position (a sink's key meets the query at that)
        rows    int64 [rows, 7]: kv_slot, tokens, start, sink_tokens, window_tokens, ring_tokens,
                window_start of each conversation in the step, in the order of its tokens
        cache   uint8 [layers, kv_slots, 2 * kv_heads, head_bytes], written in place. For each head its
                keys, 16 places at a time, [places / 16, head_dim, 16], then its values [places,
                head_dim], of `kv_dtype`, padded as in `EngineSpec.head_bytes`
        reducer int64 [2], of tensor-parallel ranks alone: see engine/kernels/allreduce.c

    All sizes are those of one rank.
    """

    def __init__(self, spec: EngineSpec, graph: GraphWriter) -> None:
        shape = shard_shape(spec.model, spec.tp_size)
        self._shape = shape
        self._graph = graph
        self._kv_bytes = spec.kv_bytes
        self._int8 = spec.weight_format == "int8"
        self._sizes = {
            weight.name: weight.shape for weight in rank_weights(spec.model, 0, spec.tp_size)
        }
        graph.input(ANGLES, np.float32, ["tokens", 4, shape.rope.rotary_dim // 2])
        graph.input(ROWS, np.int64, ["rows", ROW_FIELDS])
        graph.input(CACHE, np.uint8, [shape.num_layers, "slots", 2 * shape.num_kv_heads, "bytes"])
        self._ranks = spec.tp_size
        if self._ranks > 1:
            graph.input(REDUCER, np.int64, [2])

    def token_ids(self) -> str:
        """See `Lowering.token_ids`."""
        return self._graph.input(TOKEN_IDS, np.int64, ["tokens"])

    def store(self, weight: MergedWeight, values: Floats) -> dict[str, Any]:
        """See `Lowering.store`."""
        if not (self._int8 and weight.is_matrix):
            return {weight.name: values}
        levels, scales = quantise(values)
        return {weight.name + LEVELS: levels, weight.name + SCALES: scales}

    def embedding(self, name: str, token_ids: str) -> str:
        """See `Lowering.embedding`."""
        if not self._int8:
            return self._graph.node("Gather", [self._float32(name), token_ids])
        return self._blocks("BlockEmbedding", token_ids, name)

    def linear(self, x: str, name: str, bias: str | None = None) -> str:
        """See `Lowering.linear`."""
        extra = [] if bias is None else [self._float32(bias)]
        if self._int8:
            return self._blocks("BlockLinear", x, name, *extra)
        product = self._graph.node("FusedMatMul", [x, self._float32(name)], MICROSOFT, transB=1)
        return self._graph.node("Add", [product, *extra]) if extra else product

    def logits(self, x: str, name: str) -> str:
        """See `Lowering.logits`."""
        return self.linear(x, name)

    def all_reduce(self, x: str) -> str:
        """See `Lowering.all_reduce`."""
        if self._ranks == 1:
            return x
        return self._graph.node("AllReduce", [x, REDUCER], SINKSERVE)

    def norm(self, x: str, name: str) -> str:
        """See `Lowering.norm`."""
        weight, epsilon = self._float32(name), self._shape.rms_norm_eps
        return self._graph.node("RMSNormalization", [x, weight], axis=-1, epsilon=epsilon)

    def add_norm(self, x: str, delta: str, name: str) -> tuple[str, str]:
        """See `Lowering.add_norm`."""
        normed, total = self._graph.nodes(
            "AddNorm",
            [x, delta, self._float32(name)],
            2,
            SINKSERVE,
            epsilon=self._shape.rms_norm_eps,
        )
        return total, normed

    def attention(self, layer: int, qkv: str, norms: tuple[str, str] | None) -> str:
        """See `Lowering.attention`."""
        shape = self._shape
        weights = [] if norms is None else [self._float32(name) for name in norms]
        return self._graph.node(
            "SinkAttention",
            [qkv, ANGLES, ROWS, CACHE, *weights],
            SINKSERVE,
            layer=layer,
            heads=shape.num_heads,
            kv_heads=shape.num_kv_heads,
            dim=shape.head_dim,
            rotary_dim=shape.rope.rotary_dim,
            kv_bytes=self._kv_bytes,
            qk_norm=int(norms is not None),
            epsilon=float(shape.rms_norm_eps),
        )

    def gated(self, gate_up: str) -> str:
        """See `Lowering.gated`."""
        return self._graph.node("SwiGLU", [gate_up], SINKSERVE)

    def _float32(self, name: str) -> str:
        return self._graph.weight(name, np.float32, self._sizes[name])

    def _blocks(self, op: str, x: str, name: str, *extra: str) -> str:
        rows, columns = self._sizes[name]
        levels_shape, scales_shape = stored_shapes(rows, columns)
        levels = self._graph.weight(name + LEVELS, np.uint8, levels_shape)
        scales = self._graph.weight(name + SCALES, np.float16, scales_shape)
        inputs = [x, levels, scales, *extra]
        return self._graph.node(op, inputs, SINKSERVE, width_in=columns, width_out=rows)
