"""One prepared run of the CPU graph: its buffers, bound by address once and reused every step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime

from engine_build import lowering_cpu as names
from engine_build.graph import LOGIT_ROWS, LOGITS, TOKEN_IDS
from engine_build.spec import ModelShape

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class RunShape:
    """What a binding depends on: physical rows first_row .. + rows - 1, `chunk` tokens each."""

    first_row: int
    rows: int
    chunk: int
    num_sink_places: int
    num_logits: int


class GraphRun:
    """Inputs to fill (`token_ids`, `logit_rows`, angles, `is_sink`, `bias`), then `execute`, then read
    `new` float32 [layers, 2, rows, kv_heads, chunk, head_dim] and `logits` float32 [n, vocab].
    """

    def __init__(
        self,
        session: onnxruntime.InferenceSession,
        model: ModelShape,
        caches: Floats,
        shape: RunShape,
    ) -> None:
        rows, chunk, sinks = shape.rows, shape.chunk, shape.num_sink_places
        places = caches.shape[4]
        half = (rows, chunk, model.rope.rotary_dim // 2)
        self._session = session
        self._binding = session.io_binding()
        self._kept: list[npt.NDArray[Any]] = [caches]
        self.sink_places = np.arange(sinks)
        self.token_ids: Ints = self._input(TOKEN_IDS, np.empty((rows, chunk), np.int64))
        self.logit_rows: Ints = self._input(LOGIT_ROWS, np.empty(shape.num_logits, np.int64))
        self.cos: Floats = self._input(names.COS, np.empty(half, np.float32))
        self.sin: Floats = self._input(names.SIN, np.empty(half, np.float32))
        self.sink_cos: Floats = self._input(names.SINK_COS, np.empty(half, np.float32))
        self.sink_sin: Floats = self._input(names.SINK_SIN, np.empty(half, np.float32))
        self.is_sink = self._input(names.IS_SINK, np.empty((rows, 1, 1, 1, sinks), np.bool_))
        self.bias: Floats = self._input(
            names.BIAS, np.empty((rows, 1, 1, chunk, places + chunk), np.float32)
        )
        self._input(names.NUM_SINK_PLACES, np.array([sinks]))
        self._input(names.SCORE_SPLIT, np.array([sinks, places - sinks]))
        self._input(names.PROBABILITY_SPLIT, np.array([places, chunk]))
        self.new: Floats = np.empty(
            (model.num_layers, 2, rows, model.num_kv_heads, chunk, model.head_dim), np.float32
        )
        self.logits: Floats = np.empty((shape.num_logits, model.vocab_size), np.float32)
        self._output(LOGITS, self.logits)
        for layer in range(model.num_layers):
            past, new = names.past_names(layer), names.new_names(layer)
            for part in (0, 1):
                cached = caches[layer, part, shape.first_row : shape.first_row + rows]
                self._input(past[part], cached[:, :, None])
                self._output(new[part], self.new[layer, part])

    def execute(self) -> None:
        """Run the graph."""
        self._session.run_with_iobinding(self._binding)

    def _input(self, name: str, array: npt.NDArray[Any]) -> npt.NDArray[Any]:
        self._kept.append(array)
        self._binding.bind_input(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)
        return array

    def _output(self, name: str, array: Floats) -> None:
        self._binding.bind_output(name, "cpu", 0, np.float32, array.shape, array.ctypes.data)
