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

from engine_build.engine_names import GRAPH_FILE, LOGIT_ROWS, LOGITS, WEIGHTS_FILE
from engine_build.lowering_cpu import CpuLowering
from engine_build.lowering_cuda import CudaWeights
from engine_build.lowering_tensorrt import TensorRtLowering
from engine_build.onnx_writer import GraphWriter
from engine_build.plan_inputs import holds_weights
from engine_build.shard import (
    head_rows,
    rank_folder,
    shard_shape,
    shard_values,
    whole_weights,
)
from engine_build.spec import EngineSpec, SpecError
from engine_build.weights import MergedWeight, Tensors, WeightFileWriter


class Lowering(Protocol):
    """What a target decides. Values are names in the graph being written."""

    def token_ids(self) -> str:
        """Declare the input of token ids; int64 [tokens], all conversations one after another."""
        ...

    def store(self, weight: MergedWeight, values: npt.NDArray[np.float32]) -> dict[str, Any]:
        """The tensors, by name, that this target keeps of a weight."""
        ...

    def embedding(self, name: str, token_ids: str) -> str:
        """[tokens, hidden], of the type that activations have."""
        ...

    def linear(self, x: str, name: str, bias: str | None = None) -> str:
        """x times the transpose of the matrix `name`, plus the vector `bias`."""
        ...

    def logits(self, x: str, name: str) -> str:
        """`linear` without a bias, as float32."""
        ...

    def all_reduce(self, x: str) -> str:
        """The sum of `x` over all tensor-parallel ranks; `x` itself where there is one."""
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


def define_decoder(spec: EngineSpec, graph: GraphWriter, lowering: Lowering) -> None:
    """Write the decoder into `graph`.

    Input here: `logit_rows` int64 [n], which of the step's tokens want logits. Output: `logits` float32
    [n, vocab / tp_size], the part of the vocabulary that a rank has. The lowering adds its own.
    """
    shape = shard_shape(spec.model, spec.tp_size)
    token_ids = lowering.token_ids()
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
        delta = lowering.all_reduce(lowering.linear(attended, name + "output", bias))
        x, normed = lowering.add_norm(x, delta, name + "mlp_norm")
        gate_up = lowering.linear(normed, name + "gate_up")
        delta = lowering.all_reduce(lowering.linear(lowering.gated(gate_up), name + "down"))
    x = x if delta is None else graph.node("Add", [x, delta])
    wanted = graph.node("Gather", [x, logit_rows])
    normed = lowering.norm(wanted, "norm")
    logits = lowering.logits(normed, "embed" if shape.tied_head else "head")
    graph.node("Identity", [logits], output_names=[LOGITS])
    graph.output(LOGITS, np.float32, ["n", head_rows(spec.model, spec.tp_size)])


def export_graph(
    spec: EngineSpec, tensors: Tensors, out_dir: Path, progress: Callable[[float], None]
) -> None:
    """Write `weights.safetensors` and `graph.onnx` into the `rank_folder` of each rank in `out_dir`.
    An engine that brings its own decoder ("cuda") gets no graph.

    `tensors` are float32 under Hugging Face names. Each weight is read, cut, converted and written before
    the next is read. The graph is the same for all ranks. `progress` is called with the fraction done.
    Raises SpecError for a target that this release has no lowering for, or a `tp_size` that does not
    fit the model.
    """
    graph = GraphWriter()
    lowering: Lowering | CudaWeights
    if spec.target == "cuda":
        lowering = CudaWeights(spec)
        declared = lowering.declared
    else:
        lowering = _lowering(spec, graph)
        define_decoder(spec, graph, lowering)
        declared = graph.weights
    folders = [rank_folder(out_dir, rank, spec.tp_size) for rank in range(spec.tp_size)]
    for folder in folders:
        folder.mkdir(exist_ok=True)
    writers = [WeightFileWriter(folder / WEIGHTS_FILE, declared) for folder in folders]
    weights = whole_weights(spec.model, spec.tp_size)
    for done, weight in enumerate(weights):
        progress(done / len(weights))
        values = weight.load(tensors)
        for rank, writer in enumerate(writers):
            part = shard_values(weight, values, spec.model, rank, spec.tp_size)
            for name, stored in lowering.store(weight, part).items():
                writer.write(name, stored)
    for folder, writer in zip(folders, writers, strict=True):
        writer.close()
        if spec.target == "cuda":
            continue
        if spec.target == "cpu":
            model = graph.model("decoder", WEIGHTS_FILE, writer.stored)
        else:
            model = graph.model_of_inputs("decoder", WEIGHTS_FILE, writer.stored)
        onnx.save_model(model, folder / GRAPH_FILE)
    progress(1.0)


def graph_of_inputs(spec: EngineSpec) -> onnx.ModelProto:
    """The decoder for TensorRT with its weights as inputs: of a shape alone, no checkpoint is needed.

    Raises SpecError for a format whose weights are constants of the graph.
    """
    if holds_weights(spec):
        raise SpecError(
            "weight_format",
            f"a graph for {spec.weight_format} holds the weights themselves",
            "Build a checkpoint, or take another format",
        )
    graph = GraphWriter()
    define_decoder(spec, graph, _lowering(spec, graph))
    return graph.model_of_inputs("decoder", "", {})


def _lowering(spec: EngineSpec, graph: GraphWriter) -> Lowering:
    if spec.target == "cpu":
        return CpuLowering(spec, graph)
    if spec.target in ("tensorrt", "tensorrt-rtx"):
        return TensorRtLowering(spec, graph)
    raise SpecError("target", f"{spec.target!r} has no graph", "Use cpu or tensorrt")
