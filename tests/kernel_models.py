"""One-operator graphs over the compiled kernels, and how to run them."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime
from onnx import ModelProto, TensorProto, helper

from engine.kernels.compile import kernel_library
from engine_build.files import sinkserve_home
from engine_build.onnx_writer import SINKSERVE

Array = npt.NDArray[Any]


class Kernel:
    """One node of our own operators. Called with its inputs by position, returns its outputs.

    Inputs are bound where they lie, so an operator that writes into one is seen to.
    """

    def __init__(
        self, op: str, inputs: list[Array], *, outputs: int = 1, threads: int = 1, **attributes: Any
    ) -> None:
        names = [f"in{n}" for n in range(len(inputs))]
        self._outputs = [f"out{n}" for n in range(outputs)]
        values = [
            helper.make_tensor_value_info(
                name, helper.np_dtype_to_tensor_dtype(array.dtype), [None] * array.ndim
            )
            for name, array in zip(names, inputs, strict=True)
        ]
        results = [
            helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in self._outputs
        ]
        node = helper.make_node(op, names, self._outputs, domain=SINKSERVE, **attributes)
        opsets = [helper.make_opsetid("", 24), helper.make_opsetid(SINKSERVE, 1)]
        graph = helper.make_graph([node], op, values, results)
        model = helper.make_model(graph, opset_imports=opsets, ir_version=11)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.register_custom_ops_library(str(kernel_library(sinkserve_home())))
        self._loaded = onnxruntime.InferenceSession(
            ModelProto.SerializeToString(model), options, providers=["CPUExecutionProvider"]
        )

    def __call__(self, *inputs: Array) -> list[Array]:
        binding = self._loaded.io_binding()
        for number, array in enumerate(inputs):
            assert array.flags.c_contiguous
            binding.bind_input(
                f"in{number}", "cpu", 0, array.dtype.type, array.shape, array.ctypes.data
            )
        for name in self._outputs:
            binding.bind_output(name, "cpu")
        self._loaded.run_with_iobinding(binding)
        return [np.asarray(array) for array in binding.copy_outputs_to_cpu()]


def run_kernel(op: str, inputs: list[Array], **options: Any) -> list[Array]:
    """Make the node and run it once."""
    return Kernel(op, inputs, **options)(*inputs)
