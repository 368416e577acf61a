"""Loads a compiled library into ONNX Runtime and compares one result with NumPy's.

    python -m engine.kernels.self_check LIBRARY

A process of its own, because a library for another interface does not raise, it crashes.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper

from engine_build.onnx_writer import SINKSERVE


def check(library: Path) -> None:
    """Raises RuntimeError when SwiGLU of [3, 2 * 40] is not what NumPy says."""
    values = helper.make_tensor_value_info("in", TensorProto.FLOAT, ["tokens", 80])
    result = helper.make_tensor_value_info("out", TensorProto.FLOAT, ["tokens", 40])
    node = helper.make_node("SwiGLU", ["in"], ["out"], domain=SINKSERVE)
    opsets = [helper.make_opsetid("", 24), helper.make_opsetid(SINKSERVE, 1)]
    graph = helper.make_graph([node], "check", [values], [result])
    model = helper.make_model(graph, opset_imports=opsets, ir_version=11)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.register_custom_ops_library(str(library))
    loaded = onnxruntime.InferenceSession(
        onnx.ModelProto.SerializeToString(model), options, providers=["CPUExecutionProvider"]
    )
    given = np.random.default_rng(0).standard_normal((3, 80)).astype(np.float32) * 4
    gate, up = given[:, :40], given[:, 40:]
    (got,) = loaded.run(None, {"in": given})
    if not np.allclose(got, gate / (1 + np.exp(-gate)) * up, rtol=1e-5, atol=1e-6):
        raise RuntimeError("SwiGLU of this library is wrong")


if __name__ == "__main__":
    check(Path(sys.argv[1]))
