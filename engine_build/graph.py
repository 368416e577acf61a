"""The decoder, defined once, and its export as graph.onnx over weights.safetensors.

    token_ids -> embed -> layers x (norm, qkv, heads, attention, output, norm, gated MLP) -> norm -> head

What differs between targets (number format of the linear layers, how attention reaches the cache) is
behind `Lowering`; the definition below is the same for all.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import onnx

from engine_build.lowering_cpu import CpuLowering
from engine_build.onnx_writer import GraphWriter
from engine_build.spec import EngineSpec, ModelShape, SpecError
from engine_build.weights import MergedWeight, Tensors, WeightFileWriter, merged_weights

GRAPH_FILE = "graph.onnx"
WEIGHTS_FILE = "weights.safetensors"

TOKEN_IDS = "token_ids"
LOGIT_ROWS = "logit_rows"
LOGITS = "logits"


class Lowering(Protocol):
    """What a target decides. Values are names in the graph being written."""

    def store(self, weight: MergedWeight, values: npt.NDArray[np.float32]) -> dict[str, Any]:
        """The tensors, by name, that this target keeps of a weight."""
        ...

    def embedding(self, name: str, token_ids: str) -> str:
        """float32 [rows, chunk, hidden]."""
        ...

    def linear(self, x: str, name: str, bias: str | None = None) -> str:
        """x times the transpose of the matrix `name`, plus the vector `bias`."""
        ...

    def norm(self, x: str, name: str) -> str:
        """RMS norm over the last axis."""
        ...

    def add_norm(self, x: str, delta: str, name: str) -> tuple[str, str]:
        """`x + delta`, and its norm."""
        ...

    def attention(self, layer: int, q: str, k: str, v: str) -> str:
        """Rotate, reach the cache, attend: q [rows, heads, chunk, head_dim], k and v [rows, kv_heads,
        chunk, head_dim], result [rows, chunk, heads * head_dim]. Scores need no scale: q has it."""
        ...


def define_decoder(shape: ModelShape, graph: GraphWriter, lowering: Lowering) -> None:
    """Write the decoder into `graph`.

    Inputs here: `token_ids` int64 [rows, chunk]; `logit_rows` int64 [n], which of the rows * chunk
    tokens want logits. Output: `logits` float32 [n, vocab]. The lowering adds its own.
    """
    token_ids = graph.input(TOKEN_IDS, np.int64, ["rows", "chunk"])
    logit_rows = graph.input(LOGIT_ROWS, np.int64, ["n"])
    x = lowering.embedding("embed", token_ids)
    delta: str | None = None
    for layer in range(shape.num_layers):
        name = f"layers.{layer}."
        if delta is None:
            normed = lowering.norm(x, name + "input_norm")
        else:
            x, normed = lowering.add_norm(x, delta, name + "input_norm")
        q, k, v = _heads(shape, graph, lowering, normed, name)
        attended = lowering.attention(layer, q, k, v)
        bias = name + "output.bias" if shape.output_bias else None
        delta = lowering.linear(attended, name + "output", bias)
        x, normed = lowering.add_norm(x, delta, name + "mlp_norm")
        delta = _gated_mlp(graph, lowering, normed, name)
    x = x if delta is None else graph.node("Add", [x, delta])
    tokens = graph.node("Reshape", [x, graph.constant([-1, shape.hidden_size])])
    wanted = graph.node("Gather", [tokens, logit_rows])
    normed = lowering.norm(wanted, "norm")
    logits = lowering.linear(normed, "embed" if shape.tied_head else "head")
    graph.node("Identity", [logits], output_names=[LOGITS])
    graph.output(LOGITS, np.float32, ["n", shape.vocab_size])


def _heads(
    shape: ModelShape, graph: GraphWriter, lowering: Lowering, normed: str, name: str
) -> tuple[str, str, str]:
    """q, k and v as [rows, heads, chunk, head_dim], normed per head where the model does that."""
    bias = name + "qkv.bias" if shape.qkv_bias else None
    qkv = lowering.linear(normed, name + "qkv", bias)
    num_all = shape.num_heads + 2 * shape.num_kv_heads
    split = graph.node("Reshape", [qkv, graph.constant([0, 0, num_all, shape.head_dim])])
    heads = graph.node("Transpose", [split], perm=[0, 2, 1, 3])
    sizes = graph.constant([shape.num_heads, shape.num_kv_heads, shape.num_kv_heads])
    q, k, v = graph.nodes("Split", [heads, sizes], 3, axis=1)
    if shape.qk_norm:
        q, k = lowering.norm(q, name + "q_norm"), lowering.norm(k, name + "k_norm")
    return q, k, v


def _gated_mlp(graph: GraphWriter, lowering: Lowering, normed: str, name: str) -> str:
    gate_up = lowering.linear(normed, name + "gate_up")
    gate, up = graph.nodes("Split", [gate_up], 2, axis=-1, num_outputs=2)
    silu = graph.node("Mul", [gate, graph.node("Sigmoid", [gate])])
    return lowering.linear(graph.node("Mul", [silu, up]), name + "down")


def export_graph(
    spec: EngineSpec, tensors: Tensors, out_dir: Path, progress: Callable[[float], None]
) -> None:
    """Write `weights.safetensors` and `graph.onnx` into `out_dir`.

    `tensors` are float32 under Hugging Face names. Each weight is read, converted and written before
    the next is read. `progress` is called with the fraction done. Raises SpecError for a target that
    this release has no lowering for.
    """
    if spec.target != "cpu":
        raise SpecError("target", f"{spec.target!r} has no lowering", "Use cpu")
    graph = GraphWriter()
    lowering = CpuLowering(spec.model, spec.weight_format, graph)
    define_decoder(spec.model, graph, lowering)
    writer = WeightFileWriter(out_dir / WEIGHTS_FILE, graph.weights)
    weights = merged_weights(spec.model)
    for done, weight in enumerate(weights):
        progress(done / len(weights))
        for name, values in lowering.store(weight, weight.load(tensors)).items():
            writer.write(name, values)
    writer.close()
    onnx.save_model(graph.model("decoder", WEIGHTS_FILE, writer.stored), out_dir / GRAPH_FILE)
    progress(1.0)
