"""The decoder for TensorRT and TensorRT-RTX: standard ONNX, opset 24, which ONNX Runtime runs as well.

Only what both know is used, so that ONNX Runtime on a CPU proves the very graph a plan is built from.

Weights are inputs of the graph: one plan serves every model and every tensor-parallel shard of a shape, and
needs no GPU to be built. K and V of a layer are inputs and outputs of one TensorScatter each, which is
TensorRT's KVCacheUpdate: the runtime binds both to the same memory, and nothing copies a cache. That layer
writes places in a row (linear), row b of the batch into row b of the cache; so the runtime arranges the
kv_slots of a step side by side (engine/slot_order.py) and cuts a chunk at the end of its ring.

Two rotations, one pass over the keys. Every key is stored rotated at its token_index. A query is rotated
twice, at its token_index for window keys and at its cache position for sinks (the second copy of q that
design section 2 allows), and both copies meet all keys in one matrix product: grouped queries make that
product `2 * heads_per_kv_head` rows high, so the second copy costs no second read of K. The right score of
each place is picked before the softmax. The fused Attention layer is not used: it takes one query for all
keys, and every way to feed it (rotated copies of the sinks beside the window, doubled heads) copies K each
step. Softmax, rotation and the choice run in float32.

Matrices of 8 bits or fewer are [inputs, outputs]: TensorRT-RTX 1.7.1 turns those of [outputs, inputs] around
in a kernel of its own, at every pass, before their scaling goes into the product. 4-bit weights with a scale
for each block of inputs it unpacks inside the product only if both are constants; as inputs they would be
written out as 16 bits at every pass. So the matrices of int4 are in the graph and in the plan
(`holds_weights`), and each rank has a plan of its own. (Seen in the layers of plans it built.)

Visibility is worked out in the graph, once a step, from six small integers a row: for a batch of 256 at
capacity 2048 the mask would be half a million booleans to make on the host and to send.
"""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
from onnx import helper, numpy_helper

from engine_build import int4
from engine_build.engine_names import LEVELS, SCALES, Declared
from engine_build.onnx_writer import Dimension, GraphWriter
from engine_build.plan_inputs import (
    ANGLES,
    NUM_ROW_FIELDS,
    PRESENT,
    QUERY_AGES,
    ROW_FIELDS,
    TOKEN_IDS,
    WRITE_PLACES,
    cache_names,
    num_places,
)
from engine_build.shard import rank_weights, shard_shape
from engine_build.spec import EngineSpec, KvDtype, SpecError, WeightFormat
from engine_build.weights import MergedWeight

Floats = npt.NDArray[np.float32]

TENSORRT = "tensorrt"
"""Domain of the one operator that ONNX lacks, DistCollective: TensorRT's parser goes by its name."""

COMPUTE_DTYPES: dict[KvDtype, type[np.generic]] = {
    "float32": np.float32,
    "float16": np.float16,
    "bfloat16": ml_dtypes.bfloat16,
}
"""Activations have the type of cached keys and values."""

_LEVEL_DTYPES: dict[WeightFormat, tuple[type[np.generic], float]] = {
    "int8": (np.int8, 127.0),
    "float8": (ml_dtypes.float8_e4m3fn, 448.0),
}
_QUANTISED = (*_LEVEL_DTYPES, "int4")
_TENSORRT_BLOCK = 64
_UNSEEN = -1e30


