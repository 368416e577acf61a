"""The TensorRT engine over ONNX Runtime: its graph, inputs and passes on a CPU, in float32 or float16.

Stands in for engine/tensorrt_runtime.py alone: everything that decides is the real thing.
"""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime

from engine.protocol import Logits, SampleRequest
from engine.sampling import Sampled, sample_rows
from engine.tensorrt_engine import RuntimeOptions, TensorRtEngine
from engine.tensorrt_inputs import PassInputs
from engine_build.engine_names import GRAPH_FILE, LOGIT_ROWS, LOGITS, WEIGHTS_FILE
from engine_build.graph import export_graph
from engine_build.lowering_tensorrt import COMPUTE_DTYPES
from engine_build.plan_inputs import (
    ANGLES,
    PRESENT,
    QUERY_AGES,
    ROW_FIELDS,
    TOKEN_IDS,
    WRITE_PLACES,
    cache_names,
    is_input,
)
from engine_build.plan_profiles import Size, input_shapes, plan_profiles, profile_for
from engine_build.spec import EngineSpec, KvDtype, WeightFormat
from engine_build.stored_weights import WeightOf, stored_weights
from engine_build.weights import read_weight_file
from tests.engine_fixtures import cached_tensors, tiny_shape

MAX_HELD = 4


class OnnxPlanRuntime:
    """See `PlanRuntime`. Every cache begins full of NaN: reading what nobody wrote shows.

    `weights`: by name; None: those of the engine's file.
    """

    def __init__(
        self,
        engine_dir: Path,
        spec: EngineSpec,
        num_rows: int,
        weights: Mapping[str, npt.NDArray[Any]] | None = None,
    ) -> None:
        graph = str(engine_dir / GRAPH_FILE)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        options.log_severity_level = 3
        # Or it makes 4-bit layers one operator of its own that rounds activations to 8 bits.
        options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
        self._session = onnxruntime.InferenceSession(
            graph, options, providers=["CPUExecutionProvider"]
        )
        self._spec = spec
        if weights is None:
            stored = read_weight_file(engine_dir / WEIGHTS_FILE)
            weights = {name: stored[name] for name in stored if is_input(name, spec)}
        self._weights = weights
        shapes = input_shapes(spec, Size(num_rows, 1, 1))
        dtype = COMPUTE_DTYPES[spec.kv_dtype]
        self.caches: dict[str, npt.NDArray[Any]] = {
            name: np.full(shapes[name], np.nan, dtype=dtype)
            for layer in range(spec.model.num_layers)
            for name in cache_names(layer)
        }
        self._last: Logits = np.zeros((0, spec.model.vocab_size), np.float32)
        self._held: list[Logits] = []
        self.num_rows = num_rows
        self.sizes: list[Size] = []

    @property
    def max_held(self) -> int:
        return MAX_HELD

    def run(self, inputs: PassInputs, first_row: int, hold: range) -> None:
        size = Size(inputs.batch, inputs.chunk, len(inputs.logit_rows))
        self._check_profile(size)
        rows = slice(first_row, first_row + inputs.batch)
        caches = {name: cache[rows] for name, cache in self.caches.items()}
        step: dict[str, npt.NDArray[Any]] = {
            TOKEN_IDS: inputs.token_ids,
            ANGLES: inputs.angles,
            WRITE_PLACES: inputs.write_places,
            QUERY_AGES: inputs.query_ages,
            ROW_FIELDS: inputs.row_fields,
            LOGIT_ROWS: inputs.logit_rows,
        }
        shapes = {name: values.shape for name, values in {**step, **caches}.items()}
        assert shapes == input_shapes(self._spec, size)
        logits = np.empty((size.logits, self._spec.model.vocab_size), np.float32)
        binding = self._session.io_binding()
        for name, values in {**self._weights, **step, **caches}.items():
            _bind(binding.bind_input, name, np.ascontiguousarray(values))
        for name, cache in caches.items():
            _bind(binding.bind_output, name + PRESENT, cache)  # the same memory: written in place
        _bind(binding.bind_output, LOGITS, logits)
        self._session.run_with_iobinding(binding)
        self._last = logits
        self._held.extend(logits[row] for row in hold)
        self.sizes.append(size)

    def forget(self) -> None:
        """What the engine's first steps left behind."""
        self.sizes.clear()
        for cache in self.caches.values():
            cache.fill(np.nan)

    def logits(self) -> Logits:
        return self._last

    def draw(self, requests: Sequence[SampleRequest]) -> list[Sampled]:
        assert len(requests) == len(self._held) <= MAX_HELD
        held, self._held = np.stack(self._held), []
        return sample_rows(held, requests)

    def swap(self, row: int, other: int) -> None:
        for cache in self.caches.values():
            cache[[row, other]] = cache[[other, row]]

    def clear(self, row: int) -> None:
        for cache in self.caches.values():
            cache[row] = 0.0

    def close(self) -> None:
        self.caches = {}

    def _check_profile(self, size: Size) -> None:
        profile = plan_profiles(self._spec)[profile_for(size.batch, size.chunk)]
        for field in ("batch", "chunk", "logits"):
            least, most = getattr(profile.least, field), getattr(profile.most, field)
            assert least <= getattr(size, field) <= most


def _bind(bind: Callable[..., None], name: str, values: npt.NDArray[Any]) -> None:
    bind(name, "cpu", 0, values.dtype.type, values.shape, values.ctypes.data)


@functools.cache
def _exported(spec: EngineSpec, family: str) -> tuple[Path, tempfile.TemporaryDirectory[str]]:
    holder = tempfile.TemporaryDirectory()
    folder = Path(holder.name)
    export_graph(spec, cached_tensors(family), folder, lambda fraction: None)
    (folder / "spec.json").write_text(spec.to_json())
    return folder, holder


def exported_weights(spec: EngineSpec, family: str) -> WeightOf:
    """What an engine of `make_tensorrt_engine` computes with, as floating point."""
    folder, _ = _exported(spec, family)
    return stored_weights(folder, spec)


def make_tensorrt_engine(
    family: str = "llama",
    *,
    capacity: int = 40,
    max_chunk: int = 20,
    slots: int = 4,
    weight_format: WeightFormat = "float32",
    kv_dtype: KvDtype = "float32",
) -> TensorRtEngine:
    """An engine of a tiny model for target tensorrt-rtx; `kv_dtype` is that of all it computes."""
    spec = EngineSpec(
        tiny_shape(family), capacity, max_chunk, weight_format, kv_dtype, "tensorrt-rtx"
    )
    folder, _ = _exported(spec, family)

    def open_runtime(
        engine_dir: Path, spec: EngineSpec, options: RuntimeOptions
    ) -> OnnxPlanRuntime:
        return OnnxPlanRuntime(engine_dir, spec, slots)

    engine = TensorRtEngine(folder, RuntimeOptions(max_running=4), open_runtime=open_runtime)
    runtime_of(engine).forget()
    return engine


def runtime_of(engine: TensorRtEngine) -> OnnxPlanRuntime:
    """The stand-in that such an engine runs on."""
    runtime = engine._runtime
    assert isinstance(runtime, OnnxPlanRuntime)
    return runtime
