"""The TensorRT engine as a subject: a plan built on the card, weights drawn on it, no checkpoint written.

A plan of a shape is built once on a machine and kept (`carried.plans_folder`): sections of one point share
it, and a process that had to be started again does not pay for it twice.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch

from benchmarks.gpu.carried import NotCarried, carried_graph, ensure_library, plans_folder
from engine.cuda_options import CudaOptions
from engine.cuda_weights import DTYPES, Source, from_tensors, random_weights
from engine.protocol import Engine
from engine.tensorrt_engine import PlanRuntime, RuntimeOptions, TensorRtEngine
from engine_build.engine_names import GRAPH_FILE
from engine_build.manifest import SPEC
from engine_build.plan import PLAN_FILE, PlanOptions, build_plan
from engine_build.plan_inputs import cache_row_bytes
from engine_build.shard import rank_weights
from engine_build.spec import EngineSpec

Tensors = Mapping[str, torch.Tensor]
BUILT = "built.json"


class OpenGiven(Protocol):
    """Opens the runtime of a plan with weights that are there already."""

    def __call__(
        self, engine_dir: Path, spec: EngineSpec, options: RuntimeOptions, weights: Source
    ) -> PlanRuntime: ...


class MakePlan(Protocol):
    """Makes FOLDER a folder that `OpenGiven` can open."""

    def __call__(
        self, spec: EngineSpec, folder: Path, capabilities: Sequence[str]
    ) -> dict[str, Any]: ...


class TensorRtSubjects:
    """Constructs engines for `Subject`; `capabilities` are those that plans are built for.

    `described` says of what plan the engine constructed last is. `open_runtime` and `make_plan` are the
    seam for tests, which have no GPU.
    """

    def __init__(
        self,
        open_runtime: OpenGiven | None = None,
        make_plan: MakePlan | None = None,
        plans: Path | None = None,
    ) -> None:
        self.capabilities: tuple[str, ...] = ()
        self.described: dict[str, Any] = {}
        self._open_runtime = open_runtime or _gpu_runtime
        self._make_plan = make_plan or make_plan_here
        self._plans = plans

    def construct(
        self,
        spec: EngineSpec,
        slots: int,
        device: str,
        options: CudaOptions,
        tensors: Tensors | None,
    ) -> Engine:
        """See `subject.Construct`. Of the options the number of rows counts."""
        folder = self._folder(spec)
        place = torch.device(device)
        source = (
            random_weights(spec, 0, place)
            if tensors is None
            else from_tensors(tensors, spec, place)
        )

        def open_runtime(
            engine_dir: Path, spec: EngineSpec, options: RuntimeOptions
        ) -> PlanRuntime:
            return self._open_runtime(engine_dir, spec, options, source)

        begin = time.perf_counter()
        budget = slots * cache_row_bytes(spec)
        runtime_options = RuntimeOptions(budget, max_running=options.max_running)
        engine = TensorRtEngine(folder, runtime_options, open_runtime=open_runtime)
        self.described = {
            **json.loads((folder / BUILT).read_text()),
            "open_s": time.perf_counter() - begin,
        }
        return engine

    def _folder(self, spec: EngineSpec) -> Path:
        """The folder with the plan of a spec, built if no process on this machine has built it."""
        plans = self._plans or plans_folder()
        way = "-".join(self.capabilities) or "default"
        folder = plans / f"{spec.fingerprint[:16]}-{way}"
        if not (folder / BUILT).is_file():
            folder.mkdir(parents=True, exist_ok=True)
            begin = time.perf_counter()
            found = self._make_plan(spec, folder, self.capabilities)
            built = {**found, "plan_for": way, "build_s": time.perf_counter() - begin}
            (folder / SPEC).write_text(spec.to_json())
            (folder / BUILT).write_text(json.dumps(built))
        return folder


def make_plan_here(spec: EngineSpec, folder: Path, capabilities: Sequence[str]) -> dict[str, Any]:
    """Build the plan of `spec`, from a graph that was carried or is written here.

    Raises NotCarried without TensorRT-RTX, or without a graph and without ONNX; SpecError in the library's
    words where it refuses.
    """
    ensure_library()
    graph = carried_graph(spec.fingerprint)
    if graph is None:
        graph = folder / GRAPH_FILE
        graph.write_bytes(_written_graph(spec))
    plan = folder / PLAN_FILE
    build_plan(spec, graph, plan, lambda fraction: None, PlanOptions(tuple(capabilities)))
    return {"plan_bytes": plan.stat().st_size}


def plan_weights(spec: EngineSpec, source: Source) -> dict[str, torch.Tensor]:
    """The weights that a plan of 16- or 32-bit weights takes as inputs, by name."""
    dtype = DTYPES[spec.kv_dtype]
    weights = rank_weights(spec.model, 0, 1)
    return {weight.name: source(weight).values.to(dtype).contiguous() for weight in weights}


def _written_graph(spec: EngineSpec) -> bytes:
    try:
        from engine_build.graph import graph_of_inputs
    except ModuleNotFoundError as error:
        raise NotCarried(
            f"no graph of this shape was carried, and writing one needs {error.name}: pack again with this "
            "tree's `python -m benchmarks.gpu.pack_tensorrt`"
        ) from error
    written: bytes = graph_of_inputs(spec).SerializeToString(deterministic=True)
    return written


def _gpu_runtime(
    engine_dir: Path, spec: EngineSpec, options: RuntimeOptions, weights: Source
) -> PlanRuntime:
    """Its cache is filled with random keys: zeros draw less power and run faster."""
    from engine.tensorrt_runtime import TensorRtRuntime

    ensure_library()
    runtime = TensorRtRuntime(engine_dir, spec, options, lambda device: plan_weights(spec, weights))
    runtime.cache.normal_()
    torch.cuda.synchronize()
    return runtime
