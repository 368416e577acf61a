"""The CPU graph in ONNX Runtime, over the memory of the kv_slots."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnxruntime

from engine.step_inputs import StepInputs
from engine_build.graph import LOGIT_ROWS, LOGITS
from engine_build.lowering_cpu import ANGLES, CACHE, ROWS, TOKEN_IDS
from engine_build.spec import EngineSpec

Bytes = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]

_CACHE_LINE = 64


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

    Memory is bound by address and written in place: nothing here copies a cache. Pages are touched
    when first used.
    """

    def __init__(
        self, graph: Path, spec: EngineSpec, num_slots: int, options: SessionOptions
    ) -> None:
        model = spec.model
        self._session = options.open(graph)
        self._vocab_size = model.vocab_size
        self._cache = _zeros((model.num_layers, num_slots, 2 * model.num_kv_heads, spec.head_bytes))
        self._logits: Floats = np.empty((0, model.vocab_size), dtype=np.float32)

    def execute(self, inputs: StepInputs) -> Floats:
        """Run a step; logits [len(logit_rows), vocab], valid until the next run."""
        count = len(inputs.logit_rows)
        if count > len(self._logits):
            self._logits = np.empty((count, self._vocab_size), dtype=np.float32)
        logits = self._logits[:count]
        binding = self._session.io_binding()
        for name, array in (
            (TOKEN_IDS, inputs.token_ids),
            (LOGIT_ROWS, inputs.logit_rows),
            (ANGLES, inputs.angles),
            (ROWS, inputs.rows),
            (CACHE, self._cache),
        ):
            binding.bind_input(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)
        binding.bind_output(LOGITS, "cpu", 0, np.float32, logits.shape, logits.ctypes.data)
        self._session.run_with_iobinding(binding)
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
