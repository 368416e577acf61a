"""The decoder, defined once, and its export as graph.onnx over weights.safetensors.

    token_ids -> embed -> layers x (norm, qkv, attention, output, norm, gated MLP) -> norm -> head

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
from engine_build.lowering_cuda import write_cuda_weights
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
        """float32 [tokens, hidden]."""
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

    def attention(self, layer: int, qkv: str, norms: tuple[str, str] | None) -> str:
        """Norm q and k per head where `norms` names weights for it, rotate, cache, attend.

        `qkv` is [tokens, (heads + 2 * kv_heads) * head_dim], the result [tokens, heads * head_dim].
        Scores need no scale: q has it.
        """
        ...

    def gated(self, gate_up: str) -> str:
        """SwiGLU: the first half of [tokens, 2 * inner], through SiLU, times the second."""
        ...


def define_decoder(shape: ModelShape, graph: GraphWriter, lowering: Lowering) -> None:
    """Write the decoder into `graph`.

    Inputs here: `token_ids` int64 [tokens], the tokens of all conversations of a step, one after
    another; `logit_rows` int64 [n], which of them want logits. Output: `logits` float32 [n, vocab].
    The lowering adds its own.
    """
    token_ids = graph.input(TOKEN_IDS, np.int64, ["tokens"])
    logit_rows = graph.input(LOGIT_ROWS, np.int64, ["n"])
    x = lowering.embedding("embed", token_ids)
    delta: str | None = None
    for layer in range(shape.num_layers):
        name = f"layers.{layer}."
        if delta is None:
            normed = lowering.norm(x, name + "input_norm")
        else:
            x, normed = lowering.add_norm(x, delta, name + "input_norm")
        qkv = lowering.linear(normed, name + "qkv", name + "qkv.bias" if shape.qkv_bias else None)
        norms = (name + "q_norm", name + "k_norm") if shape.qk_norm else None
        attended = lowering.attention(layer, qkv, norms)
        bias = name + "output.bias" if shape.output_bias else None
        delta = lowering.linear(attended, name + "output", bias)
        x, normed = lowering.add_norm(x, delta, name + "mlp_norm")
        gate_up = lowering.linear(normed, name + "gate_up")
        delta = lowering.linear(lowering.gated(gate_up), name + "down")
    x = x if delta is None else graph.node("Add", [x, delta])
    wanted = graph.node("Gather", [x, logit_rows])
    normed = lowering.norm(wanted, "norm")
    logits = lowering.linear(normed, "embed" if shape.tied_head else "head")
    graph.node("Identity", [logits], output_names=[LOGITS])
    graph.output(LOGITS, np.float32, ["n", shape.vocab_size])


def export_graph(
    spec: EngineSpec, tensors: Tensors, out_dir: Path, progress: Callable[[float], None]
) -> None:
    """Write `weights.safetensors` and, unless the engine brings its own, `graph.onnx` into `out_dir`.

    `tensors` are float32 under Hugging Face names. Each weight is read, converted and written before
    the next is read. `progress` is called with the fraction done. Raises SpecError for a target that
    this release has no lowering for.
    """
    if spec.target == "cuda":
        write_cuda_weights(spec, tensors, out_dir / WEIGHTS_FILE, progress)
        return
    if spec.target != "cpu":
        raise SpecError("target", f"{spec.target!r} has no lowering", "Use cpu")
    graph = GraphWriter()
    lowering = CpuLowering(spec, graph)
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
