"""Tensor-parallel TensorRT graphs: all ranks of a group as one graph, each collective a sum, on ONNX Runtime.

That shows what a group computes where nothing can run NCCL; the plan of a rank is really built.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import compose, helper

from engine.rotary import Rotary
from engine.tensorrt_inputs import cut_row, prefill_inputs
from engine_build.engine_names import GRAPH_FILE, LOGITS, WEIGHTS_FILE
from engine_build.graph import export_graph
from engine_build.plan import PLAN_FILE, build_plan
from engine_build.plan_inputs import cache_names
from engine_build.plan_profiles import Size, input_shapes
from engine_build.shard import rank_folder
from engine_build.spec import EngineSpec, WeightFormat, kv_dtype_for
from engine_build.weights import read_weight_file
from tests.engine_fixtures import cached_tensors, random_tokens, row_for, tiny_shape, window_of
from tests.reference import ReferenceDecoder, Rule

STEP = ("token_ids", "angles", "write_places", "query_ages", "row_fields", "logit_rows")


def spec_of(family: str, tp_size: int, weight_format: WeightFormat = "float32") -> EngineSpec:
    kv_dtype = kv_dtype_for(weight_format)
    shape = tiny_shape(family)
    return EngineSpec(shape, 32, 12, weight_format, kv_dtype, "tensorrt-rtx", tp_size)


def exported(spec: EngineSpec, folder: Path, family: str) -> list[Path]:
    export_graph(spec, cached_tensors(family), folder, lambda fraction: None)
    return [rank_folder(folder, rank, spec.tp_size) for rank in range(spec.tp_size)]


def whole_group(folders: list[Path]) -> onnx.ModelProto:
    """One graph of all ranks; number n of the collectives of every rank becomes the sum of them all."""
    ranks = [
        compose.add_prefix(onnx.load(folder / GRAPH_FILE), f"{rank}/")
        for rank, folder in enumerate(folders)
    ]
    nodes, results = [], []
    waiting = [list(model.graph.node) for model in ranks]
    while any(waiting):
        collectives = []
        for own in waiting:
            while own and own[0].op_type != "DistCollective":
                nodes.append(own.pop(0))
            collectives += own[:1]
            del own[:1]
        for number, node in enumerate(collectives):
            inputs = [one.input[0] for one in collectives]
            nodes.append(helper.make_node("Sum", inputs, node.output, name=f"{number}{node.name}"))
    for model in ranks:
        results += list(model.graph.output)
    inputs = [value for model in ranks for value in model.graph.input]
    graph = helper.make_graph(nodes, "group", inputs, results)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 24)], ir_version=11)


@pytest.mark.parametrize(
    ("family", "tp_size"),
    [("llama", 2), ("llama", 4), ("llama-mha-tied", 4), ("llama-bias", 2), ("qwen3", 2)],
)
def test_a_group_equals_the_oracle(family: str, tp_size: int, tmp_path: Path) -> None:
    spec = spec_of(family, tp_size)
    folders = exported(spec, tmp_path, family)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(
        whole_group(folders).SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    feeds = {
        f"{rank}/{name}": values
        for rank, folder in enumerate(folders)
        for name, values in read_weight_file(folder / WEIGHTS_FILE).items()
    }
    names = [name for layer in range(spec.model.num_layers) for name in cache_names(layer)]
    shape = input_shapes(spec, Size(1, 1, 1))[names[0]]
    caches = [f"{rank}/{name}" for rank in range(tp_size) for name in names]
    feeds |= {name: np.zeros(shape, np.float32) for name in caches}
    tokens, window = random_tokens(7, 96), window_of(spec, 4)
    rotary, parts = Rotary(spec.model.rope), []
    for begin in range(0, len(tokens), 12):
        row = row_for(window, start=begin)
        row = type(row)(0, begin, tokens[begin : begin + 12], window)
        for piece in cut_row(0, row):
            inputs = prefill_inputs(row, piece, True, rotary)
            step = {f"{r}/{name}": getattr(inputs, name) for r in range(tp_size) for name in STEP}
            wanted = [*(f"{r}/{LOGITS}" for r in range(tp_size)), *(n + ".present" for n in caches)]
            results = session.run(wanted, {**feeds, **step})
            parts.append(np.concatenate(results[:tp_size], axis=1))
            feeds.update(zip(caches, results[tp_size:], strict=True))
    oracle = ReferenceDecoder(tiny_shape(family), cached_tensors(family), Rule(4, 28))
    assert np.abs(np.concatenate(parts) - oracle.push_all(0, tokens)).max() < 1e-4


def test_a_layer_has_two_collectives_and_ranks_one_graph(tmp_path: Path) -> None:
    folders = exported(spec_of("llama", 2), tmp_path, "llama")
    graphs = [(folder / GRAPH_FILE).read_bytes() for folder in folders]
    assert graphs[0] == graphs[1]
    kinds = [node.op_type for node in onnx.load(folders[0] / GRAPH_FILE).graph.node]
    assert kinds.count("DistCollective") == 2 * tiny_shape("llama").num_layers


@pytest.mark.parametrize("weight_format", ["bfloat16", "int8"])
def test_a_ranks_plan_is_built_with_its_collectives(
    weight_format: WeightFormat, tmp_path: Path
) -> None:
    pytest.importorskip("tensorrt_rtx")
    spec = spec_of("llama", 2, weight_format)
    folders = exported(spec, tmp_path, "llama")
    build_plan(spec, folders[1] / GRAPH_FILE, tmp_path / PLAN_FILE, lambda fraction: None)
    assert (tmp_path / PLAN_FILE).stat().st_size > 100_000
