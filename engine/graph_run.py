"""The CPU graph in ONNX Runtime, over the memory of the kv_slots."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime

from engine.collective import Reducer
from engine.host_slots import HostSlots
from engine.protocol import SlotCopy
from engine.step_inputs import StepInputs
from engine_build.engine_names import LOGIT_ROWS, LOGITS
from engine_build.lowering_cpu import ANGLES, CACHE, REDUCER, ROWS, TOKEN_IDS
from engine_build.shard import head_rows, shard_shape
from engine_build.spec import EngineSpec

Bytes = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]

_CACHE_LINE = 64

AllReduce = Callable[[Floats], None]
"""Replaces float32 values by their sum over all ranks."""


@dataclass(frozen=True, slots=True)
class SessionOptions:
    """How to open the graph: the library of our operators, threads, and what idle ones do.

    `profile` makes ONNX Runtime write a trace with this prefix until `GraphRun.close`.
    """

    library: Path
    threads: int
    spinning: bool
    profile: Path | None

    def open(self, graph: Path) -> onnxruntime.InferenceSession:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = self.threads
        options.inter_op_num_threads = 1
        spinning = "1" if self.spinning else "0"
        options.add_session_config_entry("session.intra_op.allow_spinning", spinning)
        options.register_custom_ops_library(str(self.library))
        if self.profile is not None:
            options.enable_profiling = True
            options.profile_file_prefix = str(self.profile)
        return onnxruntime.InferenceSession(str(graph), options, providers=["CPUExecutionProvider"])


class GraphRun:
    """A loaded graph and its kv_slots, uint8 [layers, kv_slots, 2 * kv_heads, head_bytes].

    `all_reduce` is what the graph of a tensor-parallel rank calls, and needs.

    Memory is bound by address and written in place: no step copies a cache. Pages are touched
    when first used.
    """

    def __init__(
        self,
        graph: Path,
        spec: EngineSpec,
        num_slots: int,
        options: SessionOptions,
        all_reduce: AllReduce | None = None,
        num_host_slots: int = 0,
    ) -> None:
        model = shard_shape(spec.model, spec.tp_size)
        self._session = options.open(graph)
        self._num_logits = head_rows(spec.model, spec.tp_size)
        self._cache = _zeros((model.num_layers, num_slots, 2 * model.num_kv_heads, spec.head_bytes))
        self._host = HostSlots(self._cache.swapaxes(0, 1), num_host_slots)
        self._logits: Floats = np.empty((0, self._num_logits), dtype=np.float32)
        self._reducer = None if all_reduce is None else Reducer(all_reduce)

    def copy_slots(self, copies: Sequence[SlotCopy]) -> None:
        """Whole kv_slots to host slots and back, in order."""
        self._host.run(copies)

    def execute(self, inputs: StepInputs) -> Floats:
        """Run a step; logits [len(logit_rows), vocab / tp_size], valid until the next run.

        Raises what the all-reduce raised.
        """
        count = len(inputs.logit_rows)
        if count > len(self._logits):
            self._logits = np.empty((count, self._num_logits), dtype=np.float32)
        logits = self._logits[:count]
        binding = self._session.io_binding()
        arrays: list[tuple[str, npt.NDArray[Any]]] = [
            (TOKEN_IDS, inputs.token_ids),
            (LOGIT_ROWS, inputs.logit_rows),
            (ANGLES, inputs.angles),
            (ROWS, inputs.rows),
            (CACHE, self._cache),
        ]
        if self._reducer is not None:
            arrays.append((REDUCER, self._reducer.address))
        for name, array in arrays:
            binding.bind_input(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)
        binding.bind_output(LOGITS, "cpu", 0, np.float32, logits.shape, logits.ctypes.data)
        try:
            self._session.run_with_iobinding(binding)
        except Exception:
            if self._reducer is not None and self._reducer.failed is not None:
                raise self._reducer.failed from None
            raise
        return logits

    def close(self) -> None:
        """End a profile that was begun."""
        if self._session.get_session_options().enable_profiling:
            self._session.end_profiling()


def _zeros(shape: tuple[int, ...]) -> Bytes:
    """Like np.zeros, at the start of a cache line."""
    size = int(np.prod(shape, dtype=np.int64))
    memory = np.zeros(size + _CACHE_LINE, dtype=np.uint8)
    first = -memory.ctypes.data % _CACHE_LINE
    return memory[first : first + size].reshape(shape)