class TensorRtLowering:
    """Writes the decoder for TensorRT's parser.

    Inputs, besides `logit_rows` (indices into the batch, row after row):

        token_ids     int64 [batch, chunk]: as many tokens of each conversation
        angles        float32 [4, batch, chunk, rotary_dim / 2]: cosine and sine at token_index, then at
                      the cache position
        write_places  int64 [batch]: the place of each row's first token; the others follow it
        query_ages    int32 [chunk]: chunk - 1, ..., 1, 0
        row_fields    int32 [batch, 6]: sink_tokens; window_tokens; ring_tokens; the ring place of the
                      row's last token; the age of the oldest ring token that is there (-1: none); the
                      last token_index. An age counts back from the last token; indices and ages are
                      cut off at 2**30
        layers.N.keys, layers.N.values    [batch, kv_heads, places, head_dim], written in place: bind
                      `.present` of the same name to the same memory
        every weight by its name, matrices as [output, input], or as levels [input, output] and scales,
        but for those of int4, which are constants
    """

    def __init__(self, spec: EngineSpec, graph: GraphWriter) -> None:
        shape = shard_shape(spec.model, spec.tp_size)
        self._spec = spec
        self._shape = shape
        self._graph = graph
        self._heads = shape.num_heads
        self._kv_heads = shape.num_kv_heads
        self._dtype = COMPUTE_DTYPES[spec.kv_dtype]
        self._element = helper.np_dtype_to_tensor_dtype(np.dtype(self._dtype))
        self._float32 = helper.np_dtype_to_tensor_dtype(np.dtype(np.float32))
        weights = rank_weights(spec.model, 0, spec.tp_size)
        self._sizes = {weight.name: weight.shape for weight in weights}
        self._places = num_places(spec)
        self._constants: dict[tuple[str, bytes], str] = {}

    def token_ids(self) -> str:
        """See `Lowering.token_ids`."""
        half = self._shape.rope.rotary_dim // 2
        tokens = self._graph.input(TOKEN_IDS, np.int64, ["batch", "chunk"])
        self._graph.input(ANGLES, np.float32, [4, "batch", "chunk", half])
        self._graph.input(WRITE_PLACES, np.int64, ["batch"])
        self._graph.input(QUERY_AGES, np.int32, ["chunk"])
        self._graph.input(ROW_FIELDS, np.int32, ["batch", NUM_ROW_FIELDS])
        batch_chunk = self._node("Shape", tokens)
        self._split_shape = self._joined(batch_chunk, [-1, self._shape.head_dim])
        self._merge_shape = self._ints([-1, self._heads * self._shape.head_dim])
        self._angles = [self._node("Gather", ANGLES, self._int(n)) for n in range(4)]
        self._is_sink, self._unseen = self._visibility()
        return self._node("Reshape", tokens, self._ints([-1]))

    def store(self, weight: MergedWeight, values: Floats) -> dict[str, Any]:
        """See `Lowering.store`."""
        if not self._is_quantised(weight.name):
            return {weight.name: values.astype(self._dtype)}
        if self._spec.weight_format == "int4":
            pairs, block_scales = int4.to_pairs(*int4.quantise(values, self._dtype))
            return {weight.name + LEVELS: pairs, weight.name + SCALES: block_scales}
        level_dtype, largest = _LEVEL_DTYPES[self._spec.weight_format]
        scales = np.abs(values).max(axis=1) / np.float32(largest)
        scales = np.where(scales > 0, scales, 1).astype(self._dtype)
        levels = values / scales.astype(np.float32)[:, None]
        if level_dtype is np.int8:
            levels = np.rint(levels)
        levels = np.ascontiguousarray(levels.T).clip(-largest, largest).astype(level_dtype)
        return {weight.name + LEVELS: levels, weight.name + SCALES: scales}

    def embedding(self, name: str, token_ids: str) -> str:
        """See `Lowering.embedding`."""
        return self._node("Gather", self._weight(name), token_ids)

    def linear(self, x: str, name: str, bias: str | None = None) -> str:
        """See `Lowering.linear`."""
        extra = [] if bias is None else [self._weight(bias)]
        by_output = int(not self._is_quantised(name))
        return self._graph.node("Gemm", [x, self._matrix(name), *extra], transB=by_output)

    def logits(self, x: str, name: str) -> str:
        """See `Lowering.logits`."""
        return self._as_float32(self.linear(x, name))

    def all_reduce(self, x: str) -> str:
        """See `Lowering.all_reduce`: NCCL, through the communicator that the runtime gives its contexts."""
        if self._spec.tp_size == 1:
            return x
        return self._graph.node(
            "DistCollective",
            [x],
            TENSORRT,
            collective_operation="all_reduce",
            reduce_op="sum",
            root=-1,
            group_size=0,  # all ranks
        )

    def norm(self, x: str, name: str) -> str:
        """See `Lowering.norm`."""
        epsilon = self._shape.rms_norm_eps
        return self._graph.node(
            "RMSNormalization", [x, self._weight(name)], axis=-1, epsilon=epsilon
        )

    def add_norm(self, x: str, delta: str, name: str) -> tuple[str, str]:
        """See `Lowering.add_norm`."""
        total = self._node("Add", x, delta)
        return total, self.norm(total, name)

    def attention(self, layer: int, qkv: str, norms: tuple[str, str] | None) -> str:
        """See `Lowering.attention`."""
        heads, kv = self._heads, self._kv_heads
        split = self._node("Reshape", qkv, self._split_shape)
        q, k, v = self._graph.nodes("Split", [split, self._ints([heads, kv, kv])], 3, axis=2)
        if norms is not None:
            q, k = self.norm(q, norms[0]), self.norm(k, norms[1])
        q, k, v = (self._graph.node("Transpose", [x], perm=[0, 2, 1, 3]) for x in (q, k, v))
        q = self._as_float32(q)
        window_q, sink_q = self._rotated(q, 0), self._rotated(q, 2)
        key_name, value_name = cache_names(layer)
        keys = self._cached(key_name, self._as_dtype(self._rotated(self._as_float32(k), 0)))
        values = self._cached(value_name, v)
        return self._attended(window_q, sink_q, keys, values)

    def gated(self, gate_up: str) -> str:
        """See `Lowering.gated`."""
        gate, up = self._graph.nodes("Split", [gate_up], 2, axis=-1, num_outputs=2)
        silu = self._node("Mul", gate, self._node("Sigmoid", gate))
        return self._node("Mul", silu, up)

    def _attended(self, window_q: str, sink_q: str, keys: str, values: str) -> str:
        """Both queries against all keys in one product, the right score of each place, softmax."""
        dim, kv = self._shape.head_dim, self._kv_heads
        by_group = self._ints([0, kv, -1, dim])
        queries = [self._node("Reshape", q, by_group) for q in (window_q, sink_q)]
        both = self._as_dtype(self._graph.node("Concat", queries, axis=2))
        transposed = self._graph.node("Transpose", [keys], perm=[0, 1, 3, 2])
        scores = self._as_float32(self._node("MatMul", both, transposed))
        window, sink = self._graph.nodes("Split", [scores], 2, axis=2, num_outputs=2)
        group = self._heads // kv
        by_query = self._ints([0, kv, group, -1, self._places])
        window, sink = (self._node("Reshape", part, by_query) for part in (window, sink))
        picked = self._node("Where", self._is_sink, sink, window)
        masked = self._node("Add", picked, self._unseen)
        shares = self._as_dtype(self._graph.node("Softmax", [masked], axis=-1))
        shares = self._node("Reshape", shares, self._ints([0, kv, -1, self._places]))
        mixed = self._node("MatMul", shares, values)
        by_head = self._node("Reshape", mixed, self._ints([0, self._heads, -1, dim]))
        merged = self._graph.node("Transpose", [by_head], perm=[0, 2, 1, 3])
        return self._node("Reshape", merged, self._merge_shape)

    def _visibility(self) -> tuple[str, str]:
        """Which places are sinks, bool [batch, 1, 1, 1, places]; and what hides the unseen ones.

        The latter is float32 [batch, 1, 1, chunk, places], to be added to scores: finite, so that a row
        without a token in this step comes to no harm.
        """
        sizes = self._ints([1] * NUM_ROW_FIELDS)
        columns = self._graph.nodes("Split", [ROW_FIELDS, sizes], NUM_ROW_FIELDS, axis=1)
        sinks, window, ring, newest, oldest_age, last = columns  # each [batch, 1]
        places = self._constant(np.arange(self._places, dtype=np.int32))
        zero = self._constant(np.array(0, np.int32))
        is_sink = self._node("Less", places, sinks)  # [batch, places]
        ring_place = self._node("Sub", places, sinks)
        in_ring = self._node(
            "And",
            self._node("GreaterOrEqual", ring_place, zero),
            self._node("Less", ring_place, ring),
        )
        ahead = self._node("Sub", newest, ring_place)
        age = self._node(
            "Where", self._node("Less", ahead, zero), self._node("Add", ahead, ring), ahead
        )
        stored = self._node("And", in_ring, self._node("LessOrEqual", age, oldest_age))
        by_query = self._ints([1])
        stored, age, seen_sink, window, last = (
            self._node("Unsqueeze", x, by_query) for x in (stored, age, is_sink, window, last)
        )
        query_age = self._node("Unsqueeze", QUERY_AGES, by_query)  # [chunk, 1]
        in_window = self._node(
            "And",
            self._node("GreaterOrEqual", age, query_age),
            self._node("Less", self._node("Sub", age, query_age), window),
        )
        query = self._node("Sub", last, query_age)  # [batch, chunk, 1]
        visible = self._node(
            "Or",
            self._node("And", stored, in_window),
            self._node("And", seen_sink, self._node("LessOrEqual", places, query)),
        )
        hidden = self._node(
            "Where",
            visible,
            self._constant(np.array(0, np.float32)),
            self._constant(np.array(_UNSEEN, np.float32)),
        )
        sink_place = self._node("Unsqueeze", is_sink, self._ints([1, 2, 3]))
        return sink_place, self._node("Unsqueeze", hidden, self._ints([1, 2]))

    def _cached(self, name: str, update: str) -> str:
        """Write [batch, kv_heads, chunk, head_dim] into the cache `name`; all of it, in place."""
        shape: list[Dimension] = ["batch", self._kv_heads, self._places, self._shape.head_dim]
        self._graph.input(name, self._dtype, shape)
        (present,) = self._graph.nodes(
            "TensorScatter",
            [name, update, WRITE_PLACES],
            1,
            axis=-2,
            mode="linear",
            output_names=[name + PRESENT],
        )
        self._graph.output(present, self._dtype, shape)
        return present

    def _rotated(self, x: str, first: int) -> str:
        """float32 [batch, heads, chunk, head_dim] turned by cosine `first` and the sine after it."""
        rotary_dim = self._shape.rope.rotary_dim
        whole = rotary_dim == self._shape.head_dim
        inputs = [x, self._angles[first], self._angles[first + 1]]
        return self._graph.node(
            "RotaryEmbedding", inputs, rotary_embedding_dim=0 if whole else rotary_dim
        )

    def _is_quantised(self, name: str) -> bool:
        """Matrices of the layers; what a token is read from and chosen by keeps 16 bits."""
        matrix = len(self._sizes[name]) == 2
        return matrix and name.startswith("layers.") and self._spec.weight_format in _QUANTISED

    def _matrix(self, name: str) -> str:
        if not self._is_quantised(name):
            return self._weight(name)
        outputs, inputs = self._sizes[name]
        if self._spec.weight_format == "int4":
            return self._packed(name, outputs, inputs)
        level_dtype, _ = _LEVEL_DTYPES[self._spec.weight_format]
        levels = self._graph.weight(name + LEVELS, level_dtype, (inputs, outputs))
        scales = self._graph.weight(name + SCALES, self._dtype, (outputs,))
        return self._graph.node("DequantizeLinear", [levels, scales], axis=1)

    def _packed(self, name: str, outputs: int, inputs: int) -> str:
        """A constant matrix of 4-bit levels, [inputs, outputs]."""
        group = int4.group_of(inputs)
        if self._spec.target == "tensorrt" and group < _TENSORRT_BLOCK:
            raise SpecError(
                "weight_format",
                f"TensorRT wants blocks of 64 or 128 inputs, and a matrix has {inputs} on each rank",
                "Use another format or fewer ranks",
            )
        pairs = Declared(np.dtype(np.uint8), (inputs, outputs // 2))
        levels = self._graph.constant(name + LEVELS, pairs, ml_dtypes.int4, (inputs, outputs))
        shape = (inputs // group, outputs)
        stored = Declared(np.dtype(self._dtype), shape)
        scales = self._graph.constant(name + SCALES, stored, self._dtype, shape)
        return self._graph.node("DequantizeLinear", [levels, scales], axis=0, block_size=group)

    def _weight(self, name: str) -> str:
        return self._graph.weight(name, self._dtype, self._sizes[name])

    def _as_float32(self, x: str) -> str:
        exact = self._dtype is np.float32
        return x if exact else self._graph.node("Cast", [x], to=self._float32)

    def _as_dtype(self, x: str) -> str:
        exact = self._dtype is np.float32
        return x if exact else self._graph.node("Cast", [x], to=self._element)

    def _joined(self, dimensions: str, more: list[int]) -> str:
        return self._graph.node("Concat", [dimensions, self._ints(more)], axis=0)

    def _node(self, op: str, *inputs: str) -> str:
        return self._graph.node(op, inputs)

    def _int(self, value: int) -> str:
        return self._constant(np.array(value, np.int64))

    def _ints(self, values: list[int]) -> str:
        return self._constant(np.array(values, np.int64))

    def _constant(self, values: npt.NDArray[Any]) -> str:
        """One node for each value, however often it is used."""
        key = (f"{values.dtype} {values.shape}", values.tobytes())
        if key not in self._constants:
            value = numpy_helper.from_array(values)
            self._constants[key] = self._graph.node("Constant", [], value=value)
        return self._constants[key]
