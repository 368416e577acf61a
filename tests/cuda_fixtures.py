"""The CUDA engine on a machine without a GPU: its kernels in Triton's interpreter.

Import this before triton: kernels are interpreted only if the variable is set by then.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import pytest

from engine_build.graph import export_graph
from engine_build.spec import EngineSpec, WeightFormat, kv_dtype_for
from tests.engine_fixtures import cached_tensors, tiny_shape

os.environ["TRITON_INTERPRET"] = "1"
torch = pytest.importorskip("torch")
pytest.importorskip("triton")

from engine.cuda_engine import DEFAULT_OPTIONS, CudaEngine  # noqa: E402
from engine.cuda_options import CudaOptions  # noqa: E402


def cuda_spec(
    family: str = "llama",
    capacity: int = 40,
    max_chunk: int = 20,
    weight_format: WeightFormat = "float32",
) -> EngineSpec:
    kv_dtype = kv_dtype_for(weight_format)
    shape = tiny_shape(family)
    return EngineSpec(shape, capacity, max_chunk, weight_format, kv_dtype, target="cuda")


def make_cuda_engine(
    family: str = "llama",
    *,
    capacity: int = 40,
    max_chunk: int = 20,
    slots: int = 4,
    weight_format: WeightFormat = "float32",
    options: CudaOptions = DEFAULT_OPTIONS,
) -> CudaEngine:
    """An engine of a tiny model; its folder is gone again, as the weights are read at start."""
    spec = cuda_spec(family, capacity, max_chunk, weight_format)
    with tempfile.TemporaryDirectory() as folder:
        export_graph(spec, cached_tensors(family), Path(folder), lambda fraction: None)
        (Path(folder) / "spec.json").write_text(spec.to_json())
        return CudaEngine(
            Path(folder),
            memory_budget_bytes=slots * spec.slot_bytes,
            device="cpu",
            options=options,
        )
