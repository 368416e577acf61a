"""Loads a compiled library into ONNX Runtime and compares two operators with NumPy.

    python -m engine.kernels.self_check LIBRARY

A process of its own, because a library for another interface does not raise, it crashes.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
from onnx import TensorProto, helper

from engine_build.onnx_writer import SINKSERVE
from engine_build.quantize import quantise

Array = npt.NDArray[Any]
LARGEST = 127


def check(library: Path) -> None:
    """Raises RuntimeError when SwiGLU or BlockLinear is not what NumPy says."""
    rng = np.random.default_rng(0)
    given = rng.standard_normal((3, 80)).astype(np.float32) * 4
    gate, up = given[:, :40], given[:, 40:]
    got = _run(library, "SwiGLU", [given])
    if not np.allclose(got, gate / (1 + np.exp(-gate)) * up, rtol=1e-5, atol=1e-6):
        raise RuntimeError("SwiGLU of this library is wrong")
    # Fourteen tokens: whole groups of eight or of four, and what is left of them.
    x, weights = whole_numbers(rng, 14, 192), whole_numbers(rng, 40, 192)
    got = _run(library, "BlockLinear", [x, *quantise(weights)], width_in=192, width_out=40)
    if not np.array_equal(got, x @ weights.T):
        raise RuntimeError("BlockLinear of this library is wrong")


def whole_numbers(rng: np.random.Generator, rows: int, width: int) -> npt.NDArray[np.float32]:
    """float32 [rows, width] that 8 bits hold exactly, row 0 all 127, row 1 all -127.

    Every 32 of a row have a 127 or -127 among them, so that the scale is 1. Products of two such, summed
    over a width up to 1040, are exact in float32 in any order.
    """
    numbers = rng.integers(-LARGEST, LARGEST, (rows, width), endpoint=True)
    numbers[:, ::32] = rng.choice((-LARGEST, LARGEST), numbers[:, ::32].shape)
    numbers[:2] = np.array([[LARGEST], [-LARGEST]])[:rows]
    return numbers.astype(np.float32)


def _run(library: Path, op: str, inputs: list[Array], **attributes: Any) -> Array:
    """The one output of one node of our own."""
    names = [f"in{n}" for n in range(len(inputs))]
    values = [
        helper.make_tensor_value_info(
            name, helper.np_dtype_to_tensor_dtype(array.dtype), array.shape
        )
        for name, array in zip(names, inputs, strict=True)
    ]
    result = helper.make_tensor_value_info("out", TensorProto.FLOAT, None)
    node = helper.make_node(op, names, ["out"], domain=SINKSERVE, **attributes)
    opsets = [helper.make_opsetid("", 24), helper.make_opsetid(SINKSERVE, 1)]
    graph = helper.make_graph([node], "check", values, [result])
    model = helper.make_model(graph, opset_imports=opsets, ir_version=11)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.register_custom_ops_library(str(library))
    loaded = onnxruntime.InferenceSession(
        onnx.ModelProto.SerializeToString(model), options, providers=["CPUExecutionProvider"]
    )
    got: Array = loaded.run(None, dict(zip(names, inputs, strict=True)))[0]
    return got


if __name__ == "__main__":
    check(Path(sys.argv[1]))
