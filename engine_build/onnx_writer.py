"""Writes ONNX graphs: nodes, and weights that live in another file.

A weight is declared by name, type and shape; its bytes are found in a safetensors file when the model
is made, so graph and weights are never two copies of one thing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper

from engine_build.engine_names import Declared, StoredAt

MICROSOFT = "com.microsoft"
SINKSERVE = "sinkserve"
_OPSETS = (("", 24), (MICROSOFT, 1), (SINKSERVE, 1))
_IR_VERSION = 11

Dimension = int | str


@dataclass(slots=True)
class GraphWriter:
    """Collects a graph. Names of nodes and values are counted, so equal input gives equal output.

    `weights` are as the weights file has them. Those that must never be inputs are among `constants` too, as
    the graph has them: the same bytes under a type that the file's format lacks.
    """

    weights: dict[str, Declared] = field(default_factory=dict)
    constants: dict[str, Declared] = field(default_factory=dict)
    _nodes: list[onnx.NodeProto] = field(default_factory=list)
    _inputs: list[onnx.ValueInfoProto] = field(default_factory=list)
    _outputs: list[onnx.ValueInfoProto] = field(default_factory=list)

    def input(self, name: str, dtype: type[np.generic], shape: Sequence[Dimension]) -> str:
        """Declare a graph input."""
        self._inputs.append(_value(name, dtype, shape))
        return name

    def output(self, name: str, dtype: type[np.generic], shape: Sequence[Dimension]) -> None:
        """Declare that the value `name` is a graph output."""
        self._outputs.append(_value(name, dtype, shape))

    def weight(self, name: str, dtype: type[np.generic], shape: tuple[int, ...]) -> str:
        """Declare a weight of the weights file; declaring it again is no error."""
        self.weights.setdefault(name, Declared(np.dtype(dtype), shape))
        return name

    def constant(self, name: str, stored: Declared, dtype: Any, shape: tuple[int, ...]) -> str:
        """Declare a weight that is never an input: `stored` in the file, `dtype` and `shape` here."""
        self.weights.setdefault(name, stored)
        self.constants.setdefault(name, Declared(np.dtype(dtype), shape))
        return name

    def node(self, op: str, inputs: Sequence[str], domain: str = "", **attributes: Any) -> str:
        """Add a node with one output and return its name. `output` sets that name."""
        (name,) = self.nodes(op, inputs, 1, domain, **attributes)
        return name

    def nodes(
        self, op: str, inputs: Sequence[str], outputs: int, domain: str = "", **attributes: Any
    ) -> list[str]:
        """Add a node with several outputs; names given as `output_names` replace counted ones."""
        label = f"{op}.{len(self._nodes)}"
        names = attributes.pop("output_names", None) or [f"{label}:{i}" for i in range(outputs)]
        node = helper.make_node(op, inputs, names, name=label, domain=domain, **attributes)
        self._nodes.append(node)
        return list(names)

    def model(self, name: str, file: str, stored: Mapping[str, StoredAt]) -> onnx.ModelProto:
        """The finished model, its weights at `stored` places of `file` (relative to the model)."""
        used = {value for node in self._nodes for value in node.input}
        weights = [
            _external(weight, declared, file, stored[weight])
            for weight, declared in self.weights.items()
            if weight in used
        ]
        return self._model(name, self._inputs, weights, _OPSETS)

    def model_of_inputs(
        self, name: str, file: str, stored: Mapping[str, StoredAt]
    ) -> onnx.ModelProto:
        """The finished model with every declared weight an input, after the others, but for `constants`, at
        `stored` places of `file`."""
        weights = [
            _value(weight, declared.dtype.type, declared.shape)
            for weight, declared in self.weights.items()
            if weight not in self.constants
        ]
        constants = [
            _external(weight, declared, file, stored[weight])
            for weight, declared in self.constants.items()
        ]
        domains = sorted({node.domain for node in self._nodes} - {""})
        opsets = [_OPSETS[0], *((domain, 1) for domain in domains)]
        return self._model(name, self._inputs + weights, constants, opsets)

    def _model(
        self,
        name: str,
        inputs: list[onnx.ValueInfoProto],
        weights: list[onnx.TensorProto],
        opsets: Sequence[tuple[str, int]],
    ) -> onnx.ModelProto:
        graph = helper.make_graph(self._nodes, name, inputs, self._outputs, weights)
        imports = [helper.make_opsetid(domain, version) for domain, version in opsets]
        return helper.make_model(
            graph, opset_imports=imports, ir_version=_IR_VERSION, producer_name="sinkserve"
        )


def _value(name: str, dtype: type[np.generic], shape: Sequence[Dimension]) -> onnx.ValueInfoProto:
    element = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    return helper.make_tensor_value_info(name, element, list(shape))


def _external(name: str, declared: Declared, file: str, at: StoredAt) -> onnx.TensorProto:
    tensor = TensorProto(
        name=name,
        data_type=helper.np_dtype_to_tensor_dtype(declared.dtype),
        dims=declared.shape,
        data_location=TensorProto.EXTERNAL,
    )
    entries = {"location": file, "offset": at.offset, "length": at.length}
    for key, value in entries.items():
        tensor.external_data.add(key=key, value=str(value))
    return tensor
