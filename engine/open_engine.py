"""The one place where an engine directory becomes a running engine.

`spec.json` says which executor it was built for. That executor's module, and the library that it computes
with, is imported here when it is opened and not before: a service on CPUs never loads torch.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from engine.cuda_options import INTERPRETER, CudaOptions, interpreted
from engine.protocol import Engine
from engine_build.libraries import missing_library
from engine_build.manifest import load_engine_spec
from engine_build.spec import EngineSpec, SpecError

logger = logging.getLogger(__name__)

CPU_BUDGET_BYTES = 1 << 30
"""For kv_slots where no budget is given and the engine runs on CPUs, which share their memory with all."""


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """How to run an engine that is built; none of it changes a result, except `capacity`.

    `memory_budget_bytes` is for kv_slots, per GPU or per CPU engine: None takes what is free on a GPU
    (what is left once weights and workspace are there) and `CPU_BUDGET_BYTES` on a CPU. `threads` are
    those of a CPU engine, dealt out to its ranks, as its budget is. `capacity` replaces that of
    spec.json. `max_running` is the most decode rows of one step: GPU engines capture their
    graphs up to it. `host_memory_bytes` is for conversations that lost their kv_slot, in pinned host
    memory (on a CPU: plain memory, which `memory_budget_bytes` uses better), dealt out to the ranks; 0 for
    none. `step_timeout_s` is the longest wait of one rank for another inside a step.
    """

    memory_budget_bytes: int | None = None
    threads: int = 1
    capacity: int | None = None
    max_running: int = 16
    host_memory_bytes: int = 0
    step_timeout_s: float = 120.0


DEFAULT_ENGINE_OPTIONS = EngineOptions()

Opener = Callable[[Path, EngineSpec, EngineOptions], Engine]


def open_engine(engine_dir: Path, options: EngineOptions = DEFAULT_ENGINE_OPTIONS) -> Engine:
    """Start the engine of `engine_dir` in this process (and its ranks beside it).

    Raises ManifestError for a folder that is no whole engine, SpecError for a target that this release
    or this machine cannot run (naming what to install), or a budget that holds no kv_slot, and what the
    executor itself raises (KernelError: the CPU engine's operators cannot be compiled here).
    """
    spec = load_engine_spec(engine_dir, options.capacity)
    kind = executor_of(spec)
    if kind not in _OPENERS:
        known = ", ".join(_OPENERS)
        raise SpecError(
            "target",
            f"this release has no engine for {kind}",
            f"Build for one of: {known}",
        )
    try:
        return _OPENERS[kind](engine_dir, spec, options)
    except ModuleNotFoundError as error:
        missing = missing_library(kind, error)
        if missing is None:
            raise
        raise missing from error


def executor_of(spec: EngineSpec) -> str:
    """The name in `_OPENERS` of what runs this engine: its target, or "TARGET ranks" for a TP group."""
    return spec.target if spec.tp_size == 1 else f"{spec.target} ranks"


def _open_onnx(engine_dir: Path, spec: EngineSpec, options: EngineOptions) -> Engine:
    from engine.onnx_engine import OnnxEngine

    budget = options.memory_budget_bytes
    return OnnxEngine(
        engine_dir,
        memory_budget_bytes=CPU_BUDGET_BYTES if budget is None else budget,
        threads=options.threads,
        capacity=spec.capacity,
        host_memory_bytes=options.host_memory_bytes,
    )


def _open_tensorrt(engine_dir: Path, spec: EngineSpec, options: EngineOptions) -> Engine:
    from engine.tensorrt_engine import RuntimeOptions, TensorRtEngine

    runtime = RuntimeOptions(options.memory_budget_bytes, options.max_running)
    return TensorRtEngine(engine_dir, runtime, capacity=options.capacity)


def _open_cpu_ranks(engine_dir: Path, spec: EngineSpec, options: EngineOptions) -> Engine:
    budget = options.memory_budget_bytes
    share = (CPU_BUDGET_BYTES if budget is None else budget) // spec.tp_size
    threads = max(1, options.threads // spec.tp_size)
    return _open_ranks(engine_dir, spec, options, memory_budget_bytes=share, threads=threads)


def _open_gpu_ranks(engine_dir: Path, spec: EngineSpec, options: EngineOptions) -> Engine:
    budget = options.memory_budget_bytes
    if interpreted(spec.target):
        _say_interpreted(engine_dir)
        budget = CPU_BUDGET_BYTES // spec.tp_size if budget is None else budget
    return _open_ranks(engine_dir, spec, options, memory_budget_bytes=budget)


def _open_ranks(
    engine_dir: Path,
    spec: EngineSpec,
    options: EngineOptions,
    memory_budget_bytes: int | None,
    threads: int = 1,
) -> Engine:
    """A tensor-parallel group; what each rank runs is in `rank_executors`."""
    from engine.rank_executors import RankOptions
    from engine.ranks import RankTimeouts, TensorParallelEngine

    return TensorParallelEngine(
        RankOptions(
            engine_dir=str(engine_dir.resolve()),
            memory_budget_bytes=memory_budget_bytes,
            threads=threads,
            capacity=spec.capacity,
            max_running=options.max_running,
            host_memory_bytes=options.host_memory_bytes // spec.tp_size,
            step_s=options.step_timeout_s,
        ),
        RankTimeouts(step_s=options.step_timeout_s),
    )


def _open_cuda(engine_dir: Path, spec: EngineSpec, options: EngineOptions) -> Engine:
    from engine.cuda_engine import CudaEngine

    device, budget = "cuda", options.memory_budget_bytes
    if interpreted(spec.target):
        _say_interpreted(engine_dir)
        device, budget = "cpu", CPU_BUDGET_BYTES if budget is None else budget
    return CudaEngine(
        engine_dir,
        memory_budget_bytes=budget,
        device=device,
        capacity=spec.capacity,
        options=CudaOptions(
            max_running=options.max_running, host_memory_bytes=options.host_memory_bytes
        ),
    )


def _say_interpreted(engine_dir: Path) -> None:
    logger.warning(
        "%s runs in %s, on the CPU and very slowly: TRITON_INTERPRET=1 is set. Unset it to use a GPU",
        engine_dir.name,
        INTERPRETER,
    )


# An executor is added with a function like the one above and one line here.
_OPENERS: Mapping[str, Opener] = {
    "cpu": _open_onnx,
    "tensorrt": _open_tensorrt,
    "tensorrt-rtx": _open_tensorrt,
    "cpu ranks": _open_cpu_ranks,
    "cuda": _open_cuda,
    "cuda ranks": _open_gpu_ranks,
    "tensorrt ranks": _open_gpu_ranks,
    "tensorrt-rtx ranks": _open_gpu_ranks,
}
